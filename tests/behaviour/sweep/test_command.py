"""The command ``dt-lens sweep``."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from dt_lens.behaviour.sweep import sweep as sweeps
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.store import FILE
from dt_lens.cli import main
from dt_lens.decision_transformer.checkpoint import save_pretrained
from dt_lens.errors import DtLensError

Make = Callable[..., Any]


@pytest.fixture
def dt_lens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[object, str, str]]:
    """Runs a command in this process: its exit status, what it prints, and what it prints on standard error."""

    def run(*words: str | Path) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["dt-lens", *map(str, words)])
        status: object = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return run


def test_it_leaves_one_file_and_refuses_another_plan(
    agent: Any, remembering: Make, dt_lens: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_pretrained(agent, tmp_path / "model")
    words = ["sweep", model, "--matrices", "*.W_in,*.0.attn.OV.0", "--sv", "-1", "--seed", "3", "--max-steps", "9"]
    words += ["--edits", "zero,scale:0.5", "--controls", "1", "--sides", "read", "--workers", "1"]
    words += ["--out", tmp_path / "out"]
    # Once as a user runs it, in a process of its own with a worker; then in this one.
    command = [sys.executable, "-c", "from dt_lens.cli import main; main()", *map(str, words)]
    command += ["--episodes", "6", "--table", str(tmp_path / "table.csv")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == [FILE]
    assert "Unedited: Pendulum-v1, target return 200: 6 episodes, seeds 3 to 8" in done.stdout
    assert "6 edits, the largest differences first" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == f"The results: {tmp_path / 'out' / FILE}"
    assert "[100%] 13 of 13 blocks of episodes" in done.stderr
    assert done.stderr.endswith(f"Next: dt-lens atlas {model} --sweep {tmp_path / 'out'}\n")
    results = SweepResults(tmp_path / "out")
    written, table = pd.read_csv(tmp_path / "table.csv"), results.table()
    assert len(written) == len(table) == 12
    assert list(written["difference"]) == list(table["difference"])

    monkeypatch.setattr(sweeps, "LocalEngine", remembering)
    status, _, error = dt_lens(*words, "--episodes", "7", "--control-match", "output")
    assert status == 0, error
    table = results.table()
    assert len(table) == 18 and list(table["match"].dropna()) == ["frobenius", "output"] * 6
    # Arms that are no longer named have the episodes that they had.
    assert set(table.loc[table["match"] == "frobenius", "episodes"]) == {6}
    assert set(table.loc[table["match"] != "frobenius", "episodes"]) == {7}
    status, _, error = dt_lens(*words, "--episodes", "6", "--target-return", "5")
    assert status == 2 and "Traceback" not in error
    sentence = error.strip().splitlines()[-1]
    assert sentence.startswith("dt-lens: ") and sentence.endswith(".")
    assert "holds another sweep: its target_return is 200.0 and this one's 5.0" in sentence


def test_edits_are_printed_beside_the_mean_of_their_controls() -> None:
    from dt_lens.cli.commands.sweep import _print_edits, beside_controls

    rows = [{"kind": "edit", "of": None, "difference": float(arm), "value": "zero"} for arm in range(1, 31)]
    rows += [{"kind": "control", "of": arm, "difference": 0.5 + c} for arm in range(1, 30) for c in range(2)]
    about = {"matrix": "blocks.0.mlp.W_in", "side": "read", "sv": 0, "directions": "plain", "difference_note": ""}
    numbers = {"mean_return": 7.0, "difference_low": -1.0, "difference_high": 200.0, "q_value": 0.01}
    found = pd.DataFrame([about | numbers | row for row in rows], index=range(1, len(rows) + 1))
    found["of"] = found["of"].astype("Int64")
    table = beside_controls(found, terms_of_an_agent())
    assert list(table.columns) == [
        "matrix", "side", "sv", "value", "mean_return", "difference", "95 %", "controls", "their mean", "q"
    ]  # fmt: skip
    assert len(table) == 30 and table.loc[3, "controls"] == 2 and table.loc[3, "their mean"] == 1.0
    assert table.loc[3, "95 %"] == "[-1.000, 200.0]" and pd.isna(table.loc[30, "controls"])
    with redirect_stdout(io.StringIO()) as out:
        _print_edits(found, terms_of_an_agent())
    lines = out.getvalue().splitlines()
    assert lines[0].strip() == "The 20 largest differences of 30 edits" and len(lines) == 23
    assert "30.000" in lines[2] and "11.000" in lines[21] and "--json" in lines[22]
    assert max(len(line.rstrip()) for line in lines) < 120


def terms_of_an_agent() -> Any:
    return SimpleNamespace(outcome="return")


def test_engines_that_do_not_exist() -> None:
    from dt_lens.cli.commands.sweep import sweep

    with pytest.raises(DtLensError, match="--engine is 'moon'; it must be local or ray"):
        sweep("hopper", engine="moon")
    with pytest.raises(DtLensError, match="give --engine ray with it"):
        sweep("hopper", address="10.0.0.5:6379")
