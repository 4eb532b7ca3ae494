"""The claims about weights, on models for which the right verdict is known; and the note's fault as a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dt_lens.lens.matrices import find_matrix
from dt_lens.study.court.case import Case, Labels
from dt_lens.study.court.claims import Finding, NotApplicable, verdict_of
from dt_lens.study.court.inputs import follows_time, reward_beats_chance, smoothness
from dt_lens.study.court.matches import first_is_common, reads_states, w_in_matches_more
from dt_lens.study.court.rotation_null import best_match, compare_with_null, rotated

DRAWS = 400


def ruled(found: Finding) -> str:
    return verdict_of("weights", found, found.p_value)


def test_the_note_reads_coordinates(plain: Any, plant: Any, units: Any) -> None:
    """A direction of W_out that equals an action looks like noise if rows of V are taken for rows of V^T."""
    model = plain()
    action = units(model, "action_out")[0]
    for layer in range(3):
        plant(model, f"blocks.{layer}.mlp.W_out", action, seed=layer)
    case, matrix = Case(model, 0, DRAWS), find_matrix(model, "blocks.0.mlp.W_out")
    proper, note = (float(abs(case.vectors(matrix, way)[0] @ action)) for way in ("proper", "note"))
    assert proper == pytest.approx(1.0, abs=1e-5)
    assert note < 0.4
    means = [
        abs(case.vectors(find_matrix(model, f"blocks.{layer}.mlp.W_out"), "note")[0] @ action) for layer in range(3)
    ]
    assert np.mean(means) < 0.25
    # For W_in both ways agree.
    plant(model, "blocks.0.mlp.W_in", action)
    case, matrix = Case(model, 0, DRAWS), find_matrix(model, "blocks.0.mlp.W_in")
    assert all(abs(case.vectors(matrix, way)[0] @ action) == pytest.approx(1.0, abs=1e-5) for way in ("proper", "note"))


def test_the_fault_alone_supports_claim_1(plain: Any, plant: Any, units: Any) -> None:
    """Both matrices hold the actions equally, and yet the note's way supports claim 1."""
    model = plain()
    actions = units(model, "action_out")
    for layer in range(3):
        plant(model, f"blocks.{layer}.mlp.W_in", actions, seed=layer)
        plant(model, f"blocks.{layer}.mlp.W_out", actions, seed=layer + 7)
    case = Case(model, 0, DRAWS)
    proper, note = w_in_matches_more(case, "proper"), w_in_matches_more(case, "note")
    assert ruled(proper) == "not supported" and abs(proper.statistic) < 0.01
    assert ruled(note) == "supported" and note.statistic > 0.4


def test_claim_1(plain: Any, plant: Any, units: Any) -> None:
    model = plain()
    random = w_in_matches_more(Case(model, 0, DRAWS), "proper")
    assert ruled(random) == "not supported" and random.p_value > 0.05
    for layer in range(3):
        plant(model, f"blocks.{layer}.mlp.W_in", units(model, "action_out"), seed=layer)
    case = Case(model, 0, DRAWS)
    assert ruled(w_in_matches_more(case, "proper")) == ruled(w_in_matches_more(case, "note")) == "supported"
    for layer in range(3):  # the other way round does not support it
        plant(model, f"blocks.{layer}.mlp.W_in", np.empty((0, 64)), seed=layer)
        plant(model, f"blocks.{layer}.mlp.W_out", units(model, "action_out"), seed=layer)
    found = w_in_matches_more(Case(model, 0, DRAWS), "proper")
    assert found.statistic < -0.4 and ruled(found) == "not supported"


def test_a_control_that_matches_too_forbids_support(plain: Any, plant: Any, units: Any) -> None:
    model = plain()
    for layer in range(3):
        both = np.concatenate([units(model, "action_out"), units(model, "state_out")])
        plant(model, f"blocks.{layer}.mlp.W_in", both, seed=layer)
    assert not model.embeddings["state_out"].trained
    found = w_in_matches_more(Case(model, 0, DRAWS), "proper")
    assert found.effect > found.margin and not found.quiet and ruled(found) == "undecided"


