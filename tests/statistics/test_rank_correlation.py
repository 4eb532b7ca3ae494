"""Rank correlations against Spearman's, the textbook's partial one, and their own calibration."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dt_lens.statistics.rank_correlation import at_equal_size, rank_correlation, rank_correlation_difference


def test_without_strata_it_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(40)
    y = x + 0.5 * rng.standard_normal(40)
    y[:5] = 0.0  # ties
    found, theirs = rank_correlation(x, y), stats.spearmanr(x, y)
    assert found.rho == pytest.approx(theirs.statistic, abs=1e-12)
    assert found.low < found.rho < found.high
    assert found.n == 40
    assert found.p_value < 0.01
    assert rank_correlation(x, y) == found


def test_levels_of_strata_have_no_effect() -> None:
    rng = np.random.default_rng(1)
    strata = np.repeat(np.arange(4), 25)
    x, y = rng.standard_normal(100) + 10 * strata, rng.standard_normal(100) + 10 * strata
    assert stats.spearmanr(x, y).statistic > 0.8
    found = rank_correlation(x, y, strata)
    assert abs(found.rho) < 0.3
    assert found.low < 0 < found.high
    assert found.p_value > 0.05


def test_what_is_given_is_held_fixed() -> None:
    rng = np.random.default_rng(2)
    size = rng.standard_normal(300)
    x, y = size + 0.3 * rng.standard_normal(300), size + 0.3 * rng.standard_normal(300)
    assert rank_correlation(x, y).rho > 0.8
    partial = rank_correlation(x, y, given=size)
    # The textbook's formula for three variables.
    a, b, c = (stats.spearmanr(*pair).statistic for pair in ((x, y), (x, size), (y, size)))
    assert partial.rho == pytest.approx((a - b * c) / np.sqrt((1 - b**2) * (1 - c**2)), abs=1e-12)
    assert abs(partial.rho) < 0.2
    assert np.isnan(rank_correlation(x, y, given=x).rho)


SHAPES = {
    "even": (lambda s: 2 * s, lambda s: 2 * s),
    "the largest twenty stand out": (lambda s: 3.0 * (s > 0.85), lambda s: 3.0 * (s > 0.85)),
    "a valley and a threshold": (lambda s: 12 * (s - 0.5) ** 2, lambda s: 3.0 * (s > 0.85)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_at_equal_size_removes_every_relation_with_size(shape: str) -> None:
    """A partial correlation removes only what is linear in ranks, and finds a relation where there is more."""
    rng, trials, rejected = np.random.default_rng(6), 60, 0
    size, strata = np.tile(np.linspace(0, 1, 127), 2), np.repeat([0, 1], 127)
    of_x, of_y = (part(size) for part in SHAPES[shape])
    linear = 0
    for seed in range(trials):
        x, y = rng.standard_normal((2, 254))
        found = at_equal_size(of_x + x, of_y + y, size, strata, seed=seed)
        assert found.n == 254
        rejected += found.p_value <= 0.05
        linear += rank_correlation(of_x + x, of_y + y, strata, given=size, resamples=200, seed=seed).p_value <= 0.05
    assert stats.binomtest(rejected, trials, 0.05, alternative="greater").pvalue > 1e-3
    assert shape == "even" or linear > trials / 2


def test_at_equal_size_finds_a_real_relation() -> None:
    rng, covered = np.random.default_rng(7), 0
    size = np.linspace(0, 1, 254)
    found = []
    for seed in range(60):
        x, y = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 254).T
        found.append(at_equal_size(x + 9 * size, y + 9 * size, size, seed=seed))
    mean = np.mean([f.rho for f in found])
    assert 0.4 < mean < 0.6  # ranks among six are coarse
    covered = sum(f.low <= mean <= f.high for f in found)
    assert covered >= 52
    assert max(f.p_value for f in found) < 0.05
    few = at_equal_size([1, 2, 3], [1, 2, 3], [3, 1, 2])
    assert (few.rho, few.n) == (1.0, 3)
    assert np.isnan(few.low)


def test_p_is_uniform_and_intervals_cover_under_the_null() -> None:
    rng = np.random.default_rng(3)
    strata = np.repeat([0, 1, 2], 12)
    trials = 300
    found = [
        rank_correlation(rng.standard_normal(36), rng.standard_normal(36), strata, resamples=200, seed=i)
        for i in range(trials)
    ]
    rejected = sum(f.p_value <= 0.05 for f in found)
    assert stats.binomtest(rejected, trials, 0.05).pvalue > 1e-3
    covered = sum(f.low <= 0 <= f.high for f in found)
    assert covered > 0.88 * trials


def test_the_better_predictor_is_found() -> None:
    rng = np.random.default_rng(4)
    strata = np.repeat(np.arange(3), 60)
    y = rng.standard_normal(180) + strata
    good, poor = y + 0.3 * rng.standard_normal(180), y + 2.0 * rng.standard_normal(180)
    found = rank_correlation_difference(good, poor, y, strata)
    assert found.rho == pytest.approx(
        rank_correlation(good, y, strata).rho - rank_correlation(poor, y, strata).rho, abs=1e-12
    )
    assert 0 < found.low < found.rho < found.high
    assert found.p_value < 0.01
    mirrored = rank_correlation_difference(poor, good, y, strata)
    assert mirrored.rho == pytest.approx(-found.rho)
    same = rank_correlation_difference(good, good, y, strata)
    assert (same.rho, same.p_value) == (0.0, 1.0)


def test_each_predictor_with_its_own_outcome() -> None:
    rng = np.random.default_rng(5)
    strata = np.repeat(np.arange(2), 50)
    first, second = rng.standard_normal((2, 100))
    y, other = first + 0.3 * rng.standard_normal(100), second + 3 * rng.standard_normal(100)
    found = rank_correlation_difference(first, second, y, strata, second_y=other)
    one, two = rank_correlation(first, y, strata).rho, rank_correlation(second, other, strata).rho
    assert found.rho == pytest.approx(one - two, abs=1e-12)
    assert found.low > 0.3
    # The second does not predict the first's outcome.
    assert abs(rank_correlation(second, y, strata).rho) < abs(two)


@pytest.mark.parametrize(
    ("x", "y"), [([], []), ([1, 2], [2, 1]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([np.nan] * 5, [1] * 5)]
)
def test_an_undefined_correlation_is_nan(x: list[float], y: list[float]) -> None:
    found = rank_correlation(x, y)
    assert np.isnan(found.rho)
    assert found.p_value == 1.0
    assert np.isnan(rank_correlation_difference(x, x, y).rho)
