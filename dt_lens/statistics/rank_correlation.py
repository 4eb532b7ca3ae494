"""Rank correlation inside strata: are two numbers related within each matrix, whatever the matrices differ in?

A pair with a value that is NaN or infinite is never ranked: it is left out, as pandas' ``corr`` does, and ``n`` counts
the others. Where nothing can be computed, ``rho`` and the interval are ``nan`` and p is 1. No p-value is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = ["RankCorrelation", "at_equal_size", "rank_correlation", "rank_correlation_difference", "spearman_brown"]

Array = NDArray[np.float64]
RESAMPLES = 2000
LEAST = 3  # members of a stratum
NEIGHBOURS = 6  # members of a bin of nearly equal size; in a small stratum up to twice as many
CHUNK = 4_000_000  # numbers held in memory at a time


class RankCorrelation(NamedTuple):
    """A correlation with its bootstrap interval and permutation p."""

    rho: float
    low: float
    high: float
    p_value: float
    n: int


NONE = RankCorrelation(float("nan"), float("nan"), float("nan"), 1.0, 0)


def rank_correlation(
    x: ArrayLike,
    y: ArrayLike,
    strata: ArrayLike | None = None,
    given: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> RankCorrelation:
    """Spearman's rank correlation of ``x [n]`` and ``y [n]``, with ranks taken inside each stratum.

    With one stratum it is Spearman's rho. With several, ranks are scaled to one range and centred in each, so that
    differences between strata have no effect (van Elteren's idea, 1960, for a correlation). With ``given`` it is the
    partial rank correlation: the part that is linear in the ranks of ``given`` is removed from both first, with one
    slope for all strata (Conover, "Practical Nonparametric Statistics", section 5.4). That assumes relations that are
    linear in ranks; ``at_equal_size`` does not.

    The interval is a bias-corrected percentile bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap",
    chapter 14) that draws pairs inside strata; p is two-sided, by permuting ``x`` (with ``given`` its residuals) inside
    strata, and the data count as one permutation.

    Args:
        x, y: numbers; pairs that are not finite are left out.
        strata: a value for each pair; by default one stratum. Strata of fewer than three pairs are left out.
        given: numbers to hold fixed.

    >>> rank_correlation([1, 2, 3, 4, 11, 12, 13, 14], [4, 3, 2, 1, 8, 7, 6, 5], [0, 0, 0, 0, 1, 1, 1, 1]).rho
    -1.0
    """
    columns = [np.asarray(v, dtype=np.float64) for v in ((x, y) if given is None else (x, y, given))]
    groups = list(_groups(columns, strata))
    n = sum(group.shape[1] for group in groups)
    if not groups:
        return NONE
    ranks = [_ranks(group[:, None]) for group in groups]
    rho = float(_rho(_moments(ranks))[0])
    if not np.isfinite(rho):
        return NONE._replace(n=n)
    rng = np.random.default_rng(seed)
    drawn, null = [], []
    residuals = _residuals(ranks)
    step = max(1, CHUNK // (n * len(columns)))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        again = [_ranks(g[:, rng.integers(0, g.shape[1], (count, g.shape[1]))]) for g in groups]
        drawn.append(_rho(_moments(again)))
        null.append(_permuted(residuals, count, rng))
    low, high = _interval(np.concatenate(drawn), rho, confidence)
    return RankCorrelation(rho, low, high, _share_as_far(np.concatenate(null), rho), n)


def at_equal_size(
    x: ArrayLike, y: ArrayLike, size: ArrayLike, strata: ArrayLike | None = None, *, seed: int = 0
) -> RankCorrelation:
    """The rank correlation of ``x [n]`` and ``y [n]`` among neighbours in ``size [n]``.

    The pairs of every stratum are sorted by ``size`` and cut into bins of about six; ranks and permutations stay inside
    a bin. So a relation of ``x`` or ``y`` with the size, of whatever form, has next to no effect. The result is closer
    to 0 than a correlation over a stratum's whole range of sizes, because ranks among six are coarse. A stratum of
    fewer than a dozen pairs is one bin.

    The interval is Bonett and Wright's ("Sample size requirements for estimating Pearson, Kendall and Spearman
    correlations", 2000) with one degree of freedom less for each bin, not a bootstrap: resampling six pairs makes too
    many ties.
    """
    columns = np.stack([np.asarray(v, dtype=np.float64) for v in (x, y, size)])
    labels = np.zeros(columns.shape[1]) if strata is None else np.asarray(strata)
    finite = np.isfinite(columns).all(0)
    columns, labels = columns[:, finite], labels[finite]
    bins = np.zeros(len(labels), np.int64)
    for label in dict.fromkeys(labels.tolist()):
        mine = np.flatnonzero(labels == label)
        order = stats.rankdata(columns[2][mine], method="ordinal") - 1
        count = max(1, len(mine) // NEIGHBOURS)
        bins[mine] = bins.max() + 1 + (order * count) // len(mine)
    groups = list(_groups([columns[0], columns[1]], bins))
    n = sum(group.shape[1] for group in groups)
    ranks = [_ranks(group[:, None]) for group in groups]
    rho = float(_rho(_moments(ranks))[0]) if groups else float("nan")
    if not np.isfinite(rho):
        return NONE._replace(n=n)
    rng, step = np.random.default_rng(seed), max(1, CHUNK // (2 * n))
    parts = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    p = _share_as_far(np.concatenate([_permuted(_residuals(ranks), count, rng) for count in parts]), rho)
    free = n - len(groups) - 2
    if free < 1:
        return RankCorrelation(rho, float("nan"), float("nan"), p, n)
    middle, half = np.arctanh(np.clip(rho, -1 + 1e-9, 1 - 1e-9)), 1.96 * np.sqrt((1 + rho**2 / 2) / free)
    return RankCorrelation(rho, float(np.tanh(middle - half)), float(np.tanh(middle + half)), p, n)


def rank_correlation_difference(
    first: ArrayLike,
    second: ArrayLike,
    y: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    second_y: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> RankCorrelation:
    """How much better ``first [n]`` predicts ``y [n]`` than ``second [n]`` does: the difference of their correlations.

    With ``second_y [n]``, ``second`` is correlated with that instead of ``y``. The interval is a bias-corrected
    percentile bootstrap over the same resampled rows for both, inside strata. ``p_value`` is twice the smaller share of
    resamples on either side of 0, counting the data as one.
    """
    columns = [np.asarray(v, dtype=np.float64) for v in (first, second, y, y if second_y is None else second_y)]
    groups = list(_groups(columns, strata))
    n = sum(group.shape[1] for group in groups)
    if not groups:
        return NONE
    rng = np.random.default_rng(seed)

    def difference(rows: list[Array]) -> Array:
        ours, theirs = (_rho(_moments([ranks[[i, i + 2]] for ranks in rows])) for i in (0, 1))
        return ours - theirs

    found = float(difference([_ranks(group[:, None]) for group in groups])[0])
    if not np.isfinite(found):
        return NONE._replace(n=n)
    step = max(1, CHUNK // (4 * n))
    drawn = np.concatenate(
        [
            difference(
                [_ranks(g[:, rng.integers(0, g.shape[1], (min(step, resamples - start), g.shape[1]))]) for g in groups]
            )
            for start in range(0, resamples, step)
        ]
    )
    drawn = drawn[np.isfinite(drawn)]
    low, high = _interval(drawn, found, confidence)
    p = min(1.0, 2 * (min(int((drawn <= 0).sum()), int((drawn >= 0).sum())) + 1) / (len(drawn) + 1))
    return RankCorrelation(found, low, high, p, n)


def spearman_brown(halves: float) -> float:
    """The reliability of a measurement whose two halves correlate by ``halves``; 0 if they do not agree.

    It is the correlation to expect with a second such measurement (Spearman, "Correlation calculated from faulty data",
    1910; Brown, "Some experimental results in the correlation of mental abilities", 1910).

    >>> spearman_brown(1.0), spearman_brown(-0.2)
    (1.0, 0.0)
    """
    agreed = float(np.maximum(halves, 0.0))
    return 2 * agreed / (1 + agreed)


def _groups(columns: list[Array], strata: ArrayLike | None) -> Iterator[Array]:
    """The finite pairs of each stratum that has three or more, ``[column, n]``."""
    data = np.stack(columns)
    labels = np.zeros(data.shape[1]) if strata is None else np.asarray(strata)
    finite = np.isfinite(data).all(0)
    for label in dict.fromkeys(labels[finite].tolist()):
        group = data[:, finite & (labels == label)]
        if group.shape[1] >= LEAST:
            yield group


def _ranks(values: Array) -> Array:
    """Centred ranks over the last axis, scaled so that a member of a large stratum does not weigh more."""
    n = values.shape[-1]
    return np.asarray((stats.rankdata(values, axis=-1) - (n + 1) / 2) / n)


def _residuals(strata: list[Array]) -> list[tuple[Array, Array]]:
    """Ranks of x and y in each stratum, without the part that is linear in those of a third row, if there is one."""
    if len(strata[0]) == 2:
        return [(ranks[0], ranks[1]) for ranks in strata]
    size = np.maximum(sum((ranks[2] ** 2).sum(-1) for ranks in strata), 1e-300)
    slopes = [sum((ranks[i] * ranks[2]).sum(-1) for ranks in strata) / size for i in (0, 1)]
    return [(ranks[0] - slopes[0][:, None] * ranks[2], ranks[1] - slopes[1][:, None] * ranks[2]) for ranks in strata]


def _moments(strata: list[Array]) -> Array:
    """``[3, resample]``: the sums of xy, xx and yy of the residuals, for ranks ``[column, resample, n]``."""
    return np.asarray(sum(_products(x, y) for x, y in _residuals(strata)))


def _products(x: Array, y: Array) -> Array:
    return np.stack(np.broadcast_arrays((x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1)))


def _rho(moments: Array | int) -> Array:
    xy, xx, yy = np.asarray(moments)
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = xy / np.sqrt(xx * yy)
    # If x is the controlled variable itself, its residuals are only rounding.
    return np.where((xx > 1e-12) & (yy > 1e-12), rho, np.nan)


def _permuted(residuals: list[tuple[Array, Array]], count: int, rng: np.random.Generator) -> Array:
    """``count`` correlations of y's residuals with x's, after x's are permuted inside each stratum."""
    shuffled = [rng.permuted(np.broadcast_to(x[0], (count, x.shape[-1])), axis=1) for x, _ in residuals]
    return _rho(sum(_products(x, y) for x, (_, y) in zip(shuffled, residuals, strict=True)))


def _share_as_far(null: Array, found: float) -> float:
    """The two-sided p of ``found``, counting the data as one permutation."""
    nearer = int((np.abs(null) < abs(found) - 1e-12).sum())  # a permutation without a correlation is none of these
    return (len(null) - nearer + 1) / (len(null) + 1)


def _interval(drawn: Array, found: float, confidence: float) -> tuple[float, float]:
    """Bias-corrected percentiles: ties among resampled pairs pull every rank correlation towards 0."""
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return float("nan"), float("nan")
    below = ((drawn < found).sum() + (drawn == found).sum() / 2) / len(drawn)
    shift = 2 * stats.norm.ppf(np.clip(below, 1 / len(drawn), 1 - 1 / len(drawn)))
    tail = stats.norm.ppf((1 - confidence) / 2)
    ends = np.quantile(drawn, stats.norm.cdf(np.array([shift + tail, shift - tail])))
    return float(ends[0]), float(ends[1])
