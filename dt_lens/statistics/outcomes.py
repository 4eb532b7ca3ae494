"""Statistics of outcomes: pure functions of arrays, whose random draws are repeatable to the bit.

Every interval is a pair (low, high) at the given confidence; ``(nan, nan)`` if the data allow none, never an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = [
    "Interval",
    "SurvivalCurve",
    "bootstrap_interval",
    "cohen_dz",
    "iqm",
    "kaplan_meier",
    "logrank",
    "mcnemar",
    "sign_flip",
    "wilson",
]

Float = NDArray[np.float64]
RESAMPLES = 10_000


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


_NONE = Interval(float("nan"), float("nan"))


def iqm(values: ArrayLike, axis: int = -1) -> Any:
    """The interquartile mean: the mean of the middle half.

    ``int(n / 4)`` values are cut off at each end, as by ``scipy.stats.trim_mean``. It is less sensitive to outliers
    than the mean and less noisy than the median (Agarwal et al., "Deep Reinforcement Learning at the Edge of the
    Statistical Precipice", 2021).

    >>> float(iqm([0.0, 1.0, 2.0, 100.0]))
    1.5
    """
    return stats.trim_mean(np.asarray(values, dtype=np.float64), 0.25, axis=axis)


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a statistic of one sample ``values [n]``; for paired differences, the paired bootstrap.

    Bias-corrected and accelerated (Efron, "Better bootstrap confidence intervals", 1987), or plain percentiles where
    the correction is undefined, as for values that are nearly all equal. ``statistic`` must take ``axis``. If all the
    values are equal the interval has no width: a sample that does not vary says nothing about how much it could.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2 or not np.isfinite(x).all():
        return _NONE
    if np.ptp(x) == 0:
        value = float(statistic(x, axis=-1))
        return Interval(value, value)
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            result = stats.bootstrap(
                (x,),
                statistic,
                n_resamples=resamples,
                confidence_level=confidence,
                method=method,
                vectorized=True,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite(result.low) and np.isfinite(result.high):
            return Interval(float(result.low), float(result.high))
    return _NONE


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (1927), which is sound near 0 and 1, where the textbook one has no width.

    >>> low, high = wilson(0, 100)
    >>> low, round(high, 3)
    (0.0, 0.037)
    """
    if n == 0:
        return _NONE
    ci = stats.binomtest(int(successes), int(n)).proportion_ci(confidence, method="wilson")
    # Rounding can leave 1e-18 where the formula says 0.
    low, high = (0.0 if successes == 0 else float(ci.low)), (1.0 if successes == n else float(ci.high))
    return Interval(low, high)


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Two-sided p of McNemar's exact test that two paired yes/no outcomes ``[n]`` are yes equally often.

    Only pairs that differ count: under the null each is a fair coin (McNemar 1947, in its exact binomial form). 1.0 if
    none differs.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b).pvalue)


def sign_flip(differences: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p that paired differences ``[n]`` are symmetric about 0, by flipping their signs (Fisher 1935).

    The statistic is the mean. All ``2**n`` flips are tried if there are no more than ``resamples`` of them; otherwise
    that many are drawn, and the data count as one more, so p is never 0 (Phipson and Smyth 2010). 1.0 if all
    differences are zero.
    """
    d = np.asarray(differences, dtype=np.float64)
    d = d[d != 0]  # a flipped zero is a zero
    if len(d) == 0:
        return 1.0
    observed = abs(d.sum())
    slack = 1e-12 * np.abs(d).sum()  # a sum that is equal but for rounding must count as equal
    if 2 ** len(d) <= resamples:
        signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
        return float((np.abs(signs @ d) >= observed - slack).mean())
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, size=(resamples, len(d)), dtype=np.int8) * 2 - 1
    as_extreme = int((np.abs(signs @ d) >= observed - slack).sum())
    return (as_extreme + 1) / (resamples + 1)


def cohen_dz(differences: ArrayLike) -> float:
    """Cohen's d_z: the mean paired difference ``[n]`` over the standard deviation of the differences (Cohen 1988).

    0.0 if all are zero; infinite if all are equal but not zero; ``nan`` for fewer than two.
    """
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < 2:
        return float("nan")
    mean, std = float(d.mean()), float(d.std(ddof=1))
    if np.ptp(d) == 0:
        return 0.0 if mean == 0 else float(np.copysign(np.inf, mean))
    return mean / std


class SurvivalCurve(NamedTuple):
    """The share of episodes still running, at every time at which one ended or was cut."""

    times: Float  # [k], ascending, in steps
    survival: Float  # [k], the estimate just after each time
    at_risk: NDArray[np.int64]  # [k], episodes still observed just before it
    low: Float  # [k], pointwise interval
    high: Float  # [k]


def kaplan_meier(times: ArrayLike, ended: ArrayLike, confidence: float = 0.95) -> SurvivalCurve:
    """Kaplan and Meier's estimate (1958) of the share still running, with the log-log Greenwood interval.

    Args:
        times: ``[n]`` lengths of episodes, in steps.
        ended: ``[n]`` true where the episode ended by itself at that time; false where it was cut (censored): it is
            known only to have lasted at least so long.
        confidence: of the pointwise interval.
    """
    durations = _durations(times, ended)
    curve = stats.ecdf(durations).sf
    points, survival = curve.quantiles, curve.probabilities
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # SciPy warns that the interval is undefined at 0 and 1
        interval: Any = curve.confidence_interval(confidence, method="log-log")
    known = (survival > 0) & (survival < 1)
    low, high = (np.where(known, end.probabilities, survival) for end in interval)
    at_risk = len(durations) - np.searchsorted(np.sort(np.asarray(times, dtype=np.float64)), points)
    return SurvivalCurve(points, survival, at_risk, low, high)


def logrank(
    first_times: ArrayLike, first_ended: ArrayLike, second_times: ArrayLike, second_ended: ArrayLike
) -> tuple[float, float]:
    """The log-rank statistic (standard normal under the null) and two-sided p that two survival curves are one.

    Mantel (1966). It does not use the pairing, and so is conservative for episodes that share seeds. Positive if the
    first group's episodes end earlier than expected. ``(0.0, 1.0)`` if no episode ended, or no difference is possible.
    """
    groups = [_durations(first_times, first_ended), _durations(second_times, second_ended)]
    if sum(group.num_censored() for group in groups) == sum(len(group) for group in groups):
        return 0.0, 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        result = stats.logrank(groups[0], groups[1])
    if not np.isfinite(result.statistic):
        return 0.0, 1.0
    return float(result.statistic), float(result.pvalue)


def _durations(times: ArrayLike, ended: ArrayLike) -> stats.CensoredData:
    """Lengths of episodes in SciPy's form; those that did not end by themselves are right-censored."""
    t, event = np.asarray(times, dtype=np.float64), np.asarray(ended, dtype=bool)
    return stats.CensoredData(uncensored=t[event], right=t[~event])
