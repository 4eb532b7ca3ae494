"""A rank correlation at equal size without bins: of what a line over the nearest neighbours in size leaves."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from dt_lens.statistics.outcomes import LEAST_P
from dt_lens.statistics.rank_correlation import NONE, RankCorrelation

__all__ = ["beside_neighbours"]

Array = NDArray[np.float64]
NEIGHBOURS = 8
FAR = 2.5  # residuals are winsorised at so many median absolute deviations
LEAST = NEIGHBOURS + 1  # members of a stratum


def beside_neighbours(x: ArrayLike, y: ArrayLike, size: ArrayLike, strata: ArrayLike | None = None) -> RankCorrelation:
    """The correlation of ``x [n]`` and ``y [n]`` beyond what their neighbours in ``size [n]`` predict.

    Ranks are taken inside each stratum. From each rank the prediction of a local line (Cleveland, "Robust locally
    weighted regression and smoothing scatterplots", 1979, without weights) in the rank of ``size`` over the eight
    nearest others is taken; residuals ``e`` and ``f`` are winsorised at 2.5 median absolute deviations. Were they
    noise of one size, smoothed by ``S``, the variance of their correlation would be ``tr(G^2) / tr(G)^2`` with ``G = S
    S^T``. Where a relation with size is steep they are larger than elsewhere, so the variance of ``sum e f`` is taken
    as ``sum (e f)^2`` times what the smoothing adds, ``n tr(G^2) / tr(G)^2``. From it are the two-sided p (normal) and
    the interval (Fisher's transform).

    Args:
        x, y, size: numbers; triples that are not finite are left out.
        strata: a value for each; by default one stratum. Strata of fewer than nine are left out.
    """
    columns = np.stack([np.asarray(v, dtype=np.float64) for v in (x, y, size)])
    labels = np.zeros(columns.shape[1]) if strata is None else np.asarray(strata)
    finite = np.isfinite(columns).all(0)
    xy, xx, yy, variance, n = 0.0, 0.0, 0.0, 0.0, 0
    for label in dict.fromkeys(labels[finite].tolist()):
        group = columns[:, finite & (labels == label)]
        if group.shape[1] < LEAST:
            continue
        ranks = (stats.rankdata(group, axis=-1) - 0.5) / group.shape[1]
        S, trace, square = _smoother(ranks[2].tobytes())
        e, f = (_winsorised(S @ ranks[i]) for i in (0, 1))
        xy, xx, yy = xy + float(e @ f), xx + float(e @ e), yy + float(f @ f)
        variance += float(((e * f) ** 2).sum()) * square * len(S) / trace**2
        n += group.shape[1]
    if not (xx > 1e-12 and yy > 1e-12):
        return NONE._replace(n=n)
    rho, sd = xy / np.sqrt(xx * yy), np.sqrt(variance / (xx * yy))
    middle = np.arctanh(np.clip(rho, -1 + 1e-9, 1 - 1e-9))
    ends = np.tanh([middle - 1.96 * sd, middle + 1.96 * sd])
    p_value = max(float(2 * stats.norm.sf(abs(rho) / sd)), LEAST_P)
    return RankCorrelation(float(rho), float(ends[0]), float(ends[1]), p_value, n)


@lru_cache(maxsize=64)
def _smoother(ranks: bytes) -> tuple[Array, float, float]:
    """``S [n, n]``, and of ``G = S S^T`` the trace and that of its square.

    ``S @ x`` is ``x`` less the line through its eight nearest others in size, at its own size. Most strata of one
    number of members have the same ranks.
    """
    size = np.frombuffer(ranks)
    S = np.eye(len(size))
    for i, own in enumerate(size):
        distance = np.abs(size - own)
        distance[i] = np.inf
        near = np.argsort(distance, kind="stable")[:NEIGHBOURS]
        centred = size[near] - size[near].mean()
        slope = centred / max(float(centred @ centred), 1e-300)
        S[i, near] -= 1 / NEIGHBOURS + (own - size[near].mean()) * slope
    G = S @ S.T
    return S, float(np.trace(G)), float((G * G).sum())


def _winsorised(residuals: Array) -> Array:
    middle = np.median(residuals)
    far = FAR * stats.median_abs_deviation(residuals, scale="normal")
    return np.asarray(np.clip(residuals, middle - far, middle + far)) if far > 0 else residuals
