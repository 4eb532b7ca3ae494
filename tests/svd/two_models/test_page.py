"""What a comparison shows: figures, the page, and the notebook's view."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import dt_lens
from dt_lens import DtLensError
from dt_lens.svd.two_models import ModelChanges, write_page
from dt_lens.svd.two_models.figures import angle_heatmap, change_heatmap, spectra_shift

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def comparison(make_dt: Make) -> Any:
    a, b = make_dt(0), make_dt(0)
    b.weights["blocks.1.mlp.W_out"].add_(torch.randn(24, 16))
    b.weights["blocks.0.attn.W_O"][1].mul_(1.5)
    return dt_lens.compare(a, b, k=3, names=("before", "<after>"))


def test_changes_stand_by_layer_and_kind(comparison: Any) -> None:
    figure = comparison.plot()
    (heat,) = figure.data
    kinds = [re.sub("<br>.*", "", text) for text in figure.layout.xaxis.ticktext]
    assert kinds == ["W_Q", "W_K", "W_V", "W_O", "QK", "OV", "W_in", "W_out"]
    table = comparison.table
    grid = np.asarray(heat.z, dtype=float)
    for layer in (0, 1):
        for j, kind in enumerate(kinds):
            wanted = table[(table["layer"] == layer) & (table["kind"] == kind)]["relative_change"].max()
            assert grid[layer, j] == pytest.approx(wanted)
    # Of the heads the one that changed most, by name.
    assert "blocks.0.attn.OV.1" in heat.customdata[0][kinds.index("OV")]
    assert "largest of 2 heads" in heat.customdata[0][kinds.index("OV")]
    assert heat.text[1][kinds.index("W_in")] == "0"
    other = change_heatmap(table, value="spectrum_change")
    assert other.data[0].z.max() == pytest.approx(table["spectrum_change"].max())


def test_angles_are_of_the_residual_stream(comparison: Any) -> None:
    figure = comparison.plot("angles")
    names = [text.replace("<br>", " ") for text in figure.layout.xaxis.ticktext]
    assert "W_out write" in names and "QK query" in names and not any("neuron" in name for name in names)
    value = comparison.table.set_index("matrix").loc["blocks.1.mlp.W_out", "right_angle"]
    assert figure.data[0].z[1][names.index("W_out write")] == pytest.approx(value)
    assert "random subspaces" in figure.data[0].customdata[1][names.index("W_out write")]


def test_spectra_that_moved_are_drawn_most_first(comparison: Any) -> None:
    figure = comparison.plot("spectra")
    moved = comparison.table[comparison.table["spectrum_change"] > 1e-9]
    assert {line.name for line in figure.data} == set(moved["matrix"])
    first = figure.data[0]
    before, after, _ = comparison.spectra[first.name]
    np.testing.assert_allclose(first.y, (after - before) / before[0])
    assert "&lt;after&gt;" in figure.layout.title.subtitle.text or "&amp;lt;after" in figure.layout.title.subtitle.text
    assert len(comparison.plot("spectra", n=1).data) == 1


def test_nothing_to_draw_is_said(make_dt: Make) -> None:
    model = make_dt()
    same = dt_lens.compare(model, copy.deepcopy(model))
    assert "No singular value differs" in str(same.plot("spectra").layout.annotations)
    assert np.nanmax(same.plot("change").data[0].z) == 0
    empty = same.table.head(0)
    assert "No matrix" in str(change_heatmap(empty).layout.annotations)
    assert angle_heatmap(empty).layout.annotations and spectra_shift({}).layout.annotations
    with pytest.raises(DtLensError, match="relative_change"):
        change_heatmap(same.table.drop(columns="relative_change"))


def test_the_page_holds_what_changed(comparison: Any, tmp_path: Any) -> None:
    assert isinstance(comparison, ModelChanges)
    page = write_page(comparison, tmp_path / "out", "dt-lens compare a b").read_text()
    assert "<after>" not in page.split("<script")[0]
    assert "matrices differ between before and &lt;after&gt;; most of all blocks.1.mlp.W_out" in page
    assert "Two random subspaces of the same sizes" in page and "dt-lens compare a b" in page
    assert "action_out" in page and "nearest to the leading directions of the change" in page
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert list(table["matrix"]) == list(comparison.table["matrix"])
    assert table["relative_change"].max() == pytest.approx(comparison.table["relative_change"].max())


def test_the_notebook_shows_what_changed_most(comparison: Any) -> None:
    shown = comparison._repr_html_()
    assert shown.index("blocks.1.mlp.W_out") < shown.index("blocks.0.attn.W_O")
    assert "&lt;after&gt;" in shown and "<after>" not in shown
    assert repr(comparison).splitlines()[1].startswith("  blocks.1.mlp.W_out  ")


def test_a_page_of_two_equal_models(make_dt: Make, tmp_path: Any) -> None:
    model = make_dt()
    page = write_page(dt_lens.compare(model, model, "*.W_in"), tmp_path).read_text()
    assert "have the same weights in all 2 matrices" in page


def test_a_folder_that_cannot_be_written(comparison: Any, tmp_path: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DtLensError, match="cannot be written"):
        write_page(comparison, tmp_path / "file" / "out")


@pytest.mark.parametrize(("size", "said"), [(0.0, "hold the same numbers"), (1e-10, "float32 rounding"), (1e-3, "")])
def test_a_change_below_rounding_is_not_called_none(make_dt: Make, tmp_path: Any, size: float, said: str) -> None:
    a, b = make_dt(0), make_dt(0)
    changes = dt_lens.compare(a, b, k=3)
    if size:
        changes.table.loc[changes.table.index[1], "relative_change"] = size
        changes.table.loc[changes.table.index[2], "relative_change"] = size / 2
    page = write_page(changes, tmp_path).read_text(encoding="utf-8").partition("<main>")[2]
    words = page.partition("application/json")[0]
    assert said in words and ("the same numbers" in words) == (size == 0.0)
    if size == 1e-10:
        assert "the largest relative difference is 1e-10, of " + changes.table["matrix"].iloc[1] in words
