"""Correlations at equal size without bins: calibrated whatever the shape of the relation to size, and with power."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from dt_lens.statistics.local_linear import beside_neighbours

Array = NDArray[np.float64]
# How x and y depend on size.
SHAPES: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "linear": (lambda s: 2 * s, lambda s: 2 * s),
    "threshold": (lambda s: 3.0 * (s > 0.85), lambda s: 3.0 * (s > 0.85)),
    "valley": (lambda s: 12 * (s - 0.5) ** 2, lambda s: 3.0 * (s > 0.85)),
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_nothing_but_size(shape: str) -> None:
    """Both depend on size and not on each other: p <= 0.05 in 2.5 to 6.5 %, but for a test's own luck."""
    rng, runs, found = np.random.default_rng(7), 200, 0
    size, strata = np.tile(np.arange(127.0), 2), np.repeat([0, 1], 127)
    of_x, of_y = (part(size / 126) for part in SHAPES[shape])
    for _ in range(runs):
        x, y = rng.standard_normal((2, 254))
        found += beside_neighbours(of_x + x, of_y + y, size, strata).p_value <= 0.05
    assert stats.binom.ppf(0.01, runs, 0.025) <= found <= stats.binom.ppf(0.99, runs, 0.065), found


def test_a_relation_beyond_size_and_its_interval() -> None:
    rng, covers, hits = np.random.default_rng(3), 0, 0
    for _ in range(30):
        size = rng.random(120)
        shared = rng.standard_normal(120)
        x, y = (3 * size + shared + rng.standard_normal(120) for _ in range(2))
        found = beside_neighbours(x, y, size)
        assert found.n == 120
        covers += found.low <= 0.48 <= found.high  # Pearson's 0.5 in ranks
        hits += found.p_value < 0.05
    assert covers >= 24
    assert hits >= 25


def test_few_and_flat_columns() -> None:
    assert beside_neighbours([1, 2, 3], [1, 2, 3], [1, 2, 3]).n == 0
    flat = beside_neighbours(np.ones(20), np.arange(20.0), np.arange(20.0))
    assert (flat.p_value, flat.n) == (1.0, 20)
    with_holes = np.append(np.random.default_rng(0).random(30), np.nan)
    assert beside_neighbours(with_holes, with_holes[::-1], np.arange(31.0)).n == 29
