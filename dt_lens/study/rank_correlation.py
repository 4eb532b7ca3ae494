"""Rank correlation inside strata: does one number go with another in each matrix, whatever the matrices differ in?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = ["RankCorrelation", "rank_correlation", "rank_correlation_difference"]

Array = NDArray[np.float64]
RESAMPLES = 2000
CHUNK = 4_000_000  # numbers held at a time


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

    With one stratum it is Spearman's rho. With several, ranks are scaled to one range and centred in each, so that what
    differs between strata counts for nothing (van Elteren's idea, 1960, for a correlation). With ``given`` it is the
    partial rank correlation: what is linear in the ranks of ``given`` is taken out of both first (Conover, "Practical
    Nonparametric Statistics", section 5.4).

    The interval is a percentile bootstrap that draws pairs inside strata; p is two-sided, by permuting ``x`` (what is
    left of it) inside strata, the data counting as one permutation.

    Args:
        x, y: numbers; pairs with one that is not finite are left out.
        strata: a value for each pair; one stratum when omitted.
        given: numbers to hold fixed.

    >>> rank_correlation([1, 2, 3, 4, 11, 12, 13, 14], [4, 3, 2, 1, 8, 7, 6, 5], [0, 0, 0, 0, 1, 1, 1, 1]).rho
    -1.0
    """
    columns = [np.asarray(v, dtype=np.float64) for v in ((x, y) if given is None else (x, y, given))]
    groups = list(_groups(columns, strata))
    n = sum(group.shape[1] for group in groups)
    if not groups:
        return NONE
    moments = sum(_moments(group[:, None]) for group in groups)
    rho = float(_rho(moments)[0])
    if not np.isfinite(rho):
        return NONE._replace(n=n)
    rng = np.random.default_rng(seed)
    drawn, null = np.zeros((3, resamples)), np.zeros((3, resamples))
    for group in groups:
        size = group.shape[1]
        step = max(1, CHUNK // (size * len(group)))
        residuals = _residuals(_ranks(group[:, None]))[:, 0]
        for start in range(0, resamples, step):
            part = slice(start, min(start + step, resamples))
            count = part.stop - part.start
            drawn[:, part] += _moments(group[:, rng.integers(0, size, (count, size))])
            shuffled = rng.permuted(np.broadcast_to(residuals[0], (count, size)), axis=1)
            null[:, part] += _products(shuffled, np.broadcast_to(residuals[1], shuffled.shape))
    tail = (1 - confidence) / 2
    resampled = _rho(drawn)
    low, high = np.quantile(resampled[np.isfinite(resampled)], (tail, 1 - tail))
    p = (int((np.abs(_rho(null)) >= abs(rho) - 1e-12).sum()) + 1) / (resamples + 1)
    return RankCorrelation(rho, float(low), float(high), p, n)


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
    """How much better ``first [n]`` goes with ``y [n]`` than ``second [n]`` does: the difference of their correlations.

    With ``second_y [n]`` that is what ``second`` is to go with.
    The interval is a percentile bootstrap over the same resampled rows for both, inside strata. ``p_value`` is twice
    the smaller share of resamples on either side of 0, the data counting as one.
    """
    columns = [np.asarray(v, dtype=np.float64) for v in (first, second, y, y if second_y is None else second_y)]
    groups = list(_groups(columns, strata))
    n = sum(group.shape[1] for group in groups)
    if not groups:
        return NONE
    rng = np.random.default_rng(seed)

    def difference(pairs: list[Array]) -> Array:
        ours, theirs = (sum(_moments(group[[i, i + 2]]) for group in pairs) for i in (0, 1))
        return _rho(ours) - _rho(theirs)

    found = float(difference([group[:, None] for group in groups])[0])
    if not np.isfinite(found):
        return NONE._replace(n=n)
    step = max(1, CHUNK // (4 * n))
    drawn = np.concatenate(
        [
            difference([g[:, rng.integers(0, g.shape[1], (min(step, resamples - start), g.shape[1]))] for g in groups])
            for start in range(0, resamples, step)
        ]
    )
    drawn = drawn[np.isfinite(drawn)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail))
    p = min(1.0, 2 * (min(int((drawn <= 0).sum()), int((drawn >= 0).sum())) + 1) / (len(drawn) + 1))
    return RankCorrelation(found, float(low), float(high), p, n)


def _groups(columns: list[Array], strata: ArrayLike | None) -> Iterator[Array]:
    """The finite columns of each stratum with three members or more, ``[column, n]``."""
    data = np.stack(columns)
    labels = np.zeros(data.shape[1]) if strata is None else np.asarray(strata)
    finite = np.isfinite(data).all(0)
    for label in dict.fromkeys(labels[finite].tolist()):
        group = data[:, finite & (labels == label)]
        if group.shape[1] >= 3:
            yield group


def _ranks(values: Array) -> Array:
    """Centred ranks over the last axis, scaled so that a larger stratum's do not weigh more each."""
    n = values.shape[-1]
    return np.asarray((stats.rankdata(values, axis=-1) - (n + 1) / 2) / n)


def _residuals(ranks: Array) -> Array:
    """``[2, resample, n]``: the ranks of x and y without what is linear in those of a third row, where there is one."""
    if len(ranks) == 2:
        return ranks
    control = ranks[2]
    size = np.maximum((control**2).sum(-1, keepdims=True), 1e-300)
    return np.stack([r - control * (r * control).sum(-1, keepdims=True) / size for r in ranks[:2]])


def _moments(group: Array) -> Array:
    """``[3, resample]``: the sums of xy, xx and yy of what is correlated, for ``[column, resample, n]``."""
    x, y = _residuals(_ranks(group))
    return _products(x, y)


def _products(x: Array, y: Array) -> Array:
    return np.stack([(x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1)])


def _rho(moments: Array | int) -> Array:
    xy, xx, yy = np.asarray(moments)
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = xy / np.sqrt(xx * yy)
    # What is left of x when it is the control itself is rounding.
    return np.where((xx > 1e-12) & (yy > 1e-12), rho, np.nan)
