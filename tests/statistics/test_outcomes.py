"""The statistics against published numbers and formulas, and the coverage of their intervals."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from dt_lens.errors import DtLensError
from dt_lens.statistics.local_linear import beside_neighbours
from dt_lens.statistics.multiplicity import holm, q_values, tail_or_share
from dt_lens.statistics.outcomes import (
    bootstrap_interval,
    cohen_dz,
    interval_note,
    iqm,
    kaplan_meier,
    logrank,
    mcnemar,
    mean_test,
    sign_flip,
    wilson,
)
from dt_lens.statistics.rank_correlation import rank_correlation, spearman_brown

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


def test_the_interval_of_a_mean_is_the_textbooks_studentised_bootstrap() -> None:
    """Efron and Tibshirani's recipe in a plain loop; the quantiles are of the t statistics, and change places."""
    x = np.random.default_rng(5).lognormal(size=40)
    rng, t = np.random.default_rng(2), []
    for _ in range(2000):
        again = rng.choice(x, 40)
        t.append((again.mean() - x.mean()) / (again.std(ddof=1) / math.sqrt(40)))
    error = x.std(ddof=1) / math.sqrt(40)
    expected = (x.mean() - np.quantile(t, 0.975) * error, x.mean() - np.quantile(t, 0.025) * error)
    found = bootstrap_interval(x, resamples=20_000)
    assert found == pytest.approx(expected, rel=0.06)
    assert found.high - x.mean() > 1.5 * (x.mean() - found.low)  # the long tail is on the right
    low, high = bootstrap_interval(1e6 - 7 * x, resamples=20_000)
    assert (low, high) == pytest.approx((1e6 - 7 * found.high, 1e6 - 7 * found.low), abs=0.2)


RARE = np.array([1.0] * 190 + [0.0] * 10)


@pytest.mark.parametrize(
    ("draw", "mean"),
    [
        (lambda rng: rng.permutation(np.where(rng.random(200) < 0.05, 0.0, 1.0)), 0.95),
        (lambda rng: rng.lognormal(0, 1, 200), math.exp(0.5)),
        (lambda rng: np.where(rng.random(200) < 0.5, rng.normal(300, 100, 200), rng.normal(3000, 200, 200)), 1650.0),
    ],
    ids=["one in twenty fails", "lognormal", "two humps"],
)
def test_the_interval_covers_what_agents_do(draw: object, mean: float) -> None:
    """At least 93 %, less three standard errors of 300 samples; ``benchmarks/interval_coverage.py`` has 2,000."""
    rng, hits = np.random.default_rng(3), 0
    for seed in range(300):
        low, high = bootstrap_interval(draw(rng), resamples=400, seed=seed)  # type: ignore[operator]
        hits += low <= mean <= high
    assert hits / 300 >= 0.93 - 3 * math.sqrt(0.93 * 0.07 / 300)


def test_where_the_interval_covers_less_a_note_says_so() -> None:
    assert interval_note(RARE) == ""
    assert interval_note(RARE[:199]) == "fewer than 200 outcomes"
    assert interval_note(RARE[:192], "episodes") == "fewer than five rare episodes seen (2) and fewer than 200 episodes"
    assert interval_note(np.append(np.random.default_rng(0).normal(size=300), [40.0])).startswith(
        "fewer than five rare"
    )
    assert interval_note(np.random.default_rng(0).normal(size=300)) == ""
    # One resample in 150 does not vary: that is too many for the 0.5 % quantile, and few enough for the 2.5 %.
    few = [1.0] * 195 + [0.0] * 5
    assert all(np.isfinite(bootstrap_interval(few, confidence=level)).all() for level in (0.8, 0.95, 0.99, 0.999))
    assert interval_note(np.ones(300), "windows") == "no interval: all 300 windows are equal"
    assert interval_note([2.0]) == "no interval: fewer than two outcomes"
    assert interval_note([2.0, math.nan]) == "no interval: not all outcomes are finite"


def test_bootstrap_of_extreme_samples() -> None:
    for statistic in (np.mean, iqm, np.median):
        assert all(np.isnan(bootstrap_interval([3.0, 3.0, 3.0], statistic)))  # nothing is known of how much it varies
        assert all(np.isnan(bootstrap_interval([3.0], statistic)))
        assert all(np.isnan(bootstrap_interval([], statistic)))
    assert all(np.isnan(bootstrap_interval([0.0] * 30 + [1.0], iqm)))  # the middle half is equal
    # Most resamples of one failure among twenty hold too few of them for quantiles of t: the interval is Student's.
    x = np.array([1.0] * 19 + [0.0])
    assert bootstrap_interval(x) == pytest.approx(stats.ttest_1samp(x, 0).confidence_interval())
    low, high = bootstrap_interval(np.append(x, x), np.median)
    assert 0.0 <= low <= high <= 1.0


