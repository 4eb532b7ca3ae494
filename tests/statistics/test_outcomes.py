"""The statistics against published numbers and formulas, and the coverage of their intervals."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from dt_lens.statistics.outcomes import (
    bootstrap_interval,
    cohen_dz,
    iqm,
    kaplan_meier,
    logrank,
    mcnemar,
    sign_flip,
    wilson,
)

# Freireich et al. (1963): weeks in remission under 6-mercaptopurine and placebo, the textbook example of survival data.
TREATED = [6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35]
RELAPSED = [1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
PLACEBO = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]
ALL = [1] * 21


def test_kaplan_meier_is_the_textbooks() -> None:
    curve = kaplan_meier(TREATED, RELAPSED)
    published = {6: 0.857, 7: 0.807, 10: 0.753, 13: 0.690, 16: 0.627, 22: 0.538, 23: 0.448}
    at_risk = {6: 21, 7: 17, 10: 15, 13: 12, 16: 11, 22: 7, 23: 6}
    for time, survival in published.items():
        i = list(curve.times).index(time)
        assert curve.survival[i] == pytest.approx(survival, abs=5e-4)
        assert curve.at_risk[i] == at_risk[time]
        assert curve.low[i] < survival < curve.high[i]
    # The log-log interval at week 10 (as R's survfit gives it with conf.type "log-log").
    i = list(curve.times).index(10)
    assert (curve.low[i], curve.high[i]) == (pytest.approx(0.503, abs=1e-3), pytest.approx(0.889, abs=1e-3))


def test_kaplan_meier_is_the_formula() -> None:
    """The product over times, and Greenwood's variance on the log-log scale, written out in plain loops."""
    rng = np.random.default_rng(0)
    times, ended = rng.integers(1, 40, 80), rng.random(80) < 0.6
    curve = kaplan_meier(times, ended, confidence=0.9)
    survival, variance, z = 1.0, 0.0, stats.norm.ppf(0.95)
    for i, time in enumerate(sorted(set(times.tolist()))):
        at_risk = sum(t >= time for t in times)
        ends = sum(t == time and e for t, e in zip(times, ended, strict=True))
        survival *= 1 - ends / at_risk
        variance += ends / (at_risk * (at_risk - ends))
        spread = math.exp(z * math.sqrt(variance) / abs(math.log(survival)))
        assert (curve.times[i], curve.at_risk[i]) == (time, at_risk)
        row = (curve.survival[i], curve.low[i], curve.high[i])
        assert row == pytest.approx((survival, survival**spread, survival ** (1 / spread)), rel=1e-12)
    assert len(curve.times) == i + 1


THIRD, FIFTH = 1 / 3, 1 / 5


