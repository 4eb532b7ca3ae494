"""load and wrap: where models come from, and how little it costs to import the package."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError

import dt_lens
from dt_lens.errors import DtLensError
from dt_lens.lens import loading
from dt_lens.zoo import models


def test_importing_is_light() -> None:
    """torch takes a second and TransformerLens several; neither is wanted before a model is."""
    code = (
        "import sys, dt_lens; dt_lens.DtLensError; dir(dt_lens);"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'gymnasium', 'minari', 'plotly', 'pandas', 'numpy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_is_there() -> None:
    for name in dt_lens.__all__:
        assert getattr(dt_lens, name) is not None
    assert set(dt_lens.__all__) <= set(dir(dt_lens))
    with pytest.raises(AttributeError, match="No dt_lens attribute nonsense"):
        dt_lens.nonsense  # noqa: B018


@pytest.fixture
def agent(make_hf: Any, tmp_path: Path) -> Path:
    make_hf().save_pretrained(tmp_path / "agent")
    return tmp_path / "agent"


def test_load_takes_text_and_paths(agent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dt_lens.load(agent).cfg == dt_lens.load(str(agent)).cfg
    monkeypatch.chdir(agent.parent)
    assert dt_lens.load("agent").cfg.d_model == 16


@pytest.mark.parametrize("source", [None, 3, ["hopper"], torch.nn.Linear(2, 2)])
def test_load_refuses_what_is_not_a_name_or_path(source: Any) -> None:
    with pytest.raises(DtLensError, match=r"load takes a name or a path, not an? \w+; use dt_lens\.wrap"):
        dt_lens.load(source)


def test_bundled_names(agent: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "bundled", lambda: {"jumper": agent})
    assert dt_lens.load("jumper").cfg.d_model == 16
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DtLensError, match=r"'jumpr': .* nor a bundled model \(jumper\)\. Did you mean 'jumper'\?$"):
        dt_lens.load("jumpr")  # which may be a name on the hub, too
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jumper").mkdir()  # the results of a study, say
    assert dt_lens.load("jumper").cfg.d_model == 16
    with pytest.raises(DtLensError, match=r"The folder .*jumper holds no model"):
        dt_lens.load("./jumper")


def test_certifying_can_be_left_out(agent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("dt_lens.lens.certification.certify_loaded", lambda model, progress: asked.append(model))
    dt_lens.load(agent, check=False)
    assert asked == []
    assert [dt_lens.load(agent)] == asked


class TestTheHub:
    """A name with at most one slash that does not exist locally may be on the hub, which may be out of reach."""

    def test_offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        start = time.monotonic()
        with pytest.raises(DtLensError) as caught:
            dt_lens.load("nobody/no-such-agent-v1.5")
        assert str(caught.value).endswith("check the name and the connection.") and time.monotonic() - start < 30

    def test_a_name_that_the_hub_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(DtLensError, match=r"'no--body/\.\.agent'"):
            dt_lens.load("no--body/..agent")

    @pytest.mark.parametrize("error", [OSError("reset"), ValueError("odd"), RuntimeError("closed"), TimeoutError()])
    def test_every_way_of_failing(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def fail(*args: Any, **kwargs: Any) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        with pytest.raises(DtLensError, match=r"the Hugging Face hub could not be reached"):
            dt_lens.load("some/agent")

    def test_a_name_that_the_hub_does_not_know(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **kwargs: Any) -> str:
            raise RepositoryNotFoundError(
                "404", response=httpx.Response(404, request=httpx.Request("GET", "https://x"))
            )

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        monkeypatch.setattr(models, "bundled", lambda: {"jumper": Path("nowhere")})
        with pytest.raises(DtLensError, match=r"'some/agent', and no model of that id on the Hugging Face hub"):
            dt_lens.load("some/agent")
        with pytest.raises(DtLensError, match=r"'jumpr': the Hugging Face hub has none .*bundled .*mean 'jumper'\?$"):
            dt_lens.load("jumpr")

    @pytest.mark.parametrize("name", ["some/agent", "gpt2", "agent-v1.5"])
    def test_what_was_fetched_is_loaded(self, monkeypatch: pytest.MonkeyPatch, agent: Path, name: str) -> None:
        asked: list[str] = []

        def fetch(name: str, **options: Any) -> str:
            asked.append(name)
            # No pickles but the weights, and no code.
            patterns = ["*.json", "*.safetensors", "pytorch_model*.bin", "merges.txt", "tokenizer.model"]
            assert options["allow_patterns"] == patterns
            return str(agent)

        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
        assert dt_lens.load(name, check=False).cfg.d_model == 16 and asked == [name]

    def test_bundled_names_and_local_paths_come_first(self, monkeypatch: pytest.MonkeyPatch, agent: Path) -> None:
        monkeypatch.setattr(loading, "_download", lambda name: pytest.fail("asked the hub"))
        monkeypatch.setattr(models, "bundled", lambda: {"gpt2": agent})
        assert dt_lens.load("gpt2", check=False).cfg.d_model == 16
        monkeypatch.setattr(models, "bundled", dict)
        monkeypatch.chdir(agent.parent)
        assert dt_lens.load("agent", check=False).cfg.d_model == 16

    @pytest.mark.parametrize(
        "name",
        [
            "runs/agent.pt",
            "runs/agent.d3",
            "agent.d3",
            "agent.SAFETENSORS",
            "a/b/c",
            "/some/agent",
            "../agent",
            "~/agent.ckpt",
            "no agent",
            Path("agent"),
        ],
    )
    def test_a_name_that_looks_like_a_file_is_not_fetched(
        self, monkeypatch: pytest.MonkeyPatch, name: str | Path
    ) -> None:
        monkeypatch.setattr(loading, "_download", lambda name: pytest.fail("asked the hub"))
        with pytest.raises(DtLensError, match="it is not a local file or folder, nor a bundled model"):
            dt_lens.load(name)
