"""The command ``dt-lens sweep`` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.store import FILE
from dt_lens.decision_transformer.checkpoint import save_pretrained
from dt_lens.errors import DtLensError


def dt_lens(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from dt_lens.cli import main; main()", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_it_leaves_one_file_and_refuses_another_plan(agent: Any, tmp_path: Path) -> None:
    model = save_pretrained(agent, tmp_path / "model")
    words = ["sweep", model, "--matrices", "*.W_in,*.0.attn.OV.0", "--sv", "-1", "--seed", "3", "--max-steps", "9"]
    words += [
        "--edits",
        "zero,scale:0.5",
        "--controls",
        "1",
        "--sides",
        "read",
        "--workers",
        "1",
        "--out",
        tmp_path / "out",
    ]
    done = dt_lens(*words, "--episodes", "6", "--table", tmp_path / "table.csv")
    assert done.returncode == 0, done.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == [FILE]
    assert "Unedited: Pendulum-v1, target return 200: 6 episodes, seeds 3 to 8" in done.stdout
    assert "Edits and controls" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == f"The results: {tmp_path / 'out' / FILE}"
    assert "[100%] 13 of 13 units" in done.stderr
    results = SweepResults(tmp_path / "out")
    written, table = pd.read_csv(tmp_path / "table.csv"), results.table()
    assert len(written) == len(table) == 12
    assert list(written["difference"]) == list(table["difference"])
    grown = dt_lens(*words, "--episodes", "7", "--control-match", "output")
    assert grown.returncode == 0, grown.stderr
    table = results.table()
    assert len(table) == 18 and list(table["match"].dropna()) == ["frobenius", "output"] * 6
    # Arms that were not asked for any more have the episodes that they had.
    assert set(table.loc[table["match"] == "frobenius", "episodes"]) == {6}
    assert set(table.loc[table["match"] != "frobenius", "episodes"]) == {7}
    other = dt_lens(*words, "--episodes", "6", "--target-return", "5")
    assert other.returncode == 2 and "Traceback" not in other.stderr
    sentence = other.stderr.strip().splitlines()[-1]
    assert sentence.startswith("dt-lens: ") and sentence.endswith(".")
    assert "holds another sweep: its target_return is 200.0 and this one's 5.0" in sentence


def test_engines_that_there_are_not() -> None:
    from dt_lens.cli.commands.sweep import sweep

    with pytest.raises(DtLensError, match="--engine is 'moon'; it must be local or ray"):
        sweep("hopper", engine="moon")
    with pytest.raises(DtLensError, match="give --engine ray with it"):
        sweep("hopper", address="10.0.0.5:6379")