def test_claim_2(plain: Any, plant: Any, units: Any) -> None:
    model = plain()
    actions = units(model, "action_out")
    assert ruled(first_is_common(Case(model, 0, DRAWS), "proper", 1)) == "not supported"
    for layer in range(3):
        plant(model, f"blocks.{layer}.mlp.W_in", actions[1], seed=layer)
    case = Case(model, 0, DRAWS)
    found = first_is_common(case, "proper", 1)
    assert ruled(found) == "supported" and found.numbers["best_match_in"] == 3
    assert ruled(first_is_common(case, "proper", 0)) == "not supported"  # if another action is the most common
    small = plain(d_model=8, d_mlp=16, n_layers=1)  # so few dimensions that chance matches everything
    assert ruled(first_is_common(Case(small, 3, DRAWS), "proper", 1)) == "undecided"


def test_claim_2_needs_two_actions(make_dt: Callable[..., Any]) -> None:
    model = make_dt(act_dim=1, d_model=32)
    with pytest.raises(NotApplicable, match="has only one action"):
        first_is_common(Case(model, 0, DRAWS), "proper", 0)


def test_claim_4(plain: Any, plant: Any, units: Any) -> None:
    model = plain()
    states = units(model, "state_in")
    assert ruled(reads_states(Case(model, 0, DRAWS), "proper")) == "not supported"
    plant(model, "blocks.0.mlp.W_in", states)
    half = reads_states(Case(model, 0, DRAWS), "proper")
    assert (
        half.numbers["W_in"] > 0.5 and ruled(half) != "supported" and half.p_value > 0.01
    )  # W_in alone is half of the claim
    with torch.no_grad():  # OV = W_V W_O with read directions that are the states
        made = np.einsum("k,kd,kn->dn", np.linspace(2, 1, 11), np.linalg.qr(states.T)[0].T, np.eye(64)[:11])
        model.weights["blocks.0.attn.W_V"][0] = torch.from_numpy(made)
        model.weights["blocks.0.attn.W_O"][0] = torch.linalg.qr(torch.randn(64, 64))[0]
    case = Case(model, 0, DRAWS)
    assert ruled(reads_states(case, "proper")) == "supported"
    assert reads_states(case, "note").numbers["OV"] < 0.5  # the note compares what OV writes


def test_claim_5(plain: Any, plant: Any, units: Any) -> None:
    model = plain()
    random = reward_beats_chance(Case(model, 0, DRAWS), "proper")
    assert ruled(random) == "not supported" and 0.2 < random.statistic < 0.6
    # The note compared with one random vector, which everything beats at such sizes.
    note = reward_beats_chance(Case(model, 0, DRAWS), "note")
    assert note.p_value < 0.05 < random.p_value
    plant(model, "blocks.1.mlp.W_out", units(model, "reward_in"))
    found = reward_beats_chance(Case(model, 0, DRAWS), "proper")
    assert ruled(found) == "supported" and found.statistic == pytest.approx(1.0, abs=1e-4)
    assert found.numbers["where"] == "blocks.1.mlp.W_out (write, sv 0)"
    assert reward_beats_chance(Case(model, 0, DRAWS), "note").statistic < 0.7
    small = plain(d_model=8, d_mlp=16, n_layers=1)
    assert ruled(reward_beats_chance(Case(small, 0, DRAWS), "proper")) != "supported"


def test_the_notes_number_against_both_nulls(plain: Any) -> None:
    """0.24 in 128 dimensions: rare for one vector, and the ordinary best of 40 directions of 9 matrices."""
    model = plain(d_model=128, d_mlp=160)
    found = reward_beats_chance(Case(model, 0, DRAWS), "note")
    assert 0.003 < found.numbers["p_of_one"] < 0.01
    assert found.numbers["p_of_0.24"] > 0.5
    assert found.numbers["median_of_chance"] == pytest.approx(0.27, abs=0.015)


def test_claim_6(plain: Any, plant: Any) -> None:
    model = plain()
    assert ruled(follows_time(Case(model, 0, DRAWS), "proper")) == "not supported"
    slow = np.zeros(64)
    slow[5] = 1.0
    with torch.no_grad():
        model.weights["embed.timestep.W"].normal_().mul_(0.2)
        model.weights["embed.timestep.W"][:, 5] += torch.linspace(-2, 2, 60)
    plant(model, "blocks.0.mlp.W_out", slow)
    case = Case(model, 0, DRAWS)
    assert ruled(follows_time(case, "proper")) == "supported"
    # A table that is smooth everywhere makes every direction smooth, which supports nothing.
    with torch.no_grad():
        wave = torch.outer(torch.linspace(-2, 2, 60), torch.randn(64))
        model.weights["embed.timestep.W"].copy_(wave + 0.01 * torch.randn(60, 64))
    plant(model, "blocks.0.mlp.W_out", np.empty((0, 64)), seed=8)
    smooth = follows_time(Case(model, 0, DRAWS), "proper")
    assert smooth.statistic > 0.9 and ruled(smooth) == "not supported"
    with pytest.raises(NotApplicable, match="reaches 5 rows"):
        follows_time(case, "proper", 5)


