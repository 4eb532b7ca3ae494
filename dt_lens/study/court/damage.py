"""The claims about edits: 3 (``W_in`` against ``W_out`` at equal energy) and 7 (does the cosine predict damage?)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from dt_lens.behaviour.printing import about_interval, span
from dt_lens.edits.singular import load_edit
from dt_lens.edits.state import unedited
from dt_lens.lens.activations import Activations
from dt_lens.lens.matrices import find_matrix
from dt_lens.statistics.local_linear import beside_neighbours
from dt_lens.statistics.outcomes import bootstrap_interval, interval_note, sign_flip
from dt_lens.statistics.rank_correlation import RankCorrelation, at_equal_size, rank_correlation, spearman_brown
from dt_lens.study.court.case import Case
from dt_lens.study.court.claims import Finding, NotApplicable, Way
from dt_lens.study.court.rollouts import MeasuredEdit, MeasuredEdits

__all__ = ["cosine_predicts_damage", "hurts_more", "output_shares"]

Array = NDArray[np.float64]
# Margin of claim 3: a share of the unedited mean, or half of what the task calls a large loss. A tenth is large
# where losses are shares, so the two are one rule.
MORE = 0.05
OF_LARGE = 0.5
PREDICTS = 0.2  # margin of claim 7, a correlation
FEW = 12  # edits for a correlation: with fewer, the interval of a partial correlation covers too seldom
RESAMPLES = 10_000


def output_shares(
    case: Case, edits: Sequence[MeasuredEdit], activations: Activations, absolute: bool = False
) -> list[float]:
    """Each edit's output energy on real inputs, as a share of its matrix's own: ``sqrt(E|xD|^2 / E|xM|^2)``.

    With ``absolute`` it is ``sqrt(E|xD|^2)`` itself.
    """
    bare, found, whole = unedited(case.model), [], dict[str, float]()
    for edit in edits:
        matrix = find_matrix(bare, edit.matrix)
        moments = activations.of(matrix, bare)
        if absolute:
            whole[edit.matrix] = 1.0
        elif edit.matrix not in whole:
            dense = matrix.dense(bare, fold_layernorm=False)
            whole[edit.matrix] = moments.energy((dense, torch.eye(dense.shape[1], dtype=dense.dtype)))
        found.append(moments.energy(load_edit(case.model, edit.record).delta) / whole[edit.matrix])
    return found


def hurts_more(
    case: Case,
    way: Way,
    measured: MeasuredEdits,
    energies: Mapping[str, Sequence[float]],
    shown: Mapping[str, Sequence[float]] | None = None,
) -> Finding:
    """Claim 3: damage per unit of energy of the edits of ``W_in`` less that of ``W_out``, a value per unit of the task.

    The interval is over these units, and so about these edits. With directions as units (a value per edit) the finding
    says what they show of directions in general; that is not part of the verdict.

    Args:
        energies: by name, an energy for each of ``measured.edits``; the smallest of their results counts.
        shown: further energies, shown with directions as units and not counted.

    Raises:
        NotApplicable: if damage is a share of an unedited mean that is not above zero, or an edit has no energy.
    """
    terms, cost, of = measured.baseline.terms, measured.cost, measured.of
    margin = MORE if terms.large is None else OF_LARGE * terms.large
    if way == "note":
        outward = [edit for edit in measured.edits if edit.kind == "W_out"]
        inside, outside = (
            np.mean([measured.damage(edit) for edit in part], axis=0) for part in (measured.raw, outward)
        )
        found = _of_units(inside - outside)
        said = (
            f"Whatever their energies, the edits of the raw W_in cost {cost(inside.mean())}{of} and those of "
            f"W_out {cost(outside.mean())}."
        )
        return Finding(*found[:3], effect=found[0], margin=margin, p_value=found[3], said=said, units=terms.units)
    inward = np.array([edit.kind == "W_in" for edit in measured.edits])
    damage = np.array([measured.damage(edit) for edit in measured.edits])
    beyond = np.array([measured.beyond(edit) for edit in measured.edits])
    tried, across = {}, {}
    for name, values in {**energies, **(shown or {})}.items():
        size = np.asarray(values, dtype=np.float64)
        if not (size > 0).all():
            raise NotApplicable(f"an edit has no {name}")
        per = damage / (size / np.exp(np.log(size).mean()))[:, None]
        across[name] = _of_directions(per[inward].mean(1), per[~inward].mean(1))
        if name in energies:
            tried[name] = _of_units(per[inward].mean(0) - per[~inward].mean(0))
    name = min(tried, key=lambda name: tried[name][0])
    value, low, high, _ = tried[name]
    control = bootstrap_interval(beyond[inward].mean(0))
    least = float(beyond[inward].mean()) if math.isnan(control.low) else control.low
    k = measured.digits
    parts = "; ".join(f"per unit of {n} {v:+.{k}f} {_span(lo, hi, k)}" for n, (v, lo, hi, _) in tried.items())
    costs = [cost(float(of_these.mean())) for of_these in (damage[inward], damage[~inward], beyond[inward])]
    said = (
        f"These {len(damage)} edits cost {costs[0]}{of} in W_in and {costs[1]} in W_out, beyond their controls "
        f"{costs[2]} and {cost(float(beyond[~inward].mean()))}; of an edit of typical energy, W_in less W_out: "
        f"{parts}, over {terms.units}. "
    )
    parts = "; ".join(
        f"per unit of {n} {v:+.{k}f} {_span(lo, hi, k)}, p = {p:.2g}" for n, (v, lo, hi, p) in across.items()
    )
    said += f"With directions as units ({inward.sum()} and {(~inward).sum()}): {parts}."
    numbers: dict[str, object] = {"by_energy": {n: list(found) for n, found in tried.items()}, "counts": name}
    numbers["by_direction"] = {n: list(found) for n, found in across.items()}
    note = interval_note(per[inward].mean(0) - per[~inward].mean(0), "differences")
    said += f" {about_interval(f'The interval over {terms.units}', note)}" if note else ""
    numbers["beyond_controls_in"] = [float(beyond[inward].mean()), *control]
    return Finding(
        value,
        low,
        high,
        effect=value,
        margin=margin,
        p_value=max(found[3] for found in tried.values()),
        quiet=least > 0,
        said=said + case.gated,
        numbers=numbers,
        units=terms.units,
    )


def _span(low: float, high: float, digits: int = 2) -> str:
    return span((low, high), digits=digits, sign=True)


def _of_units(values: Array) -> tuple[float, float, float, float]:
    """Mean, interval, and the one-sided p that it is above zero, of a value per unit of the task.

    A value that is the same in every unit, mostly 0, has no interval. It cannot support a claim, but it can lie
    below the margin: the upper end is the value itself.
    """
    low, high = bootstrap_interval(values)
    if len(values) > 1 and np.ptp(values) == 0:
        high = float(values[0])
    return float(values.mean()), low, high, _one_sided(sign_flip(values), float(values.mean()))


def _of_directions(inside: Array, outside: Array) -> tuple[float, float, float, float]:
    """Difference of means with Welch's interval, and the one-sided permutation p that it is above zero.

    Exact where there are no more than 10,000 ways to part the edits.
    """
    value = float(inside.mean() - outside.mean())
    if min(len(inside), len(outside)) < 2:
        return value, float("nan"), float("nan"), 1.0
    low, high = stats.ttest_ind(inside, outside, equal_var=False).confidence_interval()
    found = stats.permutation_test(
        (inside, outside),
        lambda a, b, axis: np.mean(a, axis=axis) - np.mean(b, axis=axis),
        n_resamples=RESAMPLES,
        alternative="greater",
        rng=np.random.default_rng(0),
    )
    return value, float(low), float(high), float(found.pvalue)


def _one_sided(p: float, value: float) -> float:
    """The p-value of a value above zero, from a two-sided one."""
    return p / 2 if value > 0 else 1 - p / 2


def cosine_predicts_damage(
    case: Case, way: Way, measured: MeasuredEdits, source: str, energies: Sequence[float] | None = None
) -> Finding:
    """Claim 7: the rank correlation, over edits, of the best |cosine| with the outputs and the damage.

    Ranks are taken inside each kind of matrix: differences between kinds are the subject of claims 1 and 3. With a
    dozen edits of every matrix, as in a sweep, ranks are taken inside each matrix.

    Args:
        source: where the edits are from, in words.
        energies: of ``measured.edits``, on real inputs; their Frobenius norms by default.

    Raises:
        NotApplicable: if there are fewer than twelve edits, or damage is a share of an unedited mean that is not
            above zero.
    """
    edits = list(measured.edits)
    if way == "note" and measured.raw is not measured.edits:
        edits = [*measured.raw, *(edit for edit in measured.edits if edit.kind != "W_in")]
    if len(edits) < FEW:
        raise NotApplicable(f"there are {len(edits)} edits, fewer than the {FEW} that a correlation needs")
    terms, scale = measured.baseline.terms, measured.scale
    if way == "note":
        damage = [float((terms.sign * (measured.baseline.outcomes - e.outcomes)).mean() / scale) for e in edits]
        tried = {"over all edits": rank_correlation(_cosines(case, way, edits, False), damage, resamples=RESAMPLES)}
        quiet, other = True, float("nan")
    else:
        size = [edit.energy for edit in edits] if energies is None else energies
        damage = [float((terms.sign * (e.controls.mean(0) - e.outcomes)).mean() / scale) for e in edits]
        tried, others = (_inside(_cosines(case, way, edits, control), damage, size, edits) for control in (False, True))
        weaker = min(others.values(), key=lambda found: found.rho)
        quiet, other = not weaker.low > 0, weaker.rho
    name = min(tried, key=lambda name: tried[name].rho)
    rho, low, high, _, n = tried[name]
    parts = ", ".join(f"{found.rho:+.2f} {_span(found.low, found.high)} {n}" for n, found in tried.items())
    said = f"Over {n} edits ({source}) the correlation is {parts}."
    numbers: dict[str, object] = {name: list(found) for name, found in tried.items()}
    if way == "proper":
        said += f" With labels without meaning it is {other:+.2f}."
        if "at equal energy" in tried:
            matrices = [edit.matrix for edit in edits]
            lines = beside_neighbours(_cosines(case, way, edits, False), damage, size, matrices)
            reliable = _reliability(measured, edits, size)
            numbers |= {"at equal energy, local-linear": list(lines), "reliability_beyond_control": reliable}
            said += (
                f" Without bins, by local lines, it is {lines.rho:+.2f} {_span(lines.low, lines.high)} at equal "
                f"energy. The reliability of damage beyond the control is {reliable:.2f} there"
            )
            end = min(1.0, tried["at equal energy"].high / reliable**0.5) if reliable > 0 else math.nan
            said += (
                f": corrected for it the interval would end at {end:+.2f}."
                if reliable > 0
                else ", so the interval says nothing of what the edits truly cost."
            )
    p = max(_one_sided(found.p_value, found.rho) for found in tried.values())
    return Finding(
        rho, low, high, effect=rho, margin=PREDICTS, p_value=p, quiet=quiet, said=said, numbers=numbers,
        units=terms.units,
    )  # fmt: skip


def _reliability(measured: MeasuredEdits, edits: Sequence[MeasuredEdit], size: Sequence[float]) -> float:
    """How well damage beyond the control repeats at equal energy, from every second unit and the others."""
    beyond = np.array([measured.baseline.terms.sign * (edit.controls.mean(0) - edit.outcomes) for edit in edits])
    one, other = beyond[:, 0::2].mean(1), beyond[:, 1::2].mean(1)
    return spearman_brown(at_equal_size(one, other, size, [edit.matrix for edit in edits]).rho)


def _inside(
    cosines: Sequence[float], damage: Sequence[float], size: Sequence[float], edits: Sequence[MeasuredEdit]
) -> dict[str, RankCorrelation]:
    matrices, kinds = [edit.matrix for edit in edits], [edit.kind for edit in edits]
    if min(Counter(matrices).values()) >= FEW:
        return {
            "inside matrices": rank_correlation(cosines, damage, matrices, resamples=RESAMPLES),
            "at equal energy": at_equal_size(cosines, damage, size, matrices),
        }
    return {
        "inside kinds": rank_correlation(cosines, damage, kinds, resamples=RESAMPLES),
        "given the energy": rank_correlation(cosines, damage, kinds, size, resamples=RESAMPLES),
    }


def _cosines(case: Case, way: Way, edits: Sequence[MeasuredEdit], control: bool) -> list[float]:
    """Each edited direction's best |cosine| with the action output; for a circuit, that of its write side."""
    embedding, best, found = case.embedding("output"), dict[str, Array](), []
    for edit in edits:
        if edit.matrix not in best:
            matrix = find_matrix(unedited(case.model), edit.matrix)
            side = matrix.residual_sides[-1]
            labels = case.labels(embedding, way, matrix, side)
            if control:
                labels, _ = case.control("any", embedding, way, matrix, side)
            best[edit.matrix] = np.abs(case.vectors(matrix, way, side) @ labels.rows.T).max(1)
        found.append(float(best[edit.matrix][edit.sv]))
    return found
