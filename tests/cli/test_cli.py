"""The command line: what each command prints and writes, and what is refused with one sentence."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from dt_lens.cli.app import app
from dt_lens.version import __version__

Run = Callable[..., Any]


def refused(result: Any, *needed: str) -> None:
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


def test_a_mistake_in_a_process_of_its_own_is_one_sentence() -> None:
    command = [sys.executable, "-m", "dt_lens", "scan", "hoper"]
    refused(subprocess.run(command, capture_output=True, text=True, timeout=400), "hopper")


def test_the_version_is_printed(dt_lens: Run) -> None:
    assert dt_lens("--version") == (0, f"dt-lens {__version__}\n", "")


def test_every_command_and_option_is_described() -> None:
    group: Any = typer.main.get_command(app)
    assert len(group.commands) >= 14
    for name, command in group.commands.items():
        assert (command.help or "").endswith("."), name
        for parameter in command.params:
            assert (parameter.help or "").endswith("."), (name, parameter.name)


def test_scan_prints_and_writes_the_table(dt_lens: Run, cartpole: Path, tmp_path: Path) -> None:
    file = tmp_path / "scan.csv"
    result = dt_lens("scan", cartpole, "--top", "3", "--out", file)
    assert result.returncode == 0, result.stderr
    assert "comparisons are discoveries" in result.stdout
    header = file.read_text().splitlines()[0]
    assert header == "matrix,layer,head,side,sv,block,sigma,embedding,label,cosine,z,p_value,q_value"


def test_top_shows_both_poles(dt_lens: Run, cartpole: Path) -> None:
    result = dt_lens("top", cartpole, "blocks.0.mlp.W_in", "state_in", "-k", "2")
    assert result.returncode == 0, result.stderr
    assert "towards" in result.stdout and "away" in result.stdout and "pole angle" in result.stdout


def test_certify_says_what_it_proved(dt_lens: Run, cartpole: Path) -> None:
    result = dt_lens("certify", cartpole)
    assert result.returncode == 0, result.stderr
    assert "in the original model" in result.stdout and "blocks.0.attn.QK.1" in result.stdout


def test_evaluate_with_an_edit_compares(dt_lens: Run, cartpole: Path, tmp_path: Path) -> None:
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


def test_a_study_leaves_a_report_and_goes_on_where_it_was(dt_lens: Run, cartpole: Path, tmp_path: Path) -> None:
    words = ("study", cartpole, "--episodes", "8", "--edits", "1", "--out", tmp_path, "--workers", "1", "--no-video")
    result = dt_lens(*words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == f"The report: {tmp_path / 'report.html'}"
    page = (tmp_path / "report.html").read_text()
    assert "no edit and no control changed the return of any episode" in page  # an agent that was never trained
    assert "https://" not in page.split("<script>")[0]
    trials = sorted((tmp_path / "trials").glob("*.json"))
    assert len(trials) == 11  # unedited; a strong and a weak edit, the first of W_in, W_out and OV; their controls
    first = (tmp_path / "verdicts.csv").read_bytes()
    kept = {file: file.stat().st_mtime_ns for file in trials[1:]}
    trials[0].unlink()
    trials[1].write_text("cut short")
    record = json.loads(dt_lens(*words, "--json").stdout)
    assert list(record)[3:] == ["model", "unedited", "verdicts", "strongest", "spearman", "sentences", "report"]
    assert list(record["verdicts"][0]) == first.decode().splitlines()[0].split(",")
    assert (tmp_path / "verdicts.csv").read_bytes() == first
    assert kept[trials[2]] == trials[2].stat().st_mtime_ns  # what was whole was not run again


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (("scan", "hoper"), "hopper"),
        (("scan", "{model}", "--matrices", "blocks.0.mlp.Win"), "blocks.0.mlp.W_in"),
        (("scan", "{model}", "--embeddings", "action_ou"), "action_out"),
        (("scan", "{model}", "-g", "n_heads"), "NAME=VALUE"),
        (("certify", "{model}", "-g", "check=0"), "check is not a value"),
        (("certify", "{model}", "-g", "adapter=huggingface"), "hf_decision_transformer"),
        (("certify", "{model}", "-g", "adapter=3"), "adapter"),
        (("certify", "{model}", "-g", "x=" + "[" * 100_000), "nested too deeply"),
        (("scan", "{model}", "-g", "n_head=2"), "n_head"),
        (("evaluate", "{model}", "--edit", "blocks.0.mlp.W_in", "--sv", "99"), "out of range"),
        (("evaluate", "{model}", "--edit", "blocks.0.attn.OV.0"), "side="),
        (("evaluate", "{model}", "--edit", "blocks.0.mlp.W_in", "--value", "nought"), "constant"),
        (("evaluate", "{model}", "--env", "Hopper-v5"), "11"),
        (("evaluate", "{model}", "--env", "NoSuch-v0"), "NoSuch"),
    ],
)
def test_mistakes_are_one_sentence(dt_lens: Run, cartpole: Path, words: tuple[str, ...], needed: str) -> None:
    refused(dt_lens(*(word.format(model=cartpole) for word in words)), needed)


def test_an_adapter_may_be_insisted_on(dt_lens: Run, cartpole: Path) -> None:
    result = dt_lens("top", cartpole, "blocks.0.mlp.W_in", "-g", "adapter=hf_decision_transformer")
    assert result.returncode == 0, result.stderr


def test_an_unknown_data_set_is_one_sentence(dt_lens: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("MINARI_REMOTE", "gcp://elsewhere")
    monkeypatch.setattr("minari.storage.hosting.list_remote_datasets", refuse)
    refused(dt_lens("train", "no/such-v0", "--steps", "1"), "no/such-v0")


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch bomb-went-off",)


def test_broken_files_are_one_sentence(
    dt_lens: Run, cartpole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
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
def test_a_full_disk_is_one_sentence(dt_lens: Run, cartpole: Path) -> None:
    refused(dt_lens("scan", cartpole, "--out", "/dev/full"), "/dev/full")


@pytest.mark.parametrize("command", ["train", "train_text", "record"])
def test_defaults_are_the_recipe_of_the_bundled_model(command: str) -> None:
    from dt_lens.training.agent import train
    from dt_lens.training.planned import NOISES, record_planned
    from dt_lens.training.recording import record
    from dt_lens.training.settings import AgentSettings, TextSettings
    from dt_lens.training.text import train_text

    recipes: dict[str, list[Callable[..., Any]]] = {
        "train": [train, AgentSettings],
        "train_text": [train_text, TextSettings],
        "record": [record_planned, record],
    }
    wanted = {
        name: p.default for recipe in recipes[command] for name, p in inspect.signature(recipe).parameters.items()
    }
    if command == "record":
        wanted["noises"] = NOISES  # a search has noises of another kind, which are no option of the command
    names = {"layers": "n_layers", "heads": "n_heads", "dataset": "dataset_id", "environment": "environment_id"}
    called = getattr(import_module(f"dt_lens.cli.commands.{command}"), command)
    compared = 0
    for name, parameter in inspect.signature(called).parameters.items():
        name = name if name in wanted else names.get(name, name)
        default = parameter.default
        if name not in wanted or isinstance(default, Path) or name == "targets":
            continue
        if name in ("paces", "noises"):
            default = tuple(float(part) for part in default.split(","))
        assert default == wanted[name], name
        compared += 1
    assert compared >= 9
