"""Claims about what edits do: 3 (W_in against W_out at equal energy) and 7 (does the cosine predict damage?)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dt_lens.edits.edit import unedited
from dt_lens.edits.singular import load_edit
from dt_lens.lens.activations import Activations
from dt_lens.lens.matrices import find_matrix
from dt_lens.statistics.outcomes import bootstrap_interval, sign_flip
from dt_lens.statistics.rank_correlation import RankCorrelation, at_equal_size, rank_correlation
from dt_lens.study.court.case import Case
from dt_lens.study.court.claims import Found, NotApplicable, Way
from dt_lens.study.court.rollouts import Arm, Arms

__all__ = ["cosine_predicts_damage", "hurts_more", "output_shares"]

Array = NDArray[np.float64]
MORE = 0.05  # margin of claim 3, a share of the return
PREDICTS = 0.2  # margin of claim 7, a correlation
FEW = 12  # edits for a correlation: with fewer, intervals of a partial one cover too little
RESAMPLES = 10_000


def output_shares(case: Case, arms: Sequence[Arm], activations: Activations) -> list[float]:
    """Each edit's output energy on real inputs, as a share of its matrix's own: ``sqrt(E|xD|^2 / E|xM|^2)``."""
    bare, found, whole = unedited(case.model), [], dict[str, float]()
    for arm in arms:
        matrix = find_matrix(bare, arm.matrix)
        moments = activations.of(matrix, bare)
        if arm.matrix not in whole:
            dense = matrix.dense(bare, fold_layernorm=False)
            whole[arm.matrix] = moments.energy((dense, torch.eye(dense.shape[1], dtype=dense.dtype)))
        found.append(moments.energy(load_edit(case.model, arm.record).delta) / whole[arm.matrix])
    return found


def hurts_more(case: Case, way: Way, arms: Arms, energies: Mapping[str, Sequence[float]]) -> Found:
    """Claim 3: damage per unit of energy of the edits of ``W_in`` less that of ``W_out``, a value per episode.

    Args:
        energies: by name, an energy for each of ``arms.edits``; of those two the smaller result counts.
    """
    base, scale = arms.baseline.returns, arms.scale
    if way == "note":
        outward = [arm for arm in arms.edits if arm.kind == "W_out"]
        inside, outside = (
            np.mean([(base - arm.returns) / scale for arm in part], axis=0) for part in (arms.raw, outward)
        )
        found = _of_episodes(inside - outside)
        said = (
            f"Whatever their energies, the edits of the raw W_in cost {inside.mean():.0%} of the return and those of "
            f"W_out {outside.mean():.0%}."
        )
        return Found(*found[:3], effect=found[0], margin=MORE, p_value=found[3], said=said)
    inward = np.array([arm.kind == "W_in" for arm in arms.edits])
    damage = np.array([(base - arm.returns) / scale for arm in arms.edits])
    beyond = np.array([(arm.controls.mean(0) - arm.returns) / scale for arm in arms.edits])
    tried = {}
    for name, values in energies.items():
        size = np.asarray(values, dtype=np.float64)
        if not (size > 0).all():
            raise NotApplicable(f"an edit has no {name}")
        per = damage / (size / np.exp(np.log(size).mean()))[:, None]
        tried[name] = _of_episodes(per[inward].mean(0) - per[~inward].mean(0))
    name = min(tried, key=lambda name: tried[name][0])
    value, low, high, _ = tried[name]
    control = bootstrap_interval(beyond[inward].mean(0))
    parts = "; ".join(f"per unit of {n} {v:+.2f} [{lo:+.2f}, {hi:+.2f}]" for n, (v, lo, hi, _) in tried.items())
    said = (
        f"The edits cost {damage[inward].mean():.0%} of the return in W_in and {damage[~inward].mean():.0%} in W_out, "
        f"beyond their controls {beyond[inward].mean():.0%} and {beyond[~inward].mean():.0%}; of an edit of typical "
        f"energy, W_in less W_out: {parts}."
    )
    numbers: dict[str, object] = {"by_energy": {n: list(found) for n, found in tried.items()}, "counts": name}
    numbers["beyond_controls_in"] = [float(beyond[inward].mean()), *control]
    return Found(
        value,
        low,
        high,
        effect=value,
        margin=MORE,
        p_value=max(found[3] for found in tried.values()),
        quiet=control.low > 0,
        said=said + case.gated,
        numbers=numbers,
    )


def _of_episodes(values: Array) -> tuple[float, float, float, float]:
    """Mean, interval, and the one-sided p that it is above zero, of a value per episode."""
    low, high = bootstrap_interval(values)
    return float(values.mean()), low, high, _one_sided(sign_flip(values), float(values.mean()))


def _one_sided(p: float, value: float) -> float:
    return p / 2 if value > 0 else 1 - p / 2


def cosine_predicts_damage(
    case: Case, way: Way, arms: Arms, source: str, energies: Sequence[float] | None = None
) -> Found:
    """Claim 7: the rank correlation, over edits, of the best |cosine| with actions and the damage.

    Ranks are taken inside each kind of matrix: what one kind matches more and another is hurt more by, claims 1 and 3
    say. With a dozen edits of every matrix, as in a sweep, they are taken inside each matrix.

    Args:
        source: in words, whose edits they are.
        energies: of ``arms.edits``, on real inputs; their Frobenius norms when omitted.
    """
    edits = list(arms.edits)
    if way == "note" and arms.raw is not arms.edits:
        edits = [*arms.raw, *(arm for arm in arms.edits if arm.kind != "W_in")]
    if len(edits) < FEW:
        raise NotApplicable(f"there are {len(edits)} edits, fewer than the {FEW} that a correlation takes")
    base, scale = arms.baseline.returns, arms.scale
    if way == "note":
        damage = [float((base - arm.returns).mean() / scale) for arm in edits]
        tried = {"over all edits": rank_correlation(_cosines(case, way, edits, False), damage, resamples=RESAMPLES)}
        quiet, other = True, float("nan")
    else:
        size = [arm.energy for arm in edits] if energies is None else energies
        damage = [float((arm.controls.mean(0) - arm.returns).mean() / scale) for arm in edits]
        tried, others = (_inside(_cosines(case, way, edits, control), damage, size, edits) for control in (False, True))
        weaker = min(others.values(), key=lambda found: found.rho)
        quiet, other = not weaker.low > 0, weaker.rho
    name = min(tried, key=lambda name: tried[name].rho)
    rho, low, high, _, n = tried[name]
    parts = ", ".join(f"{found.rho:+.2f} [{found.low:+.2f}, {found.high:+.2f}] {n}" for n, found in tried.items())
    said = f"Over {n} edits ({source}) the correlation is {parts}."
    if way == "proper":
        said += f" With labels that mean nothing it is {other:+.2f}."
    numbers = {name: list(found) for name, found in tried.items()}
    p = max(_one_sided(found.p_value, found.rho) for found in tried.values())
    return Found(rho, low, high, effect=rho, margin=PREDICTS, p_value=p, quiet=quiet, said=said, numbers=numbers)


def _inside(
    cosines: Sequence[float], damage: Sequence[float], size: Sequence[float], edits: Sequence[Arm]
) -> dict[str, RankCorrelation]:
    matrices, kinds = [arm.matrix for arm in edits], [arm.kind for arm in edits]
    if min(Counter(matrices).values()) >= FEW:
        return {
            "inside matrices": rank_correlation(cosines, damage, matrices, resamples=RESAMPLES),
            "at equal energy": at_equal_size(cosines, damage, size, matrices),
        }
    return {
        "inside kinds": rank_correlation(cosines, damage, kinds, resamples=RESAMPLES),
        "given the energy": rank_correlation(cosines, damage, kinds, size, resamples=RESAMPLES),
    }


def _cosines(case: Case, way: Way, edits: Sequence[Arm], control: bool) -> list[float]:
    """The best |cosine| of each edited direction with the action output; of a circuit, that of its write side."""
    embedding, best, found = case.embedding("output"), dict[str, Callable[[int], float]](), []
    for arm in edits:
        if arm.matrix not in best:
            matrix = find_matrix(unedited(case.model), arm.matrix)
            side = matrix.residual_sides[-1]
            labels = case.labels(embedding, way, matrix, side)
            if control:
                labels, _ = case.control("any", embedding, way, matrix, side)
            sizes = np.abs(case.vectors(matrix, way, side) @ labels.rows.T).max(1)
            best[arm.matrix] = sizes.__getitem__
        found.append(float(best[arm.matrix](arm.sv)))
    return found