def test_smoothness() -> None:
    t = np.arange(200)
    noise = np.random.default_rng(0).standard_normal((200, 1))
    assert abs(float(smoothness(noise))) < 0.15
    assert float(smoothness(np.sin(t / 20)[:, None])) > 0.99
    pooled = np.column_stack([10 * np.sin(t / 20), noise[:, 0]])
    assert float(smoothness(pooled)) > 0.9  # weighted by variance


def test_the_rotation_null_is_calibrated() -> None:
    """Random frames against correlated labels: p is uniform."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((5, 20)) + 2 * rng.standard_normal(20)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = Labels(rows, 20)
    null = rotated(labels, 8, best_match, 2000, [0])
    p = []
    for _ in range(600):
        turned = np.linalg.qr(rng.standard_normal((20, 20)))[0][:, :8]
        p.append(compare_with_null(float(best_match((rows @ turned)[None])[0]), null).p_value)
    assert abs(np.mean(np.array(p) < 0.05) - 0.05) < 0.025
    assert abs(np.mean(p) - 0.5) < 0.04


@pytest.mark.parametrize("centred", [False, True])
def test_turned_labels_keep_their_angles(centred: bool) -> None:
    rows = np.random.default_rng(2).standard_normal((6, 16))
    rows -= rows.mean(1, keepdims=True) * centred
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    turned = Labels(rows, 16 - centred).turned(np.random.default_rng(3)).rows
    np.testing.assert_allclose(turned @ turned.T, rows @ rows.T, atol=1e-12)
    assert abs(float((turned * rows).sum(1).mean())) < 0.6
    assert not centred or np.abs(turned.sum(1)).max() < 1e-10


def test_more_labels_than_dimensions() -> None:
    rows = np.random.default_rng(4).standard_normal((50, 12))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    null = rotated(Labels(rows, 12), 12, best_match, 300, [0])
    rng, mine = np.random.default_rng(5), []
    for _ in range(300):
        mine.append(float(best_match((rows @ np.linalg.qr(rng.standard_normal((12, 12)))[0])[None])[0]))
    assert null.mean() == pytest.approx(np.mean(mine), abs=0.01)


@pytest.mark.parametrize("effect", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("p", [0.001, 0.2])
@pytest.mark.parametrize("critical", [0.01, 0.3])
@pytest.mark.parametrize("quiet", [True, False])
def test_the_rule_for_weights(effect: float, p: float, critical: float, quiet: bool) -> None:
    found = Finding(effect, 0, 0, effect=effect, margin=0.1, p_value=p, critical=critical, quiet=quiet)
    if effect >= 0.1:
        assert verdict_of("weights", found, p) == ("supported" if p < 0.05 and quiet else "undecided")
    else:
        assert verdict_of("weights", found, p) == ("not supported" if critical < 0.1 else "undecided")


@pytest.mark.parametrize(
    ("low", "high", "p", "quiet", "wanted"),
    [
        (0.02, 0.3, 0.01, True, "supported"),
        (0.02, 0.3, 0.01, False, "undecided"),
        (0.02, 0.3, 0.2, True, "undecided"),
        (-0.1, 0.3, 0.01, True, "undecided"),
        (-0.1, 0.04, 0.5, True, "not supported"),
        (0.01, 0.04, 0.001, True, "not supported"),
        (float("nan"), float("nan"), 0.5, True, "undecided"),
    ],
)
def test_the_rule_for_behaviour(low: float, high: float, p: float, quiet: bool, wanted: str) -> None:
    found = Finding(0.0, low, high, effect=0.0, margin=0.05, p_value=p, quiet=quiet)
    assert verdict_of("behaviour", found, p) == wanted


def test_a_statistic_of_nan_decides_nothing() -> None:
    nan = float("nan")
    assert verdict_of("weights", Finding(nan, nan, nan, effect=nan, margin=0.1, p_value=1.0, critical=0.01), 1.0) == (
        "undecided"
    )
