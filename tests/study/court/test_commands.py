"""The commands `court` and `steer`: a page at the end, and errors in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.cli.app import app
from dt_lens.decision_transformer.checkpoint import save_pretrained
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.errors import DtLensError

FEW = ["--max-steps", "4", "--workers", "1"]


@pytest.fixture(scope="module")
def folder(make_dt: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_dt(1, state_dim=11, act_dim=3, d_model=32, d_mlp=40, n_layers=1, n_heads=1, n_ctx=3)
    model.facts = RunFacts(context=3, environment="Hopper-v5", target_returns=(100.0, 50.0))
    saved: Path = save_pretrained(model, tmp_path_factory.mktemp("agent"))
    return saved


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)


def test_court(folder: Path, tmp_path: Path) -> None:
    done = run("court", folder, "--episodes", "2", "--draws", "200", "--out", tmp_path, *FEW, "--failure", "30")
    assert done.exit_code == 0, done.output
    assert "3. Editing W_in hurts more than editing W_out, at equal energy:" in done.output
    assert done.output.strip().splitlines()[-1] == f"The page: {tmp_path / 'court.html'}"
    assert SweepResults(tmp_path / "arms" / "folded").terms.failure == 30.0
    assert {"court.html", "court.csv", "court.json", "arms", "actions.json"} <= {f.name for f in tmp_path.iterdir()}


def test_steer(folder: Path, tmp_path: Path) -> None:
    words = ["steer", folder, "--episodes", "2", "--choosing", "2", "--candidates", "1", "--doses", "0,2"]
    done = run(*words, "--out", tmp_path, *FEW)
    assert done.exit_code == 0, done.output
    assert done.output.strip().splitlines()[-1] == f"The page: {tmp_path / 'steering.html'}"
    assert (tmp_path / "steering.json").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["court", "--sweep", "nowhere"], "There is no sweep in nowhere"),
        (["court", "--environment", "CartPole-v1"], "gives states of 4 numbers"),
        (["court", "--texts", "nowhere"], "The model is an agent, which runs in an environment; leave out --text"),
        (["steer", "--doses", "a,b"], "--doses holds 'a'"),
        (["steer", "--doses", "1,2"], "give at least two finite numbers"),
        (["steer", "--targets", "5"], "There are 1 target returns"),
    ],
)
def test_bad_options_are_one_sentence(folder: Path, tmp_path: Path, words: list[str], said: str) -> None:
    done = run(words[0], folder, *words[1:], "--out", tmp_path)
    assert isinstance(done.exception, DtLensError) and said in str(done.exception)
