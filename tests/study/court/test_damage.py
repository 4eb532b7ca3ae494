"""The claims about behaviour, on returns made by hand, so that the right verdict is known."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dt_lens.behaviour.agents.evaluation import AgentEvaluation
from dt_lens.behaviour.agents.rollouts import Outcome
from dt_lens.errors import DtLensError
from dt_lens.study.court.case import Case
from dt_lens.study.court.claims import WAYS, Finding, NotApplicable, verdict_of, why_undecided
from dt_lens.study.court.damage import cosine_predicts_damage, hurts_more, output_shares
from dt_lens.study.court.rollouts import MeasuredEdit, MeasuredEdits, edits_of_sweep

EPISODES = 200
BASE = 100.0


def ruled(found: Finding) -> str:
    return verdict_of("behaviour", found, found.p_value)


def baseline(mean: float = BASE, spread: float = 10.0) -> AgentEvaluation:
    returns = mean + spread * np.random.default_rng(0).standard_normal(EPISODES)
    outcomes = [Outcome(i, float(value), 10, False, True) for i, value in enumerate(returns)]
    return AgentEvaluation.from_outcomes(outcomes, environment="E-v0", target_return=1.0, time_limit=10)


def edit(
    kind: str, loss: float, energy: float, control: float = 0.0, sv: int = 0, layer: int = 0, **more: Any
) -> MeasuredEdit:
    rng = np.random.default_rng(zlib.crc32(f"{kind} {loss} {sv} {layer}".encode()))
    base, noise = baseline().returns, 10.0
    returns = base - loss * BASE + noise * rng.standard_normal(EPISODES)
    controls = base - control * BASE + noise * rng.standard_normal((1, EPISODES))
    return MeasuredEdit(f"blocks.{layer}.mlp.{kind}", kind, "read", sv, energy, more, returns, controls)


def measured(
    inside: list[tuple[float, float]], outside: list[tuple[float, float]], control: float = 0.0
) -> MeasuredEdits:
    edits = [edit("W_in", loss, energy, control, sv) for sv, (loss, energy) in enumerate(inside)]
    edits += [edit("W_out", loss, energy, 0.0, sv) for sv, (loss, energy) in enumerate(outside)]
    return MeasuredEdits(baseline(), edits, [a for a in edits if a.kind == "W_in"])


@pytest.fixture(scope="module")
def case(plain: Any) -> Case:
    return Case(plain(n_layers=1), 0, 200)


@pytest.mark.parametrize(
    ("inside", "outside", "control", "wanted"),
    [
        ([(0.8, 1.0), (0.5, 1.0)], [(0.1, 1.0), (0.0, 1.0)], 0.0, "supported"),
        ([(0.1, 1.0), (0.1, 1.0)], [(0.5, 1.0), (0.5, 1.0)], 0.0, "not supported"),
        ([(0.3, 1.0), (0.3, 1.0)], [(0.3, 1.0), (0.3, 1.0)], 0.0, "not supported"),
        ([(0.4, 1.0), (0.4, 1.0)], [(0.3, 1.0), (0.3, 1.0)], 0.0, "supported"),
        (
            [(0.8, 8.0), (0.8, 8.0)],
            [(0.4, 1.0), (0.4, 1.0)],
            0.0,
            "not supported",
        ),  # more damage, not more per energy
        ([(0.5, 1.0), (0.5, 1.0)], [(0.0, 1.0), (0.0, 1.0)], 0.6, "undecided"),  # random changes hurt as much
    ],
)
def test_claim_3(case: Case, inside: Any, outside: Any, control: float, wanted: str) -> None:
    made = measured(inside, outside, control)
    sizes = [a.energy for a in made.edits]
    assert ruled(hurts_more(case, "proper", made, {"Frobenius energy": sizes, "output energy": sizes})) == wanted


def test_claim_3_takes_the_energy_that_says_less(case: Case) -> None:
    made = measured([(0.8, 1.0), (0.8, 1.0)], [(0.4, 1.0), (0.4, 1.0)])
    found = hurts_more(case, "proper", made, {"Frobenius energy": [1.0] * 4, "output energy": [9.0, 9.0, 1.0, 1.0]})
    assert found.numbers["counts"] == "output energy" and found.statistic < 0 and ruled(found) == "not supported"
    # Per unit of energy: energies in units of their geometric mean leave a common factor out.
    one, other = (hurts_more(case, "proper", made, {"F": [s] * 4}).statistic for s in (1.0, 7.0))
    assert one == pytest.approx(other) and one == pytest.approx(0.4, abs=0.03)
    # The note's way ignores energies.
    assert ruled(hurts_more(case, "note", made, {})) == "supported"


def test_directions_as_units_say_less_than_episodes(case: Case) -> None:
    """One edit of six does all the damage: sure of these edits over episodes, of directions it is not."""
    made = measured([(0.9, 1.0), *[(0.0, 1.0)] * 5], [(0.0, 1.0)] * 6)
    found = hurts_more(case, "proper", made, {"F": [1.0] * 12}, {"absolute": [2.0] * 12})
    assert found.low > 0 and ruled(found) == "supported"
    value, low, high, p = found.numbers["by_direction"]["F"]  # type: ignore[index]
    assert value == pytest.approx(found.statistic) and value == pytest.approx(0.15, abs=0.02)
    assert low < -0.1 and high > 0.4 and p > 0.05
    assert found.numbers["by_direction"]["absolute"] == pytest.approx((value, low, high, p))  # type: ignore[index]
    assert set(found.numbers["by_energy"]) == {"F"}  # type: ignore[call-overload]
    assert "These 12 edits cost" in found.said and "With directions as units (6 and 6): per unit of F" in found.said
    sure = hurts_more(case, "proper", measured([(0.5, 1.0)] * 6, [(0.1, 1.0)] * 6), {"F": [1.0] * 12})
    assert sure.numbers["by_direction"]["F"][3] == pytest.approx(1 / 924)  # type: ignore[index]


def test_p_is_one_sided(case: Case, plant: Any, units: Any) -> None:
    """An effect against the claim has p near 1, however large it is."""
    for inside, outside, within in ((0.5, 0.1, (0.0, 0.01)), (0.1, 0.5, (0.99, 1.0))):
        made = measured([(inside, 1.0)] * 2, [(outside, 1.0)] * 2)
        for found in (hurts_more(case, "proper", made, {"F": [1.0] * 4}), hurts_more(case, "note", made, {})):
            assert within[0] <= found.p_value <= within[1]
    energies = np.random.default_rng(5).uniform(1, 2, 40)
    for sign, within in ((2, (0.0, 0.01)), (-2, (0.99, 1.0))):
        made = swept(case, plant, units, lambda cosine, _, sign=sign: sign * cosine, energies)
        for way in WAYS:
            assert within[0] <= cosine_predicts_damage(case, way, made, "made").p_value <= within[1]


def test_few_episodes_are_undecided(case: Case) -> None:
    made = measured([(0.14, 1.0), (0.14, 1.0)], [(0.1, 1.0), (0.1, 1.0)])
    few = slice(0, 6)
    base = made.baseline
    short = AgentEvaluation.from_outcomes(
        [Outcome(i, float(value), 10, False, True) for i, value in enumerate(base.returns[few])],
        environment="E-v0",
        target_return=1.0,
        time_limit=10,
    )
    edits = [MeasuredEdit(*[*list(a.__dict__.values())[:6], a.outcomes[few], a.controls[:, few]]) for a in made.edits]
    less = MeasuredEdits(short, edits, [a for a in edits if a.kind == "W_in"])
    assert ruled(hurts_more(case, "proper", less, {"F": [1.0] * 4})) == "undecided"


def test_edits_that_change_nothing_are_not_supported(case: Case) -> None:
    """No episode differs, so there is no interval; but nothing is lost, which is below the margin."""
    base = baseline().returns
    edits = [
        MeasuredEdit(f"blocks.0.mlp.{kind}", kind, "read", sv, 1.0, {}, base, base[None])
        for kind in ("W_in", "W_out")
        for sv in (0, 1)
    ]
    found = hurts_more(case, "proper", MeasuredEdits(baseline(), edits, edits[:2]), {"e": [1.0] * 4})
    assert found.effect == found.high == 0.0 and ruled(found) == "not supported"
    assert "(no interval)" in found.said and "nan" not in found.said
    assert "Undecided: there is no interval" in why_undecided(
        "behaviour", Finding(0.3, math.nan, 0.3, effect=0.3, margin=0.05, p_value=0.001), 0.001
    )


def test_an_agent_that_returns_nothing_has_nothing_to_lose(case: Case) -> None:
    made = measured([(0.5, 1.0)] * 2, [(0.1, 1.0)] * 2)
    outcomes = [Outcome(i, -1.0, 10, False, True) for i in range(EPISODES)]
    poor = AgentEvaluation.from_outcomes(outcomes, environment="E-v0", target_return=1.0, time_limit=10)
    with pytest.raises(NotApplicable, match="mean return of the unedited agent is -1, and damage is a share"):
        hurts_more(case, "proper", MeasuredEdits(poor, made.edits, made.raw), {"F": [1.0] * 4})


def swept(case: Case, plant: Any, units: Any, damage: Callable[[float, float], float], energies: Any) -> MeasuredEdits:
    """Edits of forty directions of W_in whose cosines with one action fall from 0.3 to 0."""
    actions = units(case.model, "action_out")
    cosines = [float(np.abs(row @ actions.T).max()) for row in case.vectors(case.matrices("W_in")[0], "proper")]
    edits = [
        edit("W_in", damage(cosines[sv], energies[sv]), float(energies[sv]), 0.0, sv, value="zero") for sv in range(40)
    ]
    return MeasuredEdits(baseline(), edits, edits)


def test_claim_7(case: Case, plant: Any, units: Any) -> None:
    energies = np.random.default_rng(5).uniform(1, 2, 40)

    def tried(damage: Callable[[float, float], float], way: Any = "proper") -> Finding:
        return cosine_predicts_damage(case, way, swept(case, plant, units, damage, energies), "made")

    found = tried(lambda cosine, _: 2 * cosine)
    assert ruled(found) == "supported" and found.statistic > 0.8
    assert ruled(tried(lambda cosine, _: -2 * cosine)) == "not supported"
    # The noise of 200 episodes is small beside damage of many sizes, and all there is where no edit does any.
    assert found.numbers["reliability_beyond_control"] > 0.9  # type: ignore[operator]
    assert found.numbers["at equal energy, local-linear"][0] > 0.5  # type: ignore[index]
    nothing = tried(lambda *_: 0.0)
    assert nothing.numbers["reliability_beyond_control"] < 0.6  # type: ignore[operator]
    assert "reliability of damage beyond the control is" in nothing.said
    # If only the energy does harm, the cosine predicts nothing at fixed energy.
    assert ruled(tried(lambda _, energy: 0.5 * energy)) != "supported"


def test_claim_7_is_not_fooled_by_energy(case: Case, plant: Any, units: Any) -> None:
    """Energies correlate with the cosines, and damage depends on energies alone."""
    actions = units(case.model, "action_out")
    cosines = np.abs(case.vectors(case.matrices("W_in")[0], "proper")[:40] @ actions.T).max(1)
    energies = 1 + cosines + 0.05 * np.random.default_rng(6).standard_normal(40)
    made = swept(case, plant, units, lambda _, energy: energy, energies)
    found = cosine_predicts_damage(case, "proper", made, "made")
    assert found.numbers["inside matrices"][0] > 0.5 and found.statistic < 0.3 and ruled(found) != "supported"
    assert ruled(cosine_predicts_damage(case, "note", made, "made")) == "supported"  # it ignores energies


def test_claim_7_is_about_directions_and_not_about_kinds_of_matrices(case: Case, units: Any) -> None:
    """W_out matches actions more and W_in is hurt more; inside each, the cosine determines the order of damage."""
    actions = units(case.model, "action_out")
    edits = []
    for kind, level in (("W_in", 0.6), ("W_out", 0.0)):
        (matrix,) = case.matrices(kind)
        cosines = np.abs(case.vectors(matrix, "proper", "read" if kind == "W_in" else "write") @ actions.T).max(1)
        picked = np.argsort(cosines)[-6:] if kind == "W_out" else np.argsort(cosines)[:6]
        for rank, sv in enumerate(picked):
            edits.append(edit(kind, level + 0.05 * rank, 1.0 + 0.1 * ((7 * rank) % 6), 0.0, int(sv)))
    found = cosine_predicts_damage(case, "proper", MeasuredEdits(baseline(spread=0.0), edits, edits), "made")
    assert found.numbers["inside kinds"][0] > 0.9
    note = cosine_predicts_damage(case, "note", MeasuredEdits(baseline(spread=0.0), edits, edits), "made")
    assert note.statistic < 0.5


def test_claim_7_needs_twelve_edits(case: Case) -> None:
    with pytest.raises(NotApplicable, match="4 edits, fewer than the 12"):
        cosine_predicts_damage(case, "proper", measured([(0.5, 1.0)] * 2, [(0.1, 1.0)] * 2), "made")


def test_output_energy_is_a_share(plain: Any) -> None:
    """Removing every direction removes the whole output; removing one, its share."""
    import torch

    from dt_lens.lens.activations import Activations, Moments

    model = plain(n_layers=1)
    case, name = Case(model, 0, 200), "blocks.0.mlp.W_in"
    x = torch.randn(500, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = Moments(len(x), x.mean(0), x.T @ x / len(x))
    activations = Activations({"p": moments}, {name: "p"}, {})

    def record(sv: list[int]) -> dict[str, Any]:
        return {
            "kind": "singular", "matrix": name, "sv": sv, "side": "read", "value": "zero", "seed": 0,
            "fold_layernorm": True,
        }  # fmt: skip

    made = [
        MeasuredEdit(name, "W_in", "read", 0, 1.0, record(sv), np.zeros(1), np.zeros((0, 1)))
        for sv in (list(range(64)), [0])
    ]
    whole, one = output_shares(case, made, activations)
    found = case.decomposition(name)
    wanted = float((x @ found.left[0]).square().mean().sqrt() * found.sigma[0])
    wanted /= float((x @ model.weights[name].double()).square().sum(1).mean().sqrt())
    assert whole == pytest.approx(1.0, abs=1e-6) and one == pytest.approx(wanted, rel=1e-6)


def test_a_missing_sweep_is_one_sentence(plain: Any, tmp_path: Path) -> None:
    with pytest.raises(DtLensError, match="no sweep in"):
        edits_of_sweep(tmp_path, plain())
