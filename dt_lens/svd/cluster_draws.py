"""Random directions and spans as the nulls of a test of clusters draw them, and the effects of factors on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dt_lens.statistics.nulls.smallest_p import SmallestP
from dt_lens.statistics.rank_effects import RankEffects

__all__ = ["FIRST", "WITHIN", "Cleared", "effects_of", "haar_draws", "sign_draws", "until_clear"]

Array = NDArray[np.float64]
WITHIN = 200  # directions in the span of a block, of which the best counts
HELD = 2_000_000  # numbers held at a time
FIRST = 199  # draws before the first look
STEPS = 3  # times as many draws at each further look
CLEAR = 50  # draws as extreme as a row, after which no more are made for it


def effects_of(frames: Array, labels: Array, effects: RankEffects) -> Array:
    """The effects of factors on directions, or for spans the best of ``WITHIN`` directions, ``[rows, factors]``.

    Args:
        frames: ``[rows, span, d]``, orthonormal within a row.
        labels: ``[n, d]``.
        effects: of these labels' factors.
    """
    rows, span, _ = frames.shape
    if span == 1:
        step, inside = max(1, HELD // len(labels)), np.ones((1, 1))
    else:
        step, inside = max(1, HELD // (len(labels) * WITHIN)), _inside(span)
    found = np.empty((rows, len(effects.names)))
    for begin in range(0, rows, step):
        some = frames[begin : begin + step]
        values = inside @ (some @ labels.T)  # [rows, directions, n]
        found[begin : begin + step] = (
            effects(values.reshape(-1, len(labels))).reshape(len(some), len(inside), -1).max(1)
        )
    return found


def _inside(span: int) -> Array:
    """The same directions in every span of this dimension, as coordinates ``[WITHIN, span]``."""
    x = np.random.default_rng([WITHIN, span]).standard_normal((WITHIN, span))
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def haar_draws(labels: Array, span: int, centred: bool, effects: RankEffects, seed: int) -> Callable[[int], Array]:
    """Effects on random directions, or spans, that point anywhere: a function of how many more to draw."""
    n, d = labels.shape
    rng = np.random.default_rng([seed, n, d, span])

    def draw(count: int) -> Array:
        found = []
        step = max(1, HELD // (d * span))
        for begin in range(0, count, step):
            x = rng.standard_normal((min(step, count - begin), d, span))
            if centred:
                x -= x.mean(1, keepdims=True)
            if span > 1:
                x = np.linalg.qr(x)[0]
                x *= rng.choice(np.array([-1.0, 1.0]), (len(x), 1, span))  # the sign of a column is LAPACK's choice
            found.append(effects_of(np.swapaxes(x, 1, 2), labels, effects))
        return np.concatenate(found)

    return draw


def sign_draws(
    frame: Array, labels: Array, axes: Array, effects: RankEffects, seed: int, row: int
) -> Callable[[int], Array]:
    """Effects on one direction or span ``frame [span, d]`` with random signs along the principal ``axes`` (columns)."""
    coordinates, turned = frame @ axes, labels @ axes
    rng = np.random.default_rng([seed, *labels.shape, row])

    def draw(count: int) -> Array:
        found = []
        step = max(1, HELD // frame.size)
        for begin in range(0, count, step):
            signs = rng.choice(np.array([-1.0, 1.0]), (min(step, count - begin), 1, len(axes)))
            found.append(effects_of(coordinates * signs, turned, effects))
        return np.concatenate(found)

    return draw


class Cleared(NamedTuple):
    """The p-values of rows, and how they were found."""

    p_value: Array  # [rows], of the smallest
    each: Array  # [rows, factors]
    z: Array  # [rows, factors]: how many of the draws' standard deviations an effect lies above their mean
    draws: int


def until_clear(draw: Callable[[int], Array], observed: Array, most: int, first: int = FIRST) -> Cleared:
    """p-values of rows ``observed [rows, factors]``, with fewer than ``most`` draws where fewer are enough.

    A row is done when ``CLEAR`` draws are as extreme (Besag and Clifford, "Sequential Monte Carlo p-values", 1991): its
    p is then known to a seventh of itself, and is too large to be a discovery among many rows.
    """
    p, each = np.ones(len(observed)), np.ones(observed.shape)
    drawn, going, wanted = np.empty((0, observed.shape[1])), np.arange(len(observed)), min(first, most)
    while True:
        drawn = np.concatenate([drawn, draw(wanted - len(drawn))])
        tested = SmallestP.of(drawn).test(observed[going])
        p[going], each[going] = tested
        going = going[tested.p_value * (1 + len(drawn)) < CLEAR]
        if not len(going) or len(drawn) >= most:
            spread = np.maximum(drawn.std(0), 1e-12)
            return Cleared(p, each, (observed - drawn.mean(0)) / spread, len(drawn))
        wanted = min(most, STEPS * len(drawn))
