"""The command `bench`: rows of every subject, and mistakes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dt_lens.cli.commands import bench as module
from dt_lens.errors import DtLensError
from dt_lens_benchmarks.row import Row
from dt_lens_benchmarks.subjects import SUBJECTS


def test_every_subject_is_a_module_that_measures() -> None:
    for name in SUBJECTS:
        assert callable(importlib.import_module(f"dt_lens_benchmarks.{name}").measure), name
    folder = Path(importlib.import_module("dt_lens_benchmarks").__file__ or "").parent
    measuring = {file.stem for file in folder.glob("*.py") if "\ndef measure(" in file.read_text(encoding="utf-8")}
    assert measuring == set(SUBJECTS)


def test_the_rows_are_printed_and_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row("steps", 200.0, "steps/s", "the loop", 25.0, 8.0, "at least 7.5", True)
    program = f"print({json.dumps(json.dumps(row._asdict()))})"
    original = subprocess.Popen

    def popen(words: list[str], **kwargs: Any) -> Any:
        assert words[1:] == ["-m", "dt_lens_benchmarks", "start_up", "--quick"]
        return original([sys.executable, "-c", program], **kwargs)

    monkeypatch.setattr(module.subprocess, "Popen", popen)
    module.bench(["start_up"], quick=True, out=tmp_path / "table.md")
    line = next(line for line in capsys.readouterr().out.splitlines() if "the loop" in line)
    assert line.split() == [
        "start_up",
        "steps",
        "200.0",
        "steps/s",
        "the",
        "loop",
        "25.000",
        "8.000",
        "at",
        "least",
        "7.5",
        "yes",
    ]
    written = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| start_up | steps | 200 | steps/s | the loop | 25 | 8 | at least 7.5 | yes |  |" in written


def test_mistakes_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DtLensError, match=r"no subject 'startup'.*start_up"):
        module.bench(["startup"])
    with pytest.raises(DtLensError, match=r"a .csv or .md file is written there"):
        module.bench(["start_up"], out=tmp_path / "table.txt")
    original = subprocess.Popen
    monkeypatch.setattr(
        module.subprocess,
        "Popen",
        lambda words, **kwargs: original([sys.executable, "-c", "raise SystemExit(3)"], **kwargs),
    )
    with pytest.raises(DtLensError, match="start_up failed with status 3"):
        module.bench(["start_up"])


def test_what_was_measured_before_a_failure_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row("steps", 200.0, "steps/s", "the loop", 25.0, 8.0)
    program = f"print({json.dumps(json.dumps(row._asdict()))}); raise SystemExit(3)"
    original = subprocess.Popen
    monkeypatch.setattr(
        module.subprocess, "Popen", lambda words, **kwargs: original([sys.executable, "-c", program], **kwargs)
    )
    with pytest.raises(DtLensError, match="failed with status 3"):
        module.bench(["start_up"], out=tmp_path / "table.csv")
    assert "the loop" in capsys.readouterr().out and "the loop" in (tmp_path / "table.csv").read_text(encoding="utf-8")
