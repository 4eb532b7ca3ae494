"""The command `top`: what it writes, and options that belong together."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dt_lens import DtLensError
from dt_lens.cli.app import app


def top(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["top", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_rows_or_a_page_by_the_name_of_the_file(saved: Path, tmp_path: Path) -> None:
    for name, start in (("rows.csv", "matrix,"), ("page.html", "<!doctype html>")):
        top(saved, "blocks.0.mlp.W_in", "state_in", "-k", 1, "--out", tmp_path / name)
        assert (tmp_path / name).read_text().lower().startswith(start)


def test_a_count_without_counts_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DtLensError, match="give --counts with it"):
        top(saved, "blocks.0.mlp.W_in", "state_in", "--at-least", 5)
    counts = tmp_path / "counts.csv"
    counts.write_text("label,count\nstate 0,1\nstate 1,9\n")
    shown = top(saved, "blocks.0.mlp.W_in", "state_in", "-k", 1, "--counts", counts)
    assert "state 0" in shown and "state 1" in shown and "state 2" not in shown
    assert "state 0" not in top(saved, "blocks.0.mlp.W_in", "state_in", "-k", 1, "--counts", counts, "--at-least", 5)
