"""The figures show what the tables say, survive what tables may hold, and refuse what they cannot draw."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from scipy.stats import spearmanr

from dt_lens.errors import DtLensError
from dt_lens.report import heatmaps, spectra, style
from dt_lens.report.style import plain
from dt_lens.study import figures as outcomes


def scan_table() -> pd.DataFrame:
    rows = []
    random = np.random.default_rng(0)
    for matrix, sides in (("blocks.10.mlp.W_in", ["read"]), ("blocks.2.attn.QK.1", ["query", "key"])):
        for side in sides:
            for embedding in ("state_in", "action_out"):
                for sv in range(3):
                    cosine = float(random.uniform(-0.3, 0.3))
                    rows.append(
                        {"matrix": matrix, "side": side, "sv": sv, "sigma": 3.0 - sv, "embedding": embedding,
                         "label": "rootz", "cosine": cosine, "z": abs(cosine) * 10, "q_value": 0.5, "extra": None}
                    )  # fmt: skip
    table = pd.DataFrame(rows)
    table.loc[1, ["cosine", "q_value"]] = [-0.9, 0.01]  # blocks.10.mlp.W_in, state_in, sv 1
    return table


def verdict_table() -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "matrix": ["blocks.0.mlp.W_in", "blocks.0.attn.OV.1", "blocks.1.mlp.W_out"],
            "sv": [0, 3, 20],
            "side": ["read", "write", None],
            "embedding": ["state_in", "action_out", None],
            "label": ["rootz", "<b>thigh</b>", None],
            "cosine": [-0.6, 0.4, np.nan],
            "role": ["strong", "weak", "strong"],
            "difference": [-2400.0, -10.0, 5.0],
            "control_difference": [-20.0, 0.0, 1.0],
            "damage_beyond_control": [2380.0, 10.0, -4.0],
            "beyond_low": [2200.0, -30.0, -20.0],
            "beyond_high": [2500.0, 50.0, 10.0],
            "q": [0.0001, 0.7, np.nan],
            "failure_rate": [1.0, 0.0, 0.0],
            "verdict": ["hurts more than its control", "no more", None],
        }
    )
    for prefix in ("", "control_"):
        table[prefix + "difference_low"] = table[prefix + "difference"] - 30
        table[prefix + "difference_high"] = table[prefix + "difference"] + 40
    return table


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
def test_spectrum_refuses_what_is_no_spectrum(values: list[float]) -> None:
    with pytest.raises(DtLensError, match=r"blocks\.0\.mlp\.W_in"):
        spectra.spectrum({"blocks.0.mlp.W_in": values})


def test_spectrum_of_nothing_and_of_a_zero_matrix() -> None:
    assert "No matrix" in spectra.spectrum({}).layout.annotations[0].text
    assert lines(spectra.spectrum({"blocks.0.mlp.W_in": [0.0, 0.0]})) == []


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


def test_overview_takes_the_best_absolute_cosine_and_the_smallest_q() -> None:
    figure = heatmaps.scan_overview(scan_table())
    heat = figure.data[0]
    places = list(figure.layout.yaxis.ticktext)
    assert places == ["blocks.2.attn.QK.1 · key", "blocks.2.attn.QK.1 · query", "blocks.10.mlp.W_in"]
    assert heat.z[2][0] == pytest.approx(0.9)
    assert heat.text[2][0] == "<b>0.90*</b>" and "*" not in heat.text[0][0]
    assert "sv 1" in heat.customdata[2][0] and "-0.900" in heat.customdata[2][0]
    assert "1 of 3" in heat.customdata[2][0], "one of the three directions is significant"


def test_overview_leaves_what_was_not_compared_empty() -> None:
    table = scan_table()
    table = table[~((table["embedding"] == "action_out") & (table["side"] == "read"))]
    assert np.isnan(heatmaps.scan_overview(table).data[0].z[2][1])


def test_overview_by_z_needs_z() -> None:
    assert heatmaps.scan_overview(scan_table(), value="z").data[0].z.max() == pytest.approx(scan_table()["z"].max())
    with pytest.raises(DtLensError, match="column 'z'"):
        heatmaps.scan_overview(scan_table().drop(columns="z"), value="z")


def test_sigma_against_cosine_has_one_point_a_direction() -> None:
    figure = spectra.sigma_against_cosine(scan_table())
    assert sum(len(trace.x) for trace in figure.data) == 9  # three places of three directions
    heights = np.concatenate([trace.y for trace in figure.data])
    assert heights.min() >= 0 and heights.max() == pytest.approx(0.9)
    filled = [c for trace in figure.data for c in trace.marker.color if c != "rgba(0,0,0,0)"]
    assert len(filled) == 1
    with pytest.raises(DtLensError, match="'embedding' or by 'kind'"):
        spectra.sigma_against_cosine(scan_table(), colour="layer")  # type: ignore[arg-type]


def test_survival_is_a_staircase_from_one_to_the_horizon() -> None:
    figure = outcomes.survival({"unedited": ([100, 300], [0.5, 0.25])}, baseline="unedited", horizon=1000)
    (curve,) = lines(figure)
    assert list(curve.x) == [0, 100, 100, 300, 300, 1000]
    assert list(curve.y) == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_survival_of_agents_that_never_fall() -> None:
    (curve,) = lines(outcomes.survival({"a": ([], [])}, horizon=1000))
    assert list(curve.x) == [0, 1000] and list(curve.y) == [1, 1]


def test_survival_pairs_edits_with_controls_and_bands_only_what_can_be_read() -> None:
    curve = ([10], [0.5], [0.3], [0.7])
    names = [f"edit {i}" for i in range(5)]
    curves = {"unedited": curve} | dict.fromkeys(names, curve) | {f"control of {n}": curve for n in names}
    controls = {n: f"control of {n}" for n in names}
    figure = outcomes.survival(curves, baseline="unedited", controls=controls)
    by_name = {trace.name: trace for trace in figure.data if trace.name}
    for edit, control in controls.items():
        assert by_name[edit].line.color == by_name[control].line.color
        assert by_name[edit].line.dash == "solid" and by_name[control].line.dash == "dot"
    assert sum(trace.fill == "toself" for trace in figure.data) == 1
    few = outcomes.survival({n: curves[n] for n in ("unedited", "edit 0", "control of edit 0")}, baseline="unedited",
                           controls={"edit 0": "control of edit 0"})  # fmt: skip
    assert sum(trace.fill == "toself" for trace in few.data) == 2


def test_survival_draws_a_shared_control_once() -> None:
    curve = ([10], [0.5])
    figure = outcomes.survival({"a": curve, "b": curve, "c": curve}, controls={"a": "c", "b": "c"})
    assert [trace.name for trace in figure.data] == ["a", "c", "b"]


@pytest.mark.parametrize("curve", [([1, 2], [1.0]), ([2, 1], [1.0, 0.5]), ([-1], [1.0]), ([1],), ([1], [1.0], [1.0])])
def test_survival_refuses_parts_that_do_not_fit(curve: tuple[list[float], ...]) -> None:
    with pytest.raises(DtLensError, match="survival curve 'x'"):
        outcomes.survival({"x": curve})


def test_survival_names_the_nearest_curve() -> None:
    with pytest.raises(DtLensError, match="Did you mean 'unedited'"):
        outcomes.survival({"unedited": ([1], [0.5])}, baseline="unedit")


def test_effects_put_each_control_below_its_edit_with_its_interval() -> None:
    figure = outcomes.effects(verdict_table())
    edits, controls = figure.data
    order = [0, 2, 1]  # strong ones first, else in the table's order
    np.testing.assert_allclose(edits.x, verdict_table()["difference"].to_numpy()[order])
    np.testing.assert_allclose(controls.x, verdict_table()["control_difference"].to_numpy()[order])
    assert (controls.y > edits.y).all()
    np.testing.assert_allclose(edits.error_x.array, 40)
    np.testing.assert_allclose(edits.error_x.arrayminus, 30)
    assert [c == "rgba(0,0,0,0)" for c in edits.marker.color] == [False, True, True]
    assert "<b>blocks.0.attn.OV.1</b> write" in figure.layout.yaxis.ticktext[2]
    assert "nan" not in "".join(figure.layout.yaxis.ticktext) + "".join(edits.customdata)


def test_effects_need_their_columns_only() -> None:
    bare = verdict_table()[[c for c in verdict_table() if "difference" in c or c in ("matrix", "sv")]]
    assert len(outcomes.effects(bare).data[0].x) == 3
    with pytest.raises(DtLensError, match="'control_difference_low'"):
        outcomes.effects(bare.drop(columns="control_difference_low"))


def test_damage_shows_spearman_computed_or_given() -> None:
    table = verdict_table()
    table["cosine"] = [-0.6, 0.4, 0.1]
    expected = spearmanr(table["cosine"].abs(), table["damage_beyond_control"]).statistic
    title = outcomes.damage_against_cosine(table).layout.title.text
    assert f"{expected:+.2f}" in title and "3 edits" in title
    assert "+0.50 [−0.10, +0.90]" in outcomes.damage_against_cosine(table, spearman=(0.5, -0.1, 0.9)).layout.title.text


def test_damage_is_a_loss_and_positive() -> None:
    figure = outcomes.damage_against_cosine(verdict_table(), beyond_control=False)
    points = {float(x): float(y) for trace in figure.data for x, y in zip(trace.x, trace.y, strict=True)}
    assert points[0.6] == 2400.0
    first = next(trace for trace in figure.data if trace.name == "W_in")
    assert (first.error_y.array[0], first.error_y.arrayminus[0]) == (30, 40)


def test_damage_without_a_correlation_says_so() -> None:
    assert "Too few" in outcomes.damage_against_cosine(verdict_table()).layout.title.text  # one cosine is missing


def test_empty_tables_give_a_figure_that_says_so() -> None:
    scan, verdicts = scan_table().iloc[:0], verdict_table().iloc[:0]
    made = [
        heatmaps.scan_overview(scan),
        spectra.sigma_against_cosine(scan),
        heatmaps.scan_heatmap(pd.DataFrame()),
        outcomes.survival({}),
        outcomes.effects(verdicts),
        outcomes.damage_against_cosine(verdicts),
    ]
    assert all(figure.layout.annotations[0].text for figure in made)


def test_a_missing_column_is_named_with_its_nearest() -> None:
    with pytest.raises(DtLensError, match=r"'q_value'.*Did you mean 'q_valu'"):
        heatmaps.scan_overview(scan_table().rename(columns={"q_value": "q_valu"}))


def test_names_from_data_stay_words() -> None:
    figure = outcomes.effects(verdict_table())
    assert plain("<b>thigh</b>") in figure.layout.yaxis.ticktext[2]
    hostile = '<a href="x">'
    heat = heatmaps.scan_heatmap(pd.DataFrame([[0.1]], columns=[hostile]), matrix=hostile)
    assert hostile not in heat.to_json().replace('\\"', '"')


def test_light_and_dark_differ_only_in_colours() -> None:
    light, dark = style.light().to_plotly_json(), style.dark().to_plotly_json()
    assert light["layout"]["paper_bgcolor"] != dark["layout"]["paper_bgcolor"]
    assert light["layout"]["colorway"] == dark["layout"]["colorway"]
    assert light["layout"].keys() == dark["layout"].keys()
