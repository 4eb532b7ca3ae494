"""Statistics of outcomes: pure functions of arrays, whose random draws are repeatable to the bit.

Every interval is a pair (low, high) at the given confidence; ``(nan, nan)`` if the data allow none, never an error.

A value that is NaN or infinite is never ranked or counted: a number, an interval or a p-value of it is ``nan``, and a
survival curve, which cannot be ``nan`` as a whole, raises ``DtLensError``. A p-value is never 0: a test by random draws
counts the data as one draw, and an exact p that is too small for a float is the smallest normal one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from dt_lens.arguments import whole_number
from dt_lens.errors import DtLensError, as_written
from dt_lens.statistics.arrays import numbers, row, share

__all__ = [
    "Interval",
    "SurvivalCurve",
    "bootstrap_interval",
    "cohen_dz",
    "interval_note",
    "iqm",
    "kaplan_meier",
    "logrank",
    "mcnemar",
    "mean_test",
    "sign_flip",
    "wilson",
]

Float = NDArray[np.float64]
RESAMPLES = 10_000
LEAST_P = float(np.finfo(np.float64).smallest_normal)  # an exact p-value is never below this
CHUNK = 4_000_000  # numbers held in memory at a time
NEARLY_EQUAL = 0.1  # a resample whose standard error is this share of the sample's has next to none
ENOUGH = 200  # outcomes from which on the intervals of means cover what they say; benchmarks/interval_coverage.py
FEW_RARE = 5  # rare outcomes that must be seen for that


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
    x = numbers(values, "values")
    if not x.ndim or not x.size:
        raise DtLensError("values is one number or none; the interquartile mean is of a row, or of rows.")
    if not -x.ndim <= whole_number(axis, "axis") < x.ndim:
        raise DtLensError(f"axis is {axis}; values have {x.ndim} axes.")
    found = stats.trim_mean(x, 0.25, axis=axis)
    return np.where(np.isfinite(x).all(axis), found, np.nan)[()]


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a statistic of one sample ``values [n]``; for paired differences, the paired bootstrap.

    For ``np.mean`` and ``iqm`` it is studentised, equal-tailed (Efron and Tibshirani, "An Introduction to the
    Bootstrap", 1993, chapter 12; the trimmed mean's standard error is Tukey and McLaughlin's, 1963, from the winsorised
    variance). Where too many resamples hardly vary for its quantiles to be known, as with one failure among ones, it is
    Student's. For any other ``statistic``, which must take ``axis``, it is bias-corrected and accelerated (Efron,
    "Better bootstrap confidence intervals", 1987), or plain percentiles where the correction is undefined.

    ``(nan, nan)`` if all the values are equal: a sample that does not vary says nothing about how much it could. What
    intervals of means cover, and from how many outcomes on, is measured by ``benchmarks/interval_coverage.py``;
    ``interval_note`` says where they cover less.
    """
    x, confidence = row(values, "values"), share(confidence, "confidence")
    whole_number(resamples, "resamples", 1), whole_number(seed, "seed", 0)
    if not callable(statistic):
        raise DtLensError(f"statistic is {as_written(statistic)}; it must be a function, such as np.mean.")
    if len(x) < 2 or not np.isfinite(x).all() or np.ptp(x) == 0:
        return _NONE
    if statistic is not np.mean and statistic is not iqm:
        return _corrected(x, statistic, confidence, resamples, seed)
    tail = (1 - confidence) / 2
    with np.errstate(all="ignore"):
        value, error, t, df = _studentised(x, int(len(x) / 4) if statistic is iqm else 0, tail, resamples, seed)
        if t is None:
            high = float(stats.t.isf(tail, df))
            low = -high
        else:
            low, high = float(np.quantile(t, tail, method="higher")), float(np.quantile(t, 1 - tail, method="lower"))
        found = Interval(value - high * error, value - low * error)
    return found if error > 0 and np.isfinite(found).all() else _NONE


