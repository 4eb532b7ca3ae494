"""The bundled agent: what the README says of it. What its card says is tested in tests/zoo."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import dt_lens
from dt_lens import SingularEdit, evaluate

pytestmark = pytest.mark.acceptance(minutes=2)


def test_the_edit_of_the_readme_hurts_and_goes_away() -> None:
    model = dt_lens.load("hopper")
    base = evaluate(model, episodes=8, seed=0)
    with SingularEdit(model, "blocks.0.mlp.W_in", sv=0):
        edited = evaluate(model, episodes=8, seed=0)
    assert evaluate(model, episodes=8, seed=0).to_frame().equals(base.to_frame())
    assert edited.compare(base).difference < 0


def check_report(folder: Path) -> None:
    """The report has every section, figure and edit of a study with a strong and a weak edit, and plotly.js."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    sections = re.findall(r'<section id="([^"]+)">', page)
    assert sections == ["asked", *(f"section-{n}" for n in range(1, 6)), "again"]
    assert page.count('<figure class="plot') == 8 and "<video" in page
    assert page.count("plotly.js v") == 1
    verdicts = pd.read_csv(folder / "verdicts.csv")
    assert list(verdicts["role"])[:2] == ["strong", "weak"] and set(verdicts["role"][2:]) == {"first"}
    for row in verdicts.itertuples():
        assert f"{row.matrix}" in page
        assert f"{row.verdict}" in page


def test_the_study_runs_and_reports(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dt_lens",
        "study",
        "hopper",
        "--episodes",
        "8",
        "--edits",
        "1",
        "--out",
        str(tmp_path),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith(str(tmp_path / "report.html"))
    check_report(tmp_path)