@pytest.mark.parametrize(
    ("times", "ended", "survival", "at_risk"),
    [
        ([5, 5, 7], [0, 0, 0], [1, 1], [3, 1]),  # nothing ended
        ([5, 6, 7], [1, 1, 1], [2 * THIRD, THIRD, 0], [3, 2, 1]),  # everything did
        ([4, 4, 4], [1, 1, 1], [0], [3]),  # at once
        ([5, 5, 5, 6, 6], [1, 0, 1, 0, 1], [3 * FIFTH, 1.5 * FIFTH], [5, 2]),  # an end counts before a cut at its time
        ([1, 2, 3], [1, 1, 0], [2 * THIRD, THIRD, THIRD], [3, 2, 1]),  # the last was cut
        ([4], [1], [0], [1]),
        ([4], [0], [1], [1]),
        ([], [], [], []),
    ],
)
def test_kaplan_meier_at_the_edges(
    times: list[int], ended: list[int], survival: list[float], at_risk: list[int]
) -> None:
    """The interval has no width where nothing has ended or nothing is left, and no warning is shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curve = kaplan_meier(times, ended)
    assert curve.times.tolist() == sorted(set(times))
    assert curve.survival.tolist() == pytest.approx(survival, rel=1e-12, abs=0)
    assert (curve.at_risk.tolist(), curve.at_risk.dtype) == (at_risk, np.int64)
    for s, low, high in zip(curve.survival, curve.low, curve.high, strict=True):
        assert low == s == high if s in (0, 1) else low < s < high


def test_logrank_is_the_textbooks() -> None:
    statistic, p = logrank(PLACEBO, ALL, TREATED, RELAPSED)
    assert statistic**2 == pytest.approx(16.79, abs=5e-3)
    assert p == pytest.approx(4.2e-5, rel=0.02)
    assert statistic > 0  # placebo relapses earlier
    assert logrank(TREATED, RELAPSED, PLACEBO, ALL) == pytest.approx((-statistic, p))


def test_logrank_without_any_information() -> None:
    assert logrank([1000] * 5, [0] * 5, [1000] * 5, [0] * 5) == (0.0, 1.0)  # nobody dies
    assert logrank([5] * 4, [1] * 4, [5] * 4, [1] * 4) == (0.0, 1.0)  # everybody dies at once
    assert logrank([3], [1], [1000] * 3, [0] * 3)[1] < 1.0


def test_wilson_against_wilson() -> None:
    assert wilson(15, 148) == (pytest.approx(0.0624, abs=1e-4), pytest.approx(0.1605, abs=1e-4))  # Newcombe (1998)
    assert wilson(0, 20) == (0.0, pytest.approx(0.1611, abs=1e-4))
    assert wilson(20, 20)[1] == 1.0
    assert all(np.isnan(wilson(0, 0)))


def test_mcnemar() -> None:
    first = np.array([True] * 10 + [False] * 2 + [True] * 30)
    second = np.array([False] * 10 + [True] * 2 + [True] * 30)
    assert mcnemar(first, second) == pytest.approx(2 * sum(stats.binom.pmf(k, 12, 0.5) for k in range(3)))
    assert mcnemar(first, first) == 1.0


def test_sign_flip_is_the_exact_test_when_it_can_be() -> None:
    # Darwin's maize, the data on which Fisher (1935) introduced the test: 1,726 of 32,768 sums are as extreme.
    maize = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert sign_flip(maize, resamples=2**15) == pytest.approx(1726 / 32768)
    assert sign_flip(maize, resamples=10_000, seed=3) == pytest.approx(1726 / 32768, abs=0.006)


def test_sign_flip_of_extreme_data() -> None:
    assert sign_flip(np.zeros(30)) == 1.0
    assert sign_flip([5.0]) == 1.0  # one pair proves nothing
    assert sign_flip(np.full(100, 2.0)) == pytest.approx(1 / 10_001)
    assert sign_flip([]) == 1.0


def test_effect_size() -> None:
    assert cohen_dz([1.0, 2.0, 3.0]) == 2.0
    assert cohen_dz(np.zeros(4)) == 0.0
    assert cohen_dz(np.full(4, -2.0)) == -np.inf
    assert np.isnan(cohen_dz([1.0]))


def test_iqm() -> None:
    assert iqm(np.arange(8.0)) == np.mean([2, 3, 4, 5])
    assert iqm([1.0, 1000.0, 2.0, 3.0]) == 2.5
    np.testing.assert_allclose(iqm(np.arange(24.0).reshape(3, 8)), [3.5, 11.5, 19.5])


@pytest.mark.parametrize("statistic", [np.mean, iqm])
def test_bootstrap_covers(statistic: object) -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(400):
        low, high = bootstrap_interval(rng.normal(5, 2, 60), statistic, resamples=500, seed=i)  # type: ignore[arg-type]
        hits += low <= 5 <= high
    assert 0.90 <= hits / 400 <= 0.98  # 95 %, less what a bootstrap of 60 falls short, give or take three errors


def test_bootstrap_of_extreme_samples() -> None:
    assert bootstrap_interval([3.0, 3.0, 3.0]) == (3.0, 3.0)
    assert all(np.isnan(bootstrap_interval([3.0])))
    assert all(np.isnan(bootstrap_interval([])))
    low, high = bootstrap_interval([0.0] * 30 + [1.0], iqm)  # the correction is undefined here
    assert 0.0 <= low <= high <= 1.0


def test_sign_flip_is_calibrated() -> None:
    rng = np.random.default_rng(1)
    ps = [sign_flip(rng.standard_t(3, size=20), resamples=400, seed=i) for i in range(400)]
    assert 6 <= sum(p <= 0.05 for p in ps) <= 36


def test_what_samples_repeats_exactly() -> None:
    x = np.random.default_rng(0).normal(size=30)
    assert bootstrap_interval(x, seed=4) == bootstrap_interval(x, seed=4) != bootstrap_interval(x, seed=5)
    assert sign_flip(x, seed=4) == sign_flip(x, seed=4)
