"""Survival, effects and damage show what the tables say and refuse what they cannot draw."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from scipy.stats import spearmanr

from dt_lens.behaviour.agents.evaluation import terms_of_episodes
from dt_lens.errors import DtLensError
from dt_lens.report.style import plain
from dt_lens.study import figures

TERMS = terms_of_episodes("E-v0", 1.0, 10)


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


def test_survival_is_a_staircase_from_one_to_the_horizon() -> None:
    figure = figures.survival({"unedited": ([100, 300], [0.5, 0.25])}, baseline="unedited", horizon=1000)
    (curve,) = lines(figure)
    assert list(curve.x) == [0, 100, 100, 300, 300, 1000]
    assert list(curve.y) == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_survival_of_agents_that_never_fall() -> None:
    (curve,) = lines(figures.survival({"a": ([], [])}, horizon=1000))
    assert list(curve.x) == [0, 1000] and list(curve.y) == [1, 1]


def test_survival_pairs_edits_with_controls_and_bands_only_what_can_be_read() -> None:
    curve = ([10], [0.5], [0.3], [0.7])
    names = [f"edit {i}" for i in range(5)]
    curves = {"unedited": curve} | dict.fromkeys(names, curve) | {f"control of {n}": curve for n in names}
    controls = {n: f"control of {n}" for n in names}
    figure = figures.survival(curves, baseline="unedited", controls=controls)
    by_name = {trace.name: trace for trace in figure.data if trace.name}
    for edit, control in controls.items():
        assert by_name[edit].line.color == by_name[control].line.color
        assert by_name[edit].line.dash == "solid" and by_name[control].line.dash == "dot"
    assert sum(trace.fill == "toself" for trace in figure.data) == 1
    few = figures.survival({n: curves[n] for n in ("unedited", "edit 0", "control of edit 0")}, baseline="unedited",
                           controls={"edit 0": "control of edit 0"})  # fmt: skip
    assert sum(trace.fill == "toself" for trace in few.data) == 2


def test_survival_draws_a_shared_control_once() -> None:
    curve = ([10], [0.5])
    figure = figures.survival({"a": curve, "b": curve, "c": curve}, controls={"a": "c", "b": "c"})
    assert [trace.name for trace in figure.data] == ["a", "c", "b"]


@pytest.mark.parametrize("curve", [([1, 2], [1.0]), ([2, 1], [1.0, 0.5]), ([-1], [1.0]), ([1],), ([1], [1.0], [1.0])])
def test_survival_refuses_parts_that_do_not_fit(curve: tuple[list[float], ...]) -> None:
    with pytest.raises(DtLensError, match="survival curve 'x'"):
        figures.survival({"x": curve})


def test_survival_names_the_nearest_curve() -> None:
    with pytest.raises(DtLensError, match="Did you mean 'unedited'"):
        figures.survival({"unedited": ([1], [0.5])}, baseline="unedit")


def test_effects_put_each_control_below_its_edit_with_its_interval() -> None:
    figure = figures.effects(verdict_table(), TERMS)
    edits, controls = figure.data
    order = [0, 2, 1]  # strong ones first, else in the table's order
    np.testing.assert_allclose(edits.x, verdict_table()["difference"].to_numpy()[order])
    np.testing.assert_allclose(controls.x, verdict_table()["control_difference"].to_numpy()[order])
    assert (np.asarray(controls.y) > np.asarray(edits.y)).all()
    np.testing.assert_allclose(edits.error_x.array, 40)
    np.testing.assert_allclose(edits.error_x.arrayminus, 30)
    assert [c == "rgba(0,0,0,0)" for c in edits.marker.color] == [False, True, True]
    assert "<b>blocks.0.attn.OV.1</b> write" in figure.layout.yaxis.ticktext[2]
    assert "nan" not in "".join(figure.layout.yaxis.ticktext) + "".join(edits.customdata)


def test_effects_need_their_columns_only() -> None:
    bare = verdict_table()[[c for c in verdict_table() if "difference" in c or c in ("matrix", "sv")]]
    assert len(figures.effects(bare, TERMS).data[0].x) == 3
    with pytest.raises(DtLensError, match="'control_difference_low'"):
        figures.effects(bare.drop(columns="control_difference_low"), TERMS)


def test_damage_shows_spearman_computed_or_given() -> None:
    table = verdict_table()
    table["cosine"] = [-0.6, 0.4, 0.1]
    expected = spearmanr(table["cosine"].abs(), table["damage_beyond_control"]).statistic
    title = figures.damage_against_cosine(table, TERMS).layout.title.text
    assert f"{expected:+.2f}" in title and "3 edits" in title
    assert (
        "+0.50 [−0.10, +0.90]"
        in figures.damage_against_cosine(table, TERMS, spearman=(0.5, -0.1, 0.9)).layout.title.text
    )


def test_damage_is_a_loss_and_positive() -> None:
    figure = figures.damage_against_cosine(verdict_table(), TERMS, beyond_control=False)
    points = {float(x): float(y) for trace in figure.data for x, y in zip(trace.x, trace.y, strict=True)}
    assert points[0.6] == 2400.0
    first = next(trace for trace in figure.data if trace.name == "W_in")
    assert (first.error_y.array[0], first.error_y.arrayminus[0]) == (30, 40)


def test_damage_without_a_correlation_says_so() -> None:
    assert "Too few" in figures.damage_against_cosine(verdict_table(), TERMS).layout.title.text  # one cosine is missing


def test_an_empty_table_gives_a_figure_that_says_so() -> None:
    verdicts = verdict_table().iloc[:0]
    made = [figures.survival({}), figures.effects(verdicts, TERMS), figures.damage_against_cosine(verdicts, TERMS)]
    assert all(figure.layout.annotations[0].text for figure in made)


def test_names_from_data_stay_words() -> None:
    assert plain("<b>thigh</b>") in figures.effects(verdict_table(), TERMS).layout.yaxis.ticktext[2]


def test_edits_of_one_direction_are_told_apart() -> None:
    """By what each does; those that do the same, by their number."""
    row = verdict_table().iloc[:1]
    table = pd.concat([row] * 4, ignore_index=True)
    table["change"] = [
        "sigma is multiplied by 0",
        "sigma is multiplied by 2",
        *["the singular vector becomes 'flip'"] * 2,
    ]
    labels = figures.effects(table, TERMS).layout.yaxis.ticktext
    assert len(set(labels)) == 4 and labels[1].endswith("multiplied by 2") and labels[3].endswith("'flip' · edit 4")
    one, *_ = figures.effects(verdict_table().assign(change="x"), TERMS).layout.yaxis.ticktext
    assert not one.endswith("x"), "only where it is needed"
