"""Figures of factors: each number at its place, each mark where q says so, and no figure of what is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

import dt_lens
from dt_lens.errors import DtLensError
from dt_lens.report.factors import grid_panels
from dt_lens.svd.factor_plots import plot_factors, plot_grid

FACTORS = {"row": [0, 0, 1, 1] * 2, "column": [0, 1] * 4, "passenger": ["R"] * 4 + ["in taxi"] * 4}


@pytest.fixture(scope="module")
def svd(make_dt: Any) -> dt_lens.WeightSVD:
    return dt_lens.WeightSVD(make_dt(0, n_layers=1, state_dim=8))


def test_each_state_is_at_its_place(svd: dt_lens.WeightSVD) -> None:
    figure = plot_grid(svd, "blocks.0.mlp.W_in", 1, factors=FACTORS)
    cosines = svd.cosines("blocks.0.mlp.W_in", "state_in", None, 2).iloc[1].to_numpy()
    first, second = (np.array(trace.z, dtype=float) for trace in figure.data)
    np.testing.assert_allclose(first, cosines[:4].reshape(2, 2))
    np.testing.assert_allclose(second, cosines[4:].reshape(2, 2))
    assert [title.text for title in figure.layout.annotations] == ["passenger R", "passenger in taxi"]
    assert all(axis.autorange == "reversed" for axis in figure.select_yaxes())  # row 0 on top
    assert figure.layout.coloraxis.cmax == pytest.approx(np.abs(cosines).max())


def test_a_view_by_cell(svd: dt_lens.WeightSVD) -> None:
    """Of MiniGrid's (x, y), y runs down; what has no cell is left out."""
    cells = ["(0, 0)", "(1, 0)", "(0, 1)", "(1, 1)", "(0, 0)", "(1, 0)", None, None]
    factors = {"object": ["wall"] * 4 + [None] * 4, "colour": [None] * 4 + ["red"] * 2 + [None] * 2, "cell": cells}
    figure = plot_grid(svd, "blocks.0.mlp.W_in", factors=factors)
    cosines = svd.cosines("blocks.0.mlp.W_in", "state_in", None, 1).iloc[0].to_numpy()
    assert [title.text.strip() for title in figure.layout.annotations] == ["object wall", "colour red"]
    np.testing.assert_allclose(np.array(figure.data[0].z, dtype=float), [cosines[:2], cosines[2:4]])
    assert np.isnan(np.array(figure.data[1].z, dtype=float)[1]).all()


def test_three_factors_are_joined_and_what_a_place_decides_is_none(svd: dt_lens.WeightSVD) -> None:
    tile = ["start", "hole", "frozen", "goal"] * 2
    figure = plot_grid(svd, "blocks.0.mlp.W_in", factors={**FACTORS, "tile": tile})
    assert len(figure.data) == 2
    more = {"destination": ["G", "B"] * 4, "hour": [1, 1, 2, 2, 3, 3, 4, 4], "day": list("abcdefgh")}
    assert 2 < len(plot_grid(svd, "blocks.0.mlp.W_in", factors=FACTORS | more).data) <= 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "does not say what the labels of state_in consist of"),
        ({"factors": {"row": [0] * 8}}, "factors are row; a grid needs row and column"),
        ({"factors": {"row": [0], "column": [1]}}, "'row' has 1 levels; state_in has 8 labels"),
        ({"factors": FACTORS | {"tile": [[1]] * 8}}, "'tile' has the level \\[1\\]; a level must be text"),
        ({"factors": [1]}, "must be a dictionary of levels by factor"),
        ({"factors": FACTORS, "sv": 99}, "none with sv=99"),
        ({"factors": FACTORS, "limit": -1}, "limit is -1"),
    ],
)
def test_what_cannot_be_drawn(svd: dt_lens.WeightSVD, given: dict[str, Any], message: str) -> None:
    with pytest.raises(DtLensError, match=message):
        plot_grid(svd, "blocks.0.mlp.W_in", **given)


def test_too_many_panels(svd: dt_lens.WeightSVD, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dt_lens.svd.factor_plots.PANELS", 1)
    with pytest.raises(DtLensError, match="make 2 panels"):
        plot_grid(svd, "blocks.0.mlp.W_in", factors=FACTORS)


def test_rows_of_several_types_are_numbers_before_text(svd: dt_lens.WeightSVD) -> None:
    given = {"row": [10, 10, 9, 9, "b", "b", "a", "a"], "column": [0, 1] * 4}
    figure = plot_grid(svd, "blocks.0.mlp.W_in", factors=given)
    assert list(figure.data[0].y) == ["9", "10", "a", "b"]
    cosines = svd.cosines("blocks.0.mlp.W_in", "state_in", None, 1).iloc[0].to_numpy()
    np.testing.assert_allclose(np.array(figure.data[0].z, dtype=float), cosines.reshape(4, 2)[[1, 0, 3, 2]])


def test_many_panels_of_one_factor_take_several_lines() -> None:
    figure = grid_panels(
        np.arange(10.0), [0] * 10, [0] * 10, {"x": list(range(10))}, labels=list("abcdefghij"), title="t"
    )
    assert len(figure.data) == 10 and {trace.yaxis for trace in figure.data} == {"y", *(f"y{i}" for i in range(2, 11))}


def test_a_dot_where_a_direction_sorts(svd: dt_lens.WeightSVD) -> None:
    labels = list(svd.registry["state_in"].labels)
    halves = pd.DataFrame({"half": list("aabbaabb"), "third": list("abcabcab")}, index=labels)
    table = dt_lens.clusters(svd.model, halves, matrices="*.W_in", embeddings="state_in", draws=99, beside=False)
    table.loc[table.index[0], "q_value"] = 0.01
    figure = plot_factors(table)
    text, z = figure.data[0].text, np.array(figure.data[0].z, dtype=float)
    column = ["half", "third"].index(table["factor"].iloc[0])
    assert text[0][column] == "●" and sum(cell == "●" for row in text for cell in row) == int(
        (table["q_value"] <= 0.05).sum()
    )
    np.testing.assert_allclose(10 ** -z[:, 1], table["p_third"])
    few = plot_factors(table, most=2)
    kept = sorted(table["p_value"].sort_values(kind="stable").index[:2])
    assert len(few.data[0].z) == 2
    np.testing.assert_allclose(10 ** -np.array(few.data[0].z, dtype=float)[:, 0], table.loc[kept, "p_half"])
    joined = pd.concat([table, table.assign(matrix="other")])  # two tables share the numbers of their rows
    assert len(plot_factors(joined, most=3).data[0].z) == 3
    with pytest.raises(DtLensError, match="no column 'factor'; give the table of clusters"):
        plot_factors(svd.scan("*.W_in", embeddings="action_out"))
