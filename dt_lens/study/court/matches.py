"""The claims about what directions of MLPs and OV circuits match: 1 (actions), 2 (the common action), 4 (states)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dt_lens.lens.matrices import Matrix
from dt_lens.study.court.case import FIRST, Case, Labels
from dt_lens.study.court.claims import ALPHA, Finding, NotApplicable, Way
from dt_lens.study.court.rotation_null import NullComparison, best_match, compare_with_null, rotated, weights_finding

__all__ = ["first_is_common", "reads_states", "w_in_matches_more"]

Array = NDArray[np.float64]
CONTROL_DRAWS = 1000
OF_CHANCE = 0.2  # claims 1 and 4: margins, as shares of what chance gives
COMMON = 0.1  # claim 2: a difference of cosines


def _mean_best_match(vectors: Array, labels: Labels) -> float:
    return float(best_match((labels.rows @ vectors.T)[None])[0])


def w_in_matches_more(case: Case, way: Way) -> Finding:
    """Claim 1: the mean over actions of the best |cosine| of any direction, of ``W_in`` less that of ``W_out``."""
    embedding = case.embedding("output")
    sides = [case.matrices("W_in"), case.matrices("W_out")]
    k = min(FIRST, *(len(case.vectors(m, way)) for side in sides for m in side))

    def tried(control: bool, draws: int) -> tuple[NullComparison, list[float], float, str]:
        means, nulls, name = [], [], ""
        for number, side in enumerate(sides):
            values, drawn = [], []
            for matrix in side:
                labels = case.labels(embedding, way, matrix)
                if control:
                    labels, name = case.control("any", embedding, way, matrix)
                values.append(_mean_best_match(case.vectors(matrix, way)[:k], labels))
                seed = [case.seed, 1, number, matrix.layer, int(control)]
                drawn.append(rotated(labels, k, best_match, draws, seed))
            means.append(float(np.mean(values)))
            nulls.append(np.mean(drawn, axis=0))
        chance = float(np.mean(nulls))
        return compare_with_null(means[0] - means[1], nulls[0] - nulls[1]), means, chance, name

    found, means, chance, _ = tried(False, case.draws)
    control, _, _, name = tried(True, min(case.draws, CONTROL_DRAWS))
    said = (
        f"Of the first {k} directions, an output's best match is {means[0]:.3f} on average in W_in and "
        f"{means[1]:.3f} in W_out; chance gives {chance:.3f}. With {name} the difference is {control.statistic:+.3f}."
    )
    numbers = {"w_in": means[0], "w_out": means[1], "chance": chance, "directions": k}
    return weights_finding(found, OF_CHANCE * chance, control.p_value >= ALPHA, said + case.gated, numbers)


def first_is_common(case: Case, way: Way, common: int) -> Finding:
    """Claim 2: |cosine| of ``W_in``'s direction 0 with the label ``common`` less the mean over the other labels."""
    embedding = case.embedding("output")
    if len(embedding) < 2:
        raise NotApplicable(f"the model has only one {embedding.kind}, so there is no other to compare with")

    def contrast(cosines: Array) -> Array:
        sizes = np.abs(cosines[:, :, 0])
        return np.asarray(sizes[:, common] - (sizes.sum(1) - sizes[:, common]) / (sizes.shape[1] - 1))

    first: list[float] = []
    middle: list[float] = []
    nulls, best = [], 0
    for matrix in case.matrices("W_in"):
        vectors, labels = case.vectors(matrix, way), case.labels(embedding, way, matrix)
        for values, row in ((first, 0), (middle, len(vectors) // 2)):
            values.append(float(contrast((labels.rows @ vectors[row][:, None])[None])[0]))
        best += int(np.abs(labels.rows @ vectors[0]).argmax()) == common
        nulls.append(rotated(labels, 1, contrast, case.draws, [case.seed, 2, matrix.layer]))
    null = np.mean(nulls, axis=0)
    found, control = compare_with_null(float(np.mean(first)), null), compare_with_null(float(np.mean(middle)), null)
    label = embedding.labels[common]
    said = (
        f"Direction 0 of W_in matches the most common {embedding.kind} ({label}) by {found.statistic:+.3f} more than "
        f"the others on average over {len(first)} blocks, and it is its best match in {best} of them; the middle "
        f"direction by {control.statistic:+.3f}."
    )
    numbers = {embedding.kind: label, "best_match_in": best, "blocks": len(first), "by_block": first}
    return weights_finding(found, COMMON, control.p_value >= ALPHA, said + case.gated, numbers)


def reads_states(case: Case, way: Way) -> Finding:
    """Claim 4: the mean over states of the best |cosine| of block 0's ``W_in`` and OV, over chance's, less one."""
    embedding = case.embedding("input")
    groups: list[tuple[str, Sequence[Matrix]]] = [("W_in", case.matrices("W_in", 0)), ("OV", case.matrices("OV", 0))]

    def tried(matrices: Sequence[Matrix], number: int, control: bool, draws: int) -> tuple[NullComparison, str]:
        values, nulls, name = [], [], ""
        for matrix in matrices:
            vectors = case.vectors(matrix, way, "read")[:FIRST]
            labels = case.labels(embedding, way, matrix, "read")
            if control:
                labels, name = case.control("state", embedding, way, matrix, "read")
            values.append(_mean_best_match(vectors, labels))
            seed = [case.seed, 4, number, matrix.head or 0, int(control)]
            nulls.append(rotated(labels, len(vectors), best_match, draws, seed))
        null = np.mean(nulls, axis=0)
        return compare_with_null(float(np.mean(values)) / float(null.mean()) - 1, null / null.mean() - 1), name

    found = {name: tried(group, i, False, case.draws)[0] for i, (name, group) in enumerate(groups)}
    controls = [tried(group, i, True, min(case.draws, CONTROL_DRAWS)) for i, (_, group) in enumerate(groups)]
    weaker = min(found.values(), key=lambda compared: compared.statistic)
    both = weaker._replace(
        p_value=max(compared.p_value for compared in found.values()),
        critical=max(compared.critical for compared in found.values()),
    )
    parts = " and ".join(f"{name} {100 * compared.statistic:+.0f} %" for name, compared in found.items())
    said = (
        f"Against chance, block 0 matches the inputs by {parts}; with {controls[0][1]} "
        f"{100 * controls[0][0].statistic:+.0f} % and {100 * controls[1][0].statistic:+.0f} %."
    )
    numbers = {name: compared.statistic for name, compared in found.items()}
    quiet = min(control.p_value for control, _ in controls) >= ALPHA
    return weights_finding(both, OF_CHANCE, quiet, said + case.gated, numbers)