def _studentised(x: Float, cut: int, tail: float, resamples: int, seed: int) -> tuple[float, float, Float | None, int]:
    """The mean of ``x [n]`` without ``cut`` values at each end, its standard error, the t statistics of resamples, and
    the degrees of freedom. There are no t statistics where more than 2.5 % of the resamples, or a share ``tail``,
    hardly vary: their t is infinite, and would be a quantile."""
    n = len(x)
    centre, scale = float(np.median(x)), float(np.ptp(x))
    z = (x - centre) / scale
    (value,), (error,) = _mean_and_error(z[None], cut)
    rng, step = np.random.default_rng(seed), max(1, CHUNK // n)
    parts = [
        _mean_and_error(z[rng.integers(0, n, (min(step, resamples - start), n))], cut)
        for start in range(0, resamples, step)
    ]
    means, errors = (np.concatenate(found) for found in zip(*parts, strict=True))
    flat = errors <= NEARLY_EQUAL * error
    t = None if flat.mean() > min(0.025, tail) else np.where(means == value, 0.0, (means - value) / errors)
    return centre + scale * float(value), scale * float(error), t, n - 2 * cut - 1


def _mean_and_error(rows: Float, cut: int) -> tuple[Float, Float]:
    """The mean of each row ``[row, n]`` without ``cut`` values at each end, and its standard error."""
    n = rows.shape[1]
    if not cut:
        return rows.mean(1), rows.std(1, ddof=1) / np.sqrt(n)
    middle = np.sort(rows, axis=1)[:, cut : n - cut]
    ends = middle[:, [0, -1]]
    winsorised = ((middle.sum(1) + cut * ends.sum(1)) / n)[:, None]
    squares = ((middle - winsorised) ** 2).sum(1) + cut * ((ends - winsorised) ** 2).sum(1)
    return middle.mean(1), np.sqrt(squares / (n - 1) * n) / (n - 2 * cut)


def _corrected(x: Float, statistic: Callable[..., Any], confidence: float, resamples: int, seed: int) -> Interval:
    """The bias-corrected and accelerated interval, or plain percentiles."""
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


def interval_note(values: ArrayLike, what: str = "outcomes") -> str:
    """What to know about ``bootstrap_interval`` of the mean of ``values [n]``, in words; empty if it covers as it says.

    An outcome is rare if it lies further from the median than five times the median distance from it (scaled to a
    standard deviation); where more than half are equal, if it differs from them.

    Args:
        values: the outcomes.
        what: the word for them.

    >>> interval_note([1.0] * 20)
    'no interval: all 20 outcomes are equal'
    >>> interval_note([1.0] * 299 + [0.0], "episodes")
    'fewer than five rare episodes seen (1)'
    """
    x = row(values, "values")
    if len(x) < 2:
        return f"no interval: fewer than two {what}"
    if not np.isfinite(x).all():
        return f"no interval: not all {what} are finite"
    if np.ptp(x) == 0:
        return f"no interval: all {len(x)} {what} are equal"
    away = np.abs(x - np.median(x))
    rare = int((away > 5 * 1.4826 * np.median(away)).sum())
    notes = [f"fewer than five rare {what} seen ({rare})"] if 0 < rare < FEW_RARE else []
    notes += [f"fewer than {ENOUGH} {what}"] if len(x) < ENOUGH else []
    return " and ".join(notes)


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (1927), which is sound near 0 and 1, where the textbook one has no width.

    Raises:
        DtLensError: unless ``successes`` is from 0 to ``n``.

    >>> low, high = wilson(0, 100)
    >>> low, round(high, 3)
    (0.0, 0.037)
    """
    confidence = share(confidence, "confidence")
    for name, count in (("successes", successes), ("n", n)):
        if count is None or numbers(count, name).ndim:  # NumPy reads None as NaN
            raise DtLensError(f"{name} is {as_written(count)}; it must be a number.")
    if n == 0 or not np.isfinite([float(successes), float(n)]).all():
        return _NONE
    if not (0 <= successes <= n and float(successes).is_integer() and float(n).is_integer()):
        raise DtLensError(f"There cannot be {successes} successes in {n} tries; give a whole number from 0 to {n}.")
    if n > 2**53:  # where floats stop counting
        raise DtLensError(f"n is {n}; it must be at most 2**53.")
    ci = stats.binomtest(int(successes), int(n)).proportion_ci(confidence, method="wilson")
    # Rounding can leave 1e-18 where the formula says 0.
    low, high = (0.0 if successes == 0 else float(ci.low)), (1.0 if successes == n else float(ci.high))
    return Interval(low, high)


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Two-sided p of McNemar's exact test that two paired yes/no outcomes ``[n]`` are yes equally often.

    Only pairs that differ count: under the null each is a fair coin (McNemar 1947, in its exact binomial form). 1.0 if
    none differs.
    """
    one = row(first, "first")
    other = row(second, "second", one)
    if not (_finite(one) and _finite(other)):
        return float("nan")
    a, b = one.astype(bool), other.astype(bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b == 0:
        return 1.0
    return max(float(stats.binomtest(only_a, only_a + only_b).pvalue), LEAST_P)


def sign_flip(differences: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p that paired differences ``[n]`` are symmetric about 0, by flipping their signs (Fisher 1935).

    The statistic is the mean. All ``2**n`` flips are tried if there are no more than ``resamples`` of them; otherwise
    that many are drawn, and the data count as one more, so p is never 0 (Phipson and Smyth 2010). 1.0 if all
    differences are zero.

    It is exact if an edit without effect makes each difference as likely as its opposite, so that the null is "the two
    agents do the same", not "their means are equal": differences with mean 0 that are skewed are not symmetric, and p
    is then too small too often. ``mean_test`` is about the mean alone. (Flipping signs under a studentised statistic
    would give the same p: signs do not change the sum of squares, so Student's t rises with the size of the mean.)
    """
    d = row(differences, "differences")
    whole_number(resamples, "resamples", 1), whole_number(seed, "seed", 0)
    if not _finite(d):
        return float("nan")
    d = d[d != 0]  # a flipped zero is a zero
    if len(d) == 0:
        return 1.0
    d = _near_one(d)
    observed = abs(d.sum())
    slack = 1e-12 * np.abs(d).sum()  # a sum that is equal but for rounding must count as equal
    if 2 ** len(d) <= resamples:
        signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
        return float((np.abs(signs @ d) >= observed - slack).mean())
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, size=(resamples, len(d)), dtype=np.int8) * 2 - 1
    as_extreme = int((np.abs(signs @ d) >= observed - slack).sum())
    return (as_extreme + 1) / (resamples + 1)


def mean_test(differences: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p that the mean of the differences ``[n]`` is 0, by the studentised bootstrap; they may be skewed.

    The t statistic is compared with those of resamples about the sample's own mean, equal-tailed, and the data count as
    one resample (Efron and Tibshirani 1993, chapter 16). So it agrees with ``bootstrap_interval`` of the mean, also in
    that it is Student's test where too many resamples hardly vary. Approximate; the price for allowing skewness.

    1.0 if all differences are zero; ``nan`` if all are equal and not zero, or if there is only one.
    """
    d = row(differences, "differences")
    whole_number(resamples, "resamples", 1), whole_number(seed, "seed", 0)
    if not _finite(d):
        return float("nan")
    if not d.any():
        return 1.0
    if len(d) < 2 or np.ptp(d) == 0:
        return float("nan")
    with np.errstate(all="ignore"):
        value, error, drawn, df = _studentised(d, 0, 0.025, resamples, seed)
        t = value / error
    if not np.isfinite(t):
        return float("nan")
    if drawn is None:
        return max(float(2 * stats.t.sf(abs(t), df)), LEAST_P)
    slack = 1e-9 * (1 + abs(t))  # statistics that are equal but for rounding must count as equal
    tail = min(int((drawn >= t - slack).sum()), int((drawn <= t + slack).sum()))
    return min(1.0, 2 * (tail + 1) / (len(drawn) + 1))


def cohen_dz(differences: ArrayLike) -> float:
    """Cohen's d_z: the mean paired difference ``[n]`` over the standard deviation of the differences (Cohen 1988).

    0.0 if all are zero; infinite if all are equal but not zero; ``nan`` for fewer than two.
    """
    d = row(differences, "differences")
    if len(d) < 2 or not _finite(d):
        return float("nan")
    d = _near_one(d)
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

    Raises:
        DtLensError: for a length or an end that is NaN or infinite.
    """
    times, confidence = row(times, "times"), share(confidence, "confidence")
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
    first, second = row(first_times, "first_times"), row(second_times, "second_times")
    ends = row(first_ended, "first_ended", first), row(second_ended, "second_ended", second)
    if not all(_finite(part) for part in (first, second, *ends)):
        return float("nan"), float("nan")
    groups = [_durations(first_times, first_ended), _durations(second_times, second_ended)]
    if sum(group.num_censored() for group in groups) == sum(len(group) for group in groups):
        return 0.0, 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        result = stats.logrank(groups[0], groups[1])
    if not np.isfinite(result.statistic):
        return 0.0, 1.0
    return float(result.statistic), max(float(result.pvalue), LEAST_P)


def _near_one(values: Float) -> Float:
    """``values`` over a power of two, which changes no digit, so that sums and squares cannot overflow."""
    return np.asarray(np.ldexp(values, -np.frexp(np.abs(values).max())[1]))


def _finite(values: ArrayLike) -> bool:
    return bool(np.isfinite(np.asarray(values, dtype=np.float64)).all())


def _durations(times: ArrayLike, ended: ArrayLike) -> stats.CensoredData:
    """Lengths of episodes in SciPy's form; those that did not end by themselves are right-censored."""
    t = row(times, "times")
    ends = row(ended, "ended", t)
    if not (_finite(t) and _finite(ends)):
        raise DtLensError("Not all lengths and ends of the episodes are finite; leave out those that are not.")
    event = ends.astype(bool)
    return stats.CensoredData(uncensored=t[event], right=t[~event])
