"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dt_lens.decision_transformer.checkpoint import save_pretrained
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.decision_transformer.model import HookedDecisionTransformer


def dt_lens(*words: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from dt_lens.cli import main; main()", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, **(env or {})})


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random agent for CartPole in Hugging Face's format."""
    torch.manual_seed(0)
    cfg = HookedDecisionTransformerConfig(
        4,
        2,
        d_model=16,
        n_layers=1,
        n_heads=2,
        d_mlp=24,
        n_ctx=4,
        max_ep_len=500,
        discrete_actions=True,
        action_tanh=False,
    )
    model = HookedDecisionTransformer(cfg).eval()
    model.facts = RunFacts(context=4, environment="CartPole-v1", target_returns=(100.0,), return_scale=100.0)
    return save_pretrained(model, tmp_path_factory.mktemp("models") / "cartpole")


def refused(result: subprocess.CompletedProcess[str], *needed: str) -> None:
    """One sentence, exit status 2, no traceback."""
    assert result.returncode == 2, result
    assert "Traceback" not in result.stderr
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith("dt-lens: ") and sentence.endswith((".", "?"))
    for word in needed:
        assert word in sentence


def test_help_needs_nothing_heavy() -> None:
    check = """
import sys
from dt_lens.cli import main
sys.argv = ["dt-lens", "--help"]
try:
    main()
except SystemExit:
    print(sorted({"torch", "transformers", "pandas", "gymnasium", "numpy"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip().endswith("[]")
    assert "study" in result.stdout


def test_scan_prints_and_writes_the_table(cartpole: Path, tmp_path: Path) -> None:
    file = tmp_path / "scan.csv"
    result = dt_lens("scan", cartpole, "--top", "3", "--out", file)
    assert result.returncode == 0, result.stderr
    assert "comparisons are discoveries" in result.stdout
    header = file.read_text().splitlines()[0]
    assert header == "matrix,layer,head,side,sv,block,sigma,embedding,label,cosine,z,p_value,q_value"


def test_top_shows_both_poles(cartpole: Path) -> None:
    result = dt_lens("top", cartpole, "blocks.0.mlp.W_in", "state_in", "-k", "2")
    assert result.returncode == 0, result.stderr
    assert "towards" in result.stdout and "away" in result.stdout and "pole angle" in result.stdout


def test_certify_says_what_it_proved(cartpole: Path) -> None:
    result = dt_lens("certify", cartpole)
    assert result.returncode == 0, result.stderr
    assert "in the original model" in result.stdout and "blocks.0.attn.QK.1" in result.stdout


def test_evaluate_with_an_edit_compares(cartpole: Path, tmp_path: Path) -> None:
    file = tmp_path / "episodes.csv"
    result = dt_lens(
        "evaluate",
        cartpole,
        "--episodes",
        "8",
        "--edit",
        "blocks.0.mlp.W_out",
        "--sv",
        "0,1",
        "--workers",
        "1",
        "--out",
        file,
    )
    assert result.returncode == 0, result.stderr
    assert "mean return" in result.stdout and "difference" in result.stdout
    assert len(file.read_text().splitlines()) == 17


def test_a_study_leaves_a_report_and_goes_on_where_it_was(cartpole: Path, tmp_path: Path) -> None:
    words = ("study", cartpole, "--episodes", "8", "--edits", "1", "--out", tmp_path, "--workers", "1", "--no-video")
    result = dt_lens(*words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == f"The report: {tmp_path / 'report.html'}"
    page = (tmp_path / "report.html").read_text()
    assert "than a random change of the same energy in the same place" in page
    assert "https://" not in page.split("<script>")[0]
    trials = sorted((tmp_path / "trials").glob("*.json"))
    assert len(trials) == 5  # unedited, a strong and a weak edit, their controls
    first = (tmp_path / "verdicts.csv").read_bytes()
    kept = {file: file.stat().st_mtime_ns for file in trials[1:]}
    trials[0].unlink()
    trials[1].write_text("cut short")
    assert dt_lens(*words).returncode == 0
    assert (tmp_path / "verdicts.csv").read_bytes() == first
    assert kept[trials[2]] == trials[2].stat().st_mtime_ns  # what was whole was not run again


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (("scan", "hoper"), "hopper"),
        (("scan", "{model}", "--matrices", "blocks.0.mlp.Win"), "blocks.0.mlp.W_in"),
        (("scan", "{model}", "--embeddings", "action_ou"), "action_out"),
        (("scan", "{model}", "-g", "n_heads"), "NAME=VALUE"),
        (("scan", "{model}", "-g", "n_head=2"), "n_head"),
        (("evaluate", "{model}", "--edit", "blocks.0.mlp.W_in", "--sv", "99"), "out of range"),
        (("evaluate", "{model}", "--edit", "blocks.0.attn.OV.0"), "side="),
        (("evaluate", "{model}", "--edit", "blocks.0.mlp.W_in", "--value", "nought"), "constant"),
        (("evaluate", "{model}", "--env", "Hopper-v5"), "11"),
        (("evaluate", "{model}", "--env", "NoSuch-v0"), "NoSuch"),
        (("train", "no/such-v0", "--steps", "1"), "no/such-v0"),
    ],
)
def test_mistakes_are_one_sentence(cartpole: Path, words: tuple[str, ...], needed: str) -> None:
    refused(dt_lens(*(word.format(model=cartpole) for word in words)), needed)


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch bomb-went-off",)


def test_broken_files_are_one_sentence(cartpole: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.pt"
    text.write_text("no checkpoint at all")
    refused(dt_lens("scan", text), "notes.pt")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((cartpole / "model.safetensors").read_bytes()[:3000])
    refused(dt_lens("scan", cut), "truncated")
    bomb = tmp_path / "bomb.pt"
    bomb.write_bytes(pickle.dumps(_Bomb()))
    refused(dt_lens("scan", bomb), "run code")
    assert not Path("bomb-went-off").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_sentence(cartpole: Path) -> None:
    refused(dt_lens("scan", cartpole, "--out", "/dev/full"), "/dev/full")


def test_a_folder_that_cannot_be_written_is_found_out_at_once(cartpole: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refused(dt_lens("study", cartpole, "--out", tmp_path / "file" / "out"), "cannot be written")


@pytest.mark.parametrize("command", ["train", "record"])
def test_defaults_are_the_recipe_of_the_bundled_agent(command: str) -> None:
    import inspect

    from dt_lens import cli
    from dt_lens.training.record import record
    from dt_lens.training.train import train

    recipe = {"train": train, "record": record}[command]
    names = {"layers": "n_layers", "heads": "n_heads", "dataset": "dataset_id"}
    wanted = {name: p.default for name, p in inspect.signature(recipe).parameters.items()}
    for name, parameter in inspect.signature(getattr(cli, command)).parameters.items():
        name = names.get(name, name)
        if name in wanted and not isinstance(parameter.default, Path):
            default = parameter.default
            if name == "paces":
                default = tuple(float(part) for part in default.split(","))
            assert default == wanted[name], name
