"""The claims about the reward and the time embedding: 5 (the reward embedding's 0.24) and 6 (structure over time)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dt_lens.lens.embeddings import Embedding
from dt_lens.statistics.nulls.haar import cap_probability
from dt_lens.study.court.case import FIRST, Case, Labels
from dt_lens.study.court.claims import ALPHA, Finding, NotApplicable, Way
from dt_lens.study.court.rotation_null import NullComparison, compare_with_null, rotated, weights_finding

__all__ = ["follows_time", "reward_beats_chance", "smoothness"]

Array = NDArray[np.float64]
SAID = 0.24  # the note's cosine
REWARD = 0.15  # margin of claim 5, a cosine
SMOOTH = 0.1  # margin of claim 6
ROWS = 10  # the least number of steps of a series


def _largest(cosines: Array) -> Array:
    return np.asarray(np.abs(cosines).max((1, 2)))


def reward_beats_chance(case: Case, way: Way) -> Finding:
    """Claim 5: the largest |cosine| of the reward input with the first directions of any ``W_in``, ``W_out`` and OV."""
    embedding = case.embedding("reward")
    places = [(m, m.left if m.kind == "W_in" else m.right) for kind in ("W_in", "W_out") for m in case.matrices(kind)]
    for matrix in case.matrices("OV"):
        places += [(matrix, side) for side in (matrix.residual_sides if way == "proper" else (matrix.right,))]

    def tried(compared: Embedding | None, draws: int, seed: int) -> tuple[float, Array, str]:
        largest, where, null = 0.0, "", np.zeros(1)
        for number, (matrix, side) in enumerate(places):
            vectors = case.vectors(matrix, way, side)[:FIRST]
            if compared is None:
                turn = np.random.default_rng([case.seed, 5])
                labels = case.labels(embedding, way, matrix, side).turned(turn)
            else:
                labels = case.labels(compared, way, matrix, side)
            cosines = np.abs(labels.rows @ vectors.T)
            if cosines.max() > largest:
                largest, where = float(cosines.max()), f"{matrix.name} ({side}, sv {int(cosines.max(0).argmax())})"
            null = np.maximum(null, rotated(labels, len(vectors), _largest, draws, [case.seed, 5, seed, number]))
        return largest, null, where

    largest, null, where = tried(embedding, case.draws, 0)
    head = case.untrained("reward")
    other, other_null, _ = tried(head, min(case.draws, 1000), 1)
    control = compare_with_null(other, other_null)
    found, d = compare_with_null(largest, null), case.model.cfg.d_model
    single = float(cap_probability(SAID, d))
    best_of_all = compare_with_null(SAID, null).p_value
    if way == "note":  # against one random vector, as in the note
        drawn = rotated(Labels(np.eye(1, d), d), 1, _largest, case.draws, [case.seed, 5, 2])
        found = compare_with_null(largest, drawn)._replace(p_value=float(cap_probability(largest, d)))
    said = (
        f"The reward input's largest |cosine| is {largest:.2f}, in {where}; the median best of chance is "
        f"{np.median(null):.2f}. The note's {SAID} would have p = {single:.2g} for one random vector and "
        f"p = {best_of_all:.2g} for the best of all that were compared."
    )
    numbers = {"where": where, "median_of_chance": float(np.median(null)), "p_of_0.24": best_of_all, "p_of_one": single}
    name = "one random direction" if head is None else f"the untrained {head.name}"
    said += f" With {name} it is {other:.2f}."
    return weights_finding(found, REWARD, control.p_value >= ALPHA, said, numbers)


def smoothness(series: Array) -> Array:
    """How smooth series are: 1 less half of von Neumann's ratio (1941), pooled over ``k`` series of ``T`` steps.

    About 0 for noise, near 1 for smooth lines; series are weighted by their variance.

    Args:
        series: ``[..., T, k]``.

    Returns:
        ``[...]``.

    >>> float(smoothness(np.linspace(0, 1, 100)[:, None])) > 0.99
    True
    """
    steps = np.square(np.diff(series, axis=-2)).mean(-2).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(1 - steps / (2 * series.var(-2).sum(-1)))


def follows_time(case: Case, way: Way, steps: int | None = None) -> Finding:
    """Claim 6: how smoothly the cosines of ``blocks.0.mlp.W_out``'s directions run along the timestep table.

    Args:
        steps: how many rows of the table the model reaches in its task; all by default.

    Raises:
        NotApplicable: if the model reaches fewer than ten rows.
    """
    embedding = case.embedding("time")
    (matrix,) = case.matrices("W_out", 0)
    vectors = case.vectors(matrix, way)[:FIRST]
    labels = case.labels(embedding, way, matrix)
    rows = labels.rows[:steps]
    if len(rows) < ROWS:
        raise NotApplicable(f"the model reaches {len(rows)} rows of the timestep table, too few for a series")
    order = np.random.default_rng([case.seed, 6]).permutation(len(rows))

    def tried(rows: Array, draws: int, seed: int) -> NullComparison:
        null = rotated(Labels(rows, labels.dimension), len(vectors), smoothness, draws, [case.seed, 6, seed])
        return compare_with_null(float(smoothness(rows @ vectors.T)), null)

    found, control = tried(rows, case.draws, 0), tried(rows[order], min(case.draws, 1000), 1)
    said = (
        f"Along {len(rows)} steps the smoothness is {found.statistic:.3f}, and random directions give "
        f"{found.mean:.3f}; with the steps in random order {control.statistic:+.3f}."
    )
    return weights_finding(found, SMOOTH, control.p_value >= ALPHA, said, {"steps": len(rows), "chance": found.mean})
