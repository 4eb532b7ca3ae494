"""Figures of singular values show what they are given and refuse what they cannot draw."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from dt_lens.errors import DtLensError
from dt_lens.report import spectra
from dt_lens.report.style import BASELINE


def lines(figure: go.Figure) -> list[go.Scatter]:
    return [trace for trace in figure.data if trace.mode == "lines" and trace.x[0] is not None]


def test_spectrum_sorts_scales_and_cuts_at_the_rank() -> None:
    figure = spectra.spectrum({"blocks.0.attn.OV.0": [0.5, 2.0, 1e-9, 1.0], "blocks.0.mlp.W_in": [3.0, 1.0]})
    circuit, mlp = lines(figure)
    np.testing.assert_allclose(circuit.y, [1.0, 0.5, 0.25])
    np.testing.assert_allclose(circuit.customdata, [2.0, 1.0, 0.5])
    np.testing.assert_allclose(mlp.y, [1.0, 1 / 3])
    ends = [trace for trace in figure.data if trace.mode == "markers"]
    assert [list(end.x) for end in ends] == [[2]], "only the circuit ends before its size"


def test_spectrum_tells_kinds_by_colour_and_layers_by_dash() -> None:
    names = ["blocks.10.mlp.W_in", "blocks.2.mlp.W_in", "blocks.2.mlp.W_out"]
    traces = lines(spectra.spectrum({name: [2.0, 1.0] for name in names}, scale="log"))
    by_name = {trace.text[0]: trace for trace in traces}
    assert by_name[names[0]].line.color == by_name[names[1]].line.color != by_name[names[2]].line.color
    assert by_name[names[1]].line.dash == by_name[names[2]].line.dash != by_name[names[0]].line.dash
    assert sum(trace.showlegend for trace in traces) == 2
    np.testing.assert_allclose(traces[0].y, [2.0, 1.0])


@pytest.mark.parametrize("values", [[1.0, -1.0], [np.nan], [[1.0, 2.0]]])
def test_spectrum_refuses_values_that_are_not_a_spectrum(values: list[float]) -> None:
    with pytest.raises(DtLensError, match=r"blocks\.0\.mlp\.W_in"):
        spectra.spectrum({"blocks.0.mlp.W_in": values})


def test_spectrum_of_nothing_and_of_a_zero_matrix() -> None:
    assert "No matrix" in spectra.spectrum({}).layout.annotations[0].text
    assert lines(spectra.spectrum({"blocks.0.mlp.W_in": [0.0, 0.0]})) == []


def test_sigma_against_cosine_has_one_point_a_direction(scan_table: pd.DataFrame) -> None:
    figure = spectra.sigma_against_cosine(scan_table)
    assert sum(len(trace.x) for trace in figure.data) == 9  # three places of three directions
    heights = np.concatenate([trace.y for trace in figure.data])
    assert heights.min() >= 0 and heights.max() == pytest.approx(0.9)
    filled = [c for trace in figure.data for c in trace.marker.color if c != "rgba(0,0,0,0)"]
    assert len(filled) == 1
    with pytest.raises(DtLensError, match="'embedding' or by 'kind'"):
        spectra.sigma_against_cosine(scan_table, colour="layer")  # type: ignore[arg-type]


def test_an_empty_scan_gives_a_figure_that_says_so(scan_table: pd.DataFrame) -> None:
    assert spectra.sigma_against_cosine(scan_table.iloc[:0]).layout.annotations[0].text == "The scan has no rows."


def test_matches_with_untrained_heads_are_grey(scan_table: pd.DataFrame) -> None:
    scan_table.attrs["untrained"] = ["action_out"]
    names = {trace.name: set(trace.marker.line.color) for trace in spectra.sigma_against_cosine(scan_table).data}
    assert names["action_out (untrained)"] == {BASELINE} and BASELINE not in names["state_in"]
    by_kind = spectra.sigma_against_cosine(scan_table, colour="kind").data
    grey = sum(colour == BASELINE for trace in by_kind for colour in trace.marker.line.color)
    assert 0 < grey == sum("action_out" in text for trace in by_kind for text in trace.customdata)
