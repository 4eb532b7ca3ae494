"""Laws that the statistics of outcomes obey whatever the data."""

from __future__ import annotations

import warnings

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dt_lens.errors import DtLensError
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
from dt_lens.statistics.rank_correlation import rank_correlation

# A busy machine draws and runs slowly; that says nothing about the statistics.
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

values = arrays(np.float64, st.integers(1, 30), elements=st.integers(-3000, 3000).map(float))
episodes = st.integers(1, 30).flatmap(
    lambda n: st.tuples(arrays(np.int64, n, elements=st.integers(1, 20)), arrays(np.bool_, n))
)


@SETTINGS
@given(values)
def test_iqm_lies_between_the_quartiles(x: np.ndarray) -> None:
    assert x.min() <= iqm(x) <= x.max()
    np.testing.assert_allclose(iqm(x + 7), iqm(x) + 7, atol=1e-9)
    np.testing.assert_allclose(iqm(-x), -iqm(x), atol=1e-9)


@settings(SETTINGS, max_examples=40)
@given(values)
def test_intervals_never_fail(x: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = bootstrap_interval(x, resamples=200)
        middle = bootstrap_interval(x, iqm, resamples=200)
    if len(x) > 1 and np.ptp(x) > 0:
        assert low <= x.mean() <= high and low < high
    else:
        assert np.isnan(low) and np.isnan(high) and np.isnan(middle).all()
    assert interval_note(x).startswith("no interval") == bool(np.isnan(low))
    assert np.isnan(middle).all() or middle.low <= iqm(x) <= middle.high


numbers_of_all_kinds = st.sampled_from([0.0, 0.5, 1.0, -2.5, 1e-9, 1e300, -1e300, np.nan, np.inf, -np.inf])
anything = arrays(np.float64, st.tuples(st.just(2), st.integers(1, 9)), elements=numbers_of_all_kinds)


@settings(SETTINGS, max_examples=30)
@given(anything)
def test_a_statistic_of_a_nan_is_nan_and_no_p_value_is_zero(pair: np.ndarray) -> None:
    x, y = pair
    known = bool(np.isfinite(x).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ps = {"sign_flip": sign_flip(x, resamples=100), "mean_test": mean_test(x, resamples=100)}
        ps["mcnemar"] = mcnemar(x, x > 0)
        ps["logrank"] = logrank(np.abs(x), x > 0, np.abs(x[:1]), [True])[1]
        numbers = [*bootstrap_interval(x, resamples=100), *bootstrap_interval(x, iqm, resamples=100), cohen_dz(x)]
        numbers.append(iqm(x))
        found = rank_correlation(x, y, resamples=50)
    for name, p in ps.items():
        assert 0 < p <= 1 or (np.isnan(p) and (not known or name == "mean_test")), name
        assert known or np.isnan(p), name
    assert known or np.isnan(numbers).all()
    assert 0 < found.p_value <= 1 and found.n <= int((np.isfinite(x) & np.isfinite(y)).sum())
    for adjust in (holm, q_values):
        try:
            adjusted = np.asarray(adjust(x))
        except DtLensError:
            assert not ((x >= 0) & (x <= 1)).all()
        else:
            assert ((x <= adjusted) & (adjusted <= 1)).all()
    p = tail_or_share(np.clip(x, 0, None), 0.5, 50)
    assert (np.isnan(p) == np.isnan(x)).all()
    assert not (p <= 0).any()


@settings(SETTINGS, max_examples=50)
@given(values)
def test_sign_flip_ignores_direction_and_scale(x: np.ndarray) -> None:
    p = sign_flip(x, resamples=500, seed=1)
    assert 0 < p <= 1
    assert p == sign_flip(-x, resamples=500, seed=1) == sign_flip(2 * x, resamples=500, seed=1)
    assert np.isnan(cohen_dz(x)) or cohen_dz(-x) == -cohen_dz(x)


@SETTINGS
@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson_holds_the_proportion(k: int, n: int) -> None:
    k = min(k, n)
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high
    assert wilson(n - k, n) == (1 - high, 1 - low) or np.allclose(wilson(n - k, n), (1 - high, 1 - low))


@SETTINGS
@given(arrays(np.bool_, st.tuples(st.just(2), st.integers(1, 40))))
def test_mcnemar_is_symmetric(pairs: np.ndarray) -> None:
    assert 0 < mcnemar(pairs[0], pairs[1]) <= 1
    assert mcnemar(pairs[0], pairs[1]) == mcnemar(pairs[1], pairs[0])
    assert mcnemar(pairs[0], pairs[1]) == mcnemar(~pairs[0], ~pairs[1])


@SETTINGS
@given(episodes)
def test_survival_falls_from_one(episode: tuple[np.ndarray, np.ndarray]) -> None:
    times, ended = episode
    curve = kaplan_meier(times, ended)
    assert np.all(np.diff(curve.survival) <= 0)
    assert np.all((curve.low <= curve.survival) & (curve.survival <= curve.high))
    assert curve.at_risk[0] == len(times)
    for t, s, n in zip(curve.times, curve.survival, curve.at_risk, strict=True):
        assert n == (times >= t).sum()
        if ended.all():  # without censoring it is the plain share
            assert np.isclose(s, (times > t).mean())


@settings(SETTINGS, max_examples=50)
@given(episodes, episodes)
def test_logrank_is_antisymmetric_and_finite(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistic, p = logrank(*a, *b)
    assert np.isfinite(statistic)
    assert 0 <= p <= 1
    np.testing.assert_allclose(logrank(*b, *a), (-statistic, p), atol=1e-9)
    assert logrank(*a, *a) == (0.0, 1.0) or abs(logrank(*a, *a)[0]) < 1e-9


@settings(SETTINGS, max_examples=30)
@given(arrays(np.float64, st.tuples(st.just(2), st.integers(1, 20)), elements=st.integers(-9, 9).map(float)))
def test_a_rank_correlation_sees_ranks_only(pairs: np.ndarray) -> None:
    x, y = pairs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = rank_correlation(x, y, resamples=200)
    np.testing.assert_allclose(found, rank_correlation(x**3, 5 * y + 1, resamples=200), atol=1e-12)
    assert np.isnan(found.rho) or -1 - 1e-12 <= found.rho <= 1 + 1e-12
    assert 0 < found.p_value <= 1
