"""The page of a search for a steering direction: its form, and that its numbers are those of the files."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dt_lens.study.steering.doses import (
    Candidate,
)
from dt_lens.study.steering.steering import steer


def shown_rows(page: str, section: int) -> list[dict[str, str]]:
    """The exact values of the first table of a section, by heading."""
    part = page.partition(f'<section id="section-{section}">')[2].partition("</table>")[0].partition("<tbody>")[2]
    cells = re.compile(r'data-head="([^"]*)" data-value="([^"]*)"')
    return [dict(cells.findall(row)) for row in part.split("<tr>")[1:]]


def figure_of(page: str, number: int) -> dict[str, Any]:
    found = re.search(rf'<script type="application/json" id="figure-{number}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def packed(values: dict[str, str]) -> list[float]:
    """Numbers of a figure, which plotly packs."""
    return [float(one) for one in np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])]


def test_the_page_answers_first_and_its_numbers_are_the_files(
    agent: Any, planted: Candidate, answering: Any, tmp_path: Path
) -> None:
    answering(lambda name, sv, dose: (40 * (dose - 1) * ((name, sv) == (planted.matrix, planted.sv)), 0.0))
    steer(agent, tmp_path, episodes=40, choosing=8, candidates=6, command="dt-lens steer it")
    page = (tmp_path / "steering.html").read_text(encoding="utf-8")
    kept, doses = json.loads((tmp_path / "steering.json").read_text()), pd.read_csv(tmp_path / "steering.csv")
    header = page.partition("</header>")[0]
    said = re.findall(r"<p>(.*?)</p>", header.partition('<div class="verdict">')[2].partition("</div>")[0])
    assert 1 <= len(said) <= 3 and said[0].startswith("<strong>Found</strong>") and 'class="picture"' in header
    low, high = doses["mean"].iloc[0], doses["mean"].iloc[-1]
    assert f"from {low:,.0f} to {high:,.0f}" in said[0]
    ends = kept["reach_interval"]
    assert f"{100 * kept['reach']:+.0f} % [{100 * ends[0]:+.0f} %, {100 * ends[1]:+.0f} %]" in said[0]
    assert f"<strong>{kept['read_as_far']} of {kept['random_directions']}</strong>" in said[2]
    names = re.findall(r"<h2>(.*?)</h2>", page)
    assert names[0] == "What was asked" and names[-1] == "To make this page again"
    order = [
        page.index(part) for part in ('class="verdict"', "What was asked</h2>", "What a dose does</h2>", "<pre>dt")
    ]
    assert order == sorted(order) and "<summary>What the words on this page mean</summary>" in page
    rows = shown_rows(page, 1)
    assert [float(row["dose"]) for row in rows] == doses["dose"].tolist()
    assert [float(row["mean return"]) for row in rows] == pytest.approx(doses["mean"].tolist(), rel=1e-12)
    chosen = {(row["matrix"], float(row["sv"])): float(row["slope"]) for row in shown_rows(page, 3)}
    assert chosen == {(row["matrix"], row["sv"]): pytest.approx(row["slope"]) for row in kept["choosing"]}
    drawn = figure_of(page, 1)
    assert (
        packed(drawn["data"][0]["y"]) == pytest.approx(doses["mean"].tolist(), rel=1e-12)
        and "n = 40 " in drawn["about"]
    )
    assert "mean return" in drawn["layout"]["yaxis"]["title"]["text"]
    panels = figure_of(page, 2)
    assert packed(panels["data"][0]["y"]) == pytest.approx([row["mean"] for row in kept["curve"]], rel=1e-12)
    assert len([shape for shape in panels["layout"]["shapes"] if shape["type"] == "rect"]) == 1, "the curve's range"
    assert "n = 8 episodes a point" in figure_of(page, 3)["about"]


def test_a_page_without_a_curve_to_move_along(agent: Any, answering: Any, few_random: None, tmp_path: Path) -> None:
    answering(lambda *_: (0.0, 0.0), obeys=0.0)
    result = steer(agent, tmp_path, episodes=40, choosing=8, candidates=6)
    assert result.verdict == "not applicable"
    page = (tmp_path / "steering.html").read_text(encoding="utf-8")
    assert result.sentence.split(" (")[0] in page and figure_of(page, 1)["title"] == "The unedited model, by target"
    assert packed(figure_of(page, 1)["data"][0]["y"]) == pytest.approx(result.curve["mean"].tolist())
