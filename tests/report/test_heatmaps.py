"""Heatmaps show what the tables say and refuse what they cannot draw."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dt_lens.errors import DtLensError
from dt_lens.report import heatmaps


def test_heatmap_is_symmetric_about_zero_and_keeps_the_largest_sigma_on_top() -> None:
    cosines = pd.DataFrame([[0.1, -0.7], [0.3, 0.2]], columns=["rootz", "thigh"])
    figure = heatmaps.scan_heatmap(cosines, sigma=[2.0, 1.0], matrix="m", embedding="e")
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax == pytest.approx(-0.7)
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
    assert list(figure.layout.xaxis.ticktext) == ["rootz", "thigh"]
    assert "σ 2" in figure.layout.yaxis.ticktext[0]
    np.testing.assert_array_equal(figure.data[0].z, cosines.to_numpy())
    assert heatmaps.scan_heatmap(cosines, limit=1.0).layout.coloraxis.cmax == 1.0


def test_heatmap_marks_cells_and_the_best_cell_of_a_direction() -> None:
    cosines = pd.DataFrame([[0.1, -0.7], [0.3, 0.2]], columns=["a", "b"])
    whole = heatmaps.scan_heatmap(cosines, q_values=pd.DataFrame([[0.9, 0.01], [0.9, 0.04]]))
    assert (whole.data[0].text == np.array([["", "●"], ["", "●"]])).all()
    best = heatmaps.scan_heatmap(cosines, q_values=pd.DataFrame([0.01, 0.5]))
    assert (best.data[0].text == np.array([["", "●"], ["", ""]])).all()
    assert "1 of 2 directions" in best.layout.title.subtitle.text


def test_heatmap_refuses_parts_that_do_not_fit() -> None:
    cosines = pd.DataFrame([[0.1, -0.7], [0.3, 0.2]])
    with pytest.raises(DtLensError, match="q values"):
        heatmaps.scan_heatmap(cosines, q_values=pd.DataFrame([[0.1, 0.2, 0.3]]))
    with pytest.raises(DtLensError, match="sigmas"):
        heatmaps.scan_heatmap(cosines, sigma=[1.0])


def test_heatmap_grows_with_its_rows() -> None:
    def height(rows: int) -> float:
        return float(heatmaps.scan_heatmap(pd.DataFrame(np.zeros((rows, 3)))).layout.height)

    assert height(10) < height(40) < height(128) < 2000


def test_overview_takes_the_best_absolute_cosine_and_the_smallest_q(scan_table: pd.DataFrame) -> None:
    figure = heatmaps.scan_overview(scan_table)
    heat = figure.data[0]
    places = list(figure.layout.yaxis.ticktext)
    assert places == ["blocks.2.attn.QK.1 · key", "blocks.2.attn.QK.1 · query", "blocks.10.mlp.W_in"]
    assert heat.z[2][0] == pytest.approx(0.9)
    assert heat.text[2][0] == "<b>0.90*</b>" and "*" not in heat.text[0][0]
    assert "sv 1" in heat.customdata[2][0] and "-0.900" in heat.customdata[2][0]
    assert "1 of 3" in heat.customdata[2][0], "one of the three directions is significant"


def test_overview_leaves_what_was_not_compared_empty(scan_table: pd.DataFrame) -> None:
    table = scan_table
    table = table[~((table["embedding"] == "action_out") & (table["side"] == "read"))]
    assert np.isnan(heatmaps.scan_overview(table).data[0].z[2][1])


def test_overview_by_z_needs_z(scan_table: pd.DataFrame) -> None:
    assert heatmaps.scan_overview(scan_table, value="z").data[0].z.max() == pytest.approx(scan_table["z"].max())
    with pytest.raises(DtLensError, match="column 'z'"):
        heatmaps.scan_overview(scan_table.drop(columns="z"), value="z")


def test_a_missing_column_is_named_with_its_nearest(scan_table: pd.DataFrame) -> None:
    with pytest.raises(DtLensError, match=r"'q_value'.*Did you mean 'q_valu'"):
        heatmaps.scan_overview(scan_table.rename(columns={"q_value": "q_valu"}))


def test_an_empty_table_gives_a_figure_that_says_so(scan_table: pd.DataFrame) -> None:
    made = [heatmaps.scan_overview(scan_table.iloc[:0]), heatmaps.scan_heatmap(pd.DataFrame())]
    said = [figure.layout.annotations[0].text for figure in made]
    assert said == ["The scan has no rows.", "There are no directions to compare."]


def test_names_from_data_stay_words() -> None:
    hostile = '<a href="x">'
    heat = heatmaps.scan_heatmap(pd.DataFrame([[0.1]], columns=[hostile]), matrix=hostile)
    assert hostile not in heat.to_json().replace('\\"', '"')


def test_untrained_heads_are_grey(scan_table: pd.DataFrame) -> None:
    coloured = heatmaps.scan_overview(scan_table)
    assert len(coloured.data) == 1 and "grey" not in coloured.layout.title.subtitle.text
    scan_table.attrs["untrained"] = ["action_out"]
    figure = heatmaps.scan_overview(scan_table)
    ordinary, grey = figure.data
    assert np.isnan(ordinary.z[:, 1]).all() and np.isnan(grey.z[:, 0]).all()
    np.testing.assert_array_equal(grey.z[:, 1], coloured.data[0].z[:, 1])
    assert grey.coloraxis == "coloraxis2" and "128,136,144" in str(figure.layout.coloraxis2.colorscale)
    assert "grey: untrained heads" in figure.layout.title.subtitle.text
    one = heatmaps.scan_heatmap(pd.DataFrame([[0.1, -0.4]], columns=["a", "b"]), trained=False)
    assert "128,136,144" in str(one.layout.coloraxis.colorscale) and "untrained head" in one.layout.title.subtitle.text
