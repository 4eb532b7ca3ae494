"""The commands ``compare`` and ``top``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dt_lens.decision_transformer.checkpoint import save_pretrained

Make = Callable[..., Any]
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def pair(make_dt: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, the same with one matrix changed, and one of another shape."""
    folder = tmp_path_factory.mktemp("models")
    before, after, other = make_dt(0), make_dt(0), make_dt(0, d_mlp=20)
    after.weights["blocks.1.mlp.W_out"].add_(0.5)
    one, two, three = (save_pretrained(m, folder / n) for m, n in ((before, "a"), (after, "b"), (other, "c")))
    return one, two, three


def test_compare_prints_what_changed_and_writes_a_report(dt_lens: Run, pair: tuple[Path, ...], tmp_path: Path) -> None:
    result = dt_lens("compare", pair[0], pair[1], "--k", "3", "--top", "4", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[2].split()[0] == "blocks.1.mlp.W_out" and "write" in lines[2] and "°" in lines[2]
    assert "1 of 20 matrices differ." in result.stdout
    assert f"The report: {tmp_path / 'comparison.html'}" in result.stdout
    assert "relative_change" in (tmp_path / "comparison.csv").read_text().splitlines()[0]
    assert '<div class="command"><pre>dt-lens compare ' in (tmp_path / "comparison.html").read_text()


def test_compare_refuses_other_shapes_in_one_sentence(dt_lens: Run, pair: tuple[Path, ...]) -> None:
    result = dt_lens("compare", pair[0], pair[2], "--matrices", "*.W_in")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "blocks.0.mlp.W_in is [16, 24] in the first model and [16, 20] in the second" in result.stderr


def test_top_takes_several_embeddings_filters_and_files(dt_lens: Run, pair: tuple[Path, ...], tmp_path: Path) -> None:
    counts = tmp_path / "counts.csv"
    counts.write_text("label,count\nstate 1,50\nstate 2,3\naction 0,10\n")
    page, rows = tmp_path / "t.html", tmp_path / "t.csv"
    words = ["top", pair[0], "blocks.*.mlp.W_in", "state_in", "action_in", "-k", "2", "--n", "3", "--ascii"]
    result = dt_lens(*words, "--counts", counts, "--at-least", "10", "--html", page, "--out", rows)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("read side") == 2 and "towards" in result.stdout
    assert "dtl-tokens" in page.read_text()
    table = pd.read_csv(rows)
    assert set(table["label"]) == {"state 1", "action 0"} and set(table["sv"]) == {0, 1}


def test_top_refuses_in_one_sentence(dt_lens: Run, pair: tuple[Path, ...], tmp_path: Path) -> None:
    for words, needed in (
        ((pair[0], "blocks.0.mlp.W_in", "state_inn"), "state_in"),
        ((pair[0], "blocks.0.mlp.W_in", "--counts", tmp_path / "none.csv"), "labels and counts"),
    ):
        result = dt_lens("top", *words)
        assert result.returncode == 2 and needed in result.stderr and "Traceback" not in result.stderr