def test_the_mean_test_is_the_intervals() -> None:
    x = np.random.default_rng(5).lognormal(size=40)
    low, high = bootstrap_interval(x)
    for end, inward in ((low, 0.02), (high, -0.02)):
        assert mean_test(x - end - inward) > 0.05 > mean_test(x - end + inward)
    few = np.array([1.0] * 19 + [0.0])
    assert mean_test(few - 0.9) == pytest.approx(stats.ttest_1samp(few, 0.9).pvalue)
    assert mean_test(np.zeros(5)) == 1.0
    assert np.isnan(mean_test(np.full(5, 2.0))) and np.isnan(mean_test([2.0]))
    assert mean_test(x, seed=4) == mean_test(x, seed=4)


def test_sign_flips_test_symmetry_and_the_mean_test_the_mean() -> None:
    """Skewed differences with mean 0: sign flips reject them too often, and a t statistic would not change that."""
    rng = np.random.default_rng(6)
    samples = rng.lognormal(0, 1, (300, 50)) - math.exp(0.5)
    flips = np.mean([sign_flip(d, resamples=400, seed=i) <= 0.05 for i, d in enumerate(samples)])
    means = np.mean([mean_test(d, resamples=400, seed=i) <= 0.05 for i, d in enumerate(samples)])
    assert means < 0.1 and flips > 0.08
    d = samples[0][:10]
    signs = 1 - 2 * ((np.arange(2**10)[:, None] >> np.arange(10)) & 1)
    t = np.abs(stats.ttest_1samp(signs * d, 0, axis=1).statistic)
    assert sign_flip(d) == pytest.approx((t >= t[0] - 1e-9).mean())


def test_no_statistic_ranks_a_nan() -> None:
    """49 plain pairs and one NaN gave p = 1e-4."""
    d = np.random.default_rng(0).normal(size=50)
    for bad in (math.nan, math.inf, -math.inf):
        spoilt = np.append(d[:49], bad)
        numbers = [iqm(spoilt), cohen_dz(spoilt), sign_flip(spoilt), sign_flip(spoilt[-3:]), mean_test(spoilt)]
        numbers += [
            *bootstrap_interval(spoilt),
            *bootstrap_interval(spoilt, iqm),
            mcnemar(spoilt, d),
            mcnemar(d, spoilt),
        ]
        numbers += [*logrank(np.abs(spoilt), d > 0, np.abs(d), d > 0), *logrank(np.abs(d), spoilt, np.abs(d), d > 0)]
        numbers += [*wilson(bad, 10), *wilson(1, bad), spearman_brown(math.nan)]  # type: ignore[arg-type]
        numbers += [float(tail_or_share([math.nan], [0.2], 99)[0])]
        assert np.isnan(numbers).all(), (bad, numbers)
        with pytest.raises(DtLensError, match="finite"):
            kaplan_meier(np.abs(spoilt), d > 0)
        for adjust in (holm, q_values):
            with pytest.raises(DtLensError, match="numbers between 0 and 1"):
                adjust(spoilt)
        assert rank_correlation(d, spoilt, resamples=50) == rank_correlation(d[:49], d[:49], resamples=50)  # left out
    with pytest.raises(DtLensError, match="3 successes in 2 tries"):
        wilson(3, 2)


def test_no_p_value_is_zero() -> None:
    many = np.ones(3000, bool)
    assert 0 < mcnemar(many, ~many) < 1e-300
    assert 0 < logrank(np.full(4000, 1.0), many[:1].repeat(4000), np.full(4000, 9.0), many[:1].repeat(4000))[1] < 1e-300
    assert 0 < float(tail_or_share([0.0], [0.0], 9)[0]) < 1e-300
    assert 0 < mean_test([1.0] * 10 + [1.0 + 1e-12]) < 1e-20
    x = np.arange(4000.0) % 97
    assert 0 < beside_neighbours(x, x, np.arange(4000.0), np.arange(4000) % 40).p_value < 1e-300


def test_sign_flip_is_calibrated() -> None:
    rng = np.random.default_rng(1)
    ps = [sign_flip(rng.standard_t(3, size=20), resamples=400, seed=i) for i in range(400)]
    assert 6 <= sum(p <= 0.05 for p in ps) <= 36


def test_what_samples_repeats_exactly() -> None:
    x = np.random.default_rng(0).normal(size=30)
    assert bootstrap_interval(x, seed=4) == bootstrap_interval(x, seed=4) != bootstrap_interval(x, seed=5)
    assert sign_flip(x, seed=4) == sign_flip(x, seed=4)
