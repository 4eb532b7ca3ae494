"""Claims about the rarer inputs: 5 (the reward embedding's 0.24) and 6 (structure over time)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dt_lens.lens.embeddings import Embedding
from dt_lens.statistics.nulls.haar import cap_probability
from dt_lens.study.court.case import FIRST, Case, Labels
from dt_lens.study.court.chance import Chance, found_of, rotated, weigh
from dt_lens.study.court.claims import ALPHA, Found, NotApplicable, Way

__all__ = ["follows_time", "reward_beats_chance", "smoothness"]

Array = NDArray[np.float64]
SAID = 0.24  # what the note saw
REWARD = 0.15  # margin of claim 5, a cosine
SMOOTH = 0.1  # margin of claim 6
ROWS = 10  # fewer steps are no series


def _largest(cosines: Array) -> Array:
    return np.asarray(np.abs(cosines).max((1, 2)))


def reward_beats_chance(case: Case, way: Way) -> Found:
    """Claim 5: the largest |cosine| of the reward input with the first directions of any ``W_in``, ``W_out`` and OV."""
    embedding = case.embedding("reward")
    places = [(m, m.left if m.kind == "W_in" else m.right) for kind in ("W_in", "W_out") for m in case.matrices(kind)]
    for matrix in case.matrices("OV"):
        places += [(matrix, side) for side in (matrix.residual_sides if way == "proper" else (matrix.right,))]

    def tried(met: Embedding | None, draws: int, seed: int) -> tuple[float, Array, str]:
        largest, where, null = 0.0, "", np.zeros(1)
        for number, (matrix, side) in enumerate(places):
            vectors = case.vectors(matrix, way, side)[:FIRST]
            if met is None:
                turn = np.random.default_rng([case.seed, 5])
                labels = case.labels(embedding, way, matrix, side).turned(turn)
            else:
                labels = case.labels(met, way, matrix, side)
            cosines = np.abs(labels.rows @ vectors.T)
            if cosines.max() > largest:
                largest, where = float(cosines.max()), f"{matrix.name} ({side}, sv {int(cosines.max(0).argmax())})"
            null = np.maximum(null, rotated(labels, len(vectors), _largest, draws, [case.seed, 5, seed, number]))
        return largest, null, where

    largest, null, where = tried(embedding, case.draws, 0)
    head = case.untrained("reward")
    other, other_null, _ = tried(head, min(case.draws, 1000), 1)
    control = weigh(other, other_null)
    found, d = weigh(largest, null), case.model.cfg.d_model
    single = float(cap_probability(SAID, d))
    looked = weigh(SAID, null).p_value
    if way == "note":  # one random vector, as the note thought
        drawn = rotated(Labels(np.eye(1, d), d), 1, _largest, case.draws, [case.seed, 5, 2])
        found = weigh(largest, drawn)._replace(p_value=float(cap_probability(largest, d)))
    said = (
        f"The reward input's largest |cosine| is {largest:.2f}, in {where}; the median best of chance is "
        f"{np.median(null):.2f}. The note's {SAID} would have p = {single:.2g} for one random vector and "
        f"p = {looked:.2g} for the best of all that was looked at."
    )
    numbers = {"where": where, "median_of_chance": float(np.median(null)), "p_of_0.24": looked, "p_of_one": single}
    name = "one random direction" if head is None else f"the untrained {head.name}"
    said += f" With {name} it is {other:.2f}."
    return found_of(found, REWARD, control.p_value >= ALPHA, said, numbers)


def smoothness(series: Array) -> Array:
    """``[..., T, k]`` -> ``[...]``: 1 less half of von Neumann's ratio (1941), pooled over ``k`` series of ``T`` steps.

    About 0 for noise, near 1 for smooth lines; a series counts by its variance.

    >>> float(smoothness(np.linspace(0, 1, 100)[:, None])) > 0.99
    True
    """
    steps = np.square(np.diff(series, axis=-2)).mean(-2).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(1 - steps / (2 * series.var(-2).sum(-1)))


def follows_time(case: Case, way: Way, steps: int | None = None) -> Found:
    """Claim 6: how smoothly the cosines of ``blocks.0.mlp.W_out``'s directions run along the timestep table.

    ``steps``: rows that the agent ever reaches; all when ``None``.
    """
    embedding = case.embedding("time")
    (matrix,) = case.matrices("W_out", 0)
    vectors = case.vectors(matrix, way)[:FIRST]
    labels = case.labels(embedding, way, matrix)
    rows = labels.rows[:steps]
    if len(rows) < ROWS:
        raise NotApplicable(f"episodes reach {len(rows)} rows of the timestep table, too few for a series")
    order = np.random.default_rng([case.seed, 6]).permutation(len(rows))

    def tried(rows: Array, draws: int, seed: int) -> Chance:
        null = rotated(Labels(rows, labels.dimension), len(vectors), smoothness, draws, [case.seed, 6, seed])
        return weigh(float(smoothness(rows @ vectors.T)), null)

    found, control = tried(rows, case.draws, 0), tried(rows[order], min(case.draws, 1000), 1)
    said = (
        f"Along {len(rows)} steps the smoothness is {found.statistic:.3f}, and random directions give "
        f"{found.mean:.3f}; with the steps in random order {control.statistic:+.3f}."
    )
    return found_of(found, SMOOTH, control.p_value >= ALPHA, said, {"steps": len(rows), "chance": found.mean})
