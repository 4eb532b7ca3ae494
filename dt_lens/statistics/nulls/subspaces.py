"""The overlap of one subspace with another, and its distribution when one is random.

For orthonormal bases ``A [d, k]`` and ``B [d, m]`` the singular values of ``A^T B`` are the cosines of the principal
angles (Golub and Van Loan, "Matrix Computations", section 6.4.3). Their sum of squares is ``tr(P_A P_B)``. With one of
the two rotated at random this is Pillai's trace of a matrix-variate Beta (Muirhead, "Aspects of Multivariate
Statistical Theory", sections 3.3 and 10.6).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincc, gammaln, multigammaln

from dt_lens.errors import DtLensError
from dt_lens.statistics.nulls.pooled import PooledMaximum

__all__ = ["SubspaceOverlap"]

Array = NDArray[Any]
HELD = 4_000_000  # numbers held at a time
STEEP = 100.0  # from this exponent of the tail on, a Beta of the same mean and variance is accurate enough
SAMPLES = 9_999  # draws where it is not
BOUNDED = 0.01  # the share of every level that goes to the bound on the tail; the rest goes to the draws


@dataclass(frozen=True)
class SubspaceOverlap:
    """The sum ``s`` of the squared cosines between a fixed ``m``- and a random ``k``-dimensional subspace.

    Mean and variance are exact: ``k m / d`` and ``2 k m (d-k) (d-m) / (d^2 (d-1) (d+2))``. The distribution is exact
    where either subspace, or the complement of either, is a line: ``cos^2 ~ Beta(m/2, (d-m)/2)``. In between, ``s`` is
    given the Beta distribution of that mean and variance on its range, ``max(0, k+m-d)`` to ``min(k, m)``, if that is
    good enough. Where little room is left its tail is too thin: the chance to come within ``e`` of the maximum goes
    like ``e^N``, ``N = m (d-k) / 2`` for ``m <= k`` and ``k+m <= d``. For ``N < 100`` an overlap is compared with 9,999
    exact ``draws`` instead, itself counted as one; its p-value is below 0.0001 only where the bound on the tail is.

    Attributes:
        k, m: dimensions of the two subspaces, each at most ``dimension``.
        dimension: of the space.

    Raises:
        DtLensError: for dimensions that do not fit.

    >>> null = SubspaceOverlap(8, 3, 96)
    >>> null.mean, round(float(null.p_value(0.5)), 4)
    (0.25, 0.0012)
    """

    assumes: ClassVar[str] = (
        "A subspace that means nothing lies anywhere with equal chance, in all dimensions of the residual stream."
    )

    k: int
    m: int
    dimension: int

    def __post_init__(self) -> None:
        if not (0 <= self.k <= self.dimension and 0 <= self.m <= self.dimension):
            raise DtLensError(
                f"Subspaces of {self.k} and {self.m} dimensions do not fit a space of {self.dimension}; neither may "
                "be larger."
            )

    @property
    def mean(self) -> float:
        """Of the sum of squared cosines."""
        return self.k * self.m / self.dimension if self.dimension else 0.0

    @property
    def std(self) -> float:
        """Of the sum of squared cosines; 0 where either subspace is zero or the whole space."""
        k, m, d = self.k, self.m, self.dimension
        if d < 2:
            return 0.0
        return float(np.sqrt(2.0 * k * m * (d - k) * (d - m) / (d**2 * (d - 1) * (d + 2))))

    @property
    def _range(self) -> tuple[float, float]:
        return float(max(0, self.k + self.m - self.dimension)), float(min(self.k, self.m))

    @property
    def exact(self) -> bool:
        """Whether ``p_value`` is not an approximation: the distribution is known, or there are exact draws."""
        return self._known or self._exponent < STEEP

    @property
    def _known(self) -> bool:
        low, high = self._range
        return high - low <= 1

    @property
    def _open(self) -> tuple[int, int]:
        """The dimensions, smaller first, of the two subspaces, or of their complements where the two fill the space."""
        filled = self.k + self.m > self.dimension
        k, m = (self.dimension - self.k, self.dimension - self.m) if filled else (self.k, self.m)
        return min(k, m), max(k, m)

    @property
    def _exponent(self) -> float:
        small, large = self._open
        return small * (self.dimension - large) / 2

    def p_value(self, overlap: ArrayLike) -> Array:
        """The probability of a sum of squared cosines of ``overlap`` or more, any shape."""
        s = np.asarray(overlap, dtype=np.float64)
        low, high = self._range
        if self.std == 0 or high <= low:
            return np.ones_like(s)
        if not self._known and self._exponent < STEEP:
            return self._among_draws(s)
        share, width = np.clip((s - low) / (high - low), 0.0, 1.0), high - low
        centre, spread = (self.mean - low) / width, self.std / width
        weight = centre * (1 - centre) / spread**2 - 1
        return np.asarray(betaincc(centre * weight, (1 - centre) * weight, share))

    def _among_draws(self, s: Array) -> Array:
        """The smaller of the share of draws and the bound on the tail, weighted so that both may be used at once."""
        share = _drawn(self.k, self.m, self.dimension).p_value(s)
        return np.asarray(np.minimum(1.0, np.minimum(share / (1 - BOUNDED), self._bound(s) / BOUNDED)))

    def _bound(self, s: Array) -> Array:
        """An upper bound on the probability of ``s`` or more, tighter as ``s`` approaches its maximum.

        The part of the smaller subspace's basis that lies in the complement of the other is a random ``X [m, d-k]``
        of density ``c det(1 - X X^T)^((k-m-1)/2)``, and ``|X|^2 = m - s`` (Muirhead, section 3.3). The determinant
        lies between ``1 - |X|^2`` and 1, so the density is at most ``c``, for ``k = m`` over the root of ``1 - |X|^2``;
        and the volume of a ball is known.
        """
        (m, k), exponent = self._open, self._exponent
        below = np.clip(self._range[1] - s, 0.0, None)
        constant = multigammaln(self.dimension / 2, m) - multigammaln(k / 2, m) - gammaln(exponent + 1)
        with np.errstate(divide="ignore"):
            log: Array = constant + exponent * np.log(below)
            if k == m:
                log = log - np.log(np.clip(1 - below, 0.0, None)) / 2
        return np.asarray(np.exp(np.minimum(log, 0.0)))

    def z(self, overlap: ArrayLike) -> Array:
        """How many standard deviations above the mean; 0 where the overlap cannot vary."""
        above = np.asarray(overlap, dtype=np.float64) - self.mean
        return np.asarray(above / self.std if self.std > 0 else np.zeros_like(above))

    def draws(self, samples: int, seed: int = 0) -> tuple[Array, Array]:
        """Sums of squared cosines and largest cosines of random subspaces, ``[samples]`` each.

        ``A^T P_B A`` is ``T (T + R)^-1`` for Wishart matrices ``T`` and ``R`` of the smaller of the two dimensions,
        with ``max(k, m)`` and ``d - max(k, m)`` degrees of freedom; each is drawn by Bartlett's decomposition
        (Muirhead, theorem 3.2.14). Where the two fill the space, the complements are drawn instead.
        """
        small, large = self._open
        d, forced = self.dimension, max(0, self.k + self.m - self.dimension)  # tr(PQ) = k + m - d + tr((1-P)(1-Q))
        total, largest = np.full(samples, float(forced)), np.full(samples, float(forced > 0))
        if not small:
            return total, largest
        rng = np.random.default_rng([seed, small, large, d])
        step = max(1, HELD // (4 * small**2))
        for start in range(0, samples, step):
            count = min(step, samples - start)
            inside, outside = (_bartlett(rng, count, small, n) for n in (large, d - large))
            # The eigenvalues of T (T + R)^-1 are 1 / (1 + r) for those of T^-1 R.
            mixed = np.linalg.solve(inside, outside)
            cosines = 1 / np.sqrt(1 + np.square(np.linalg.svd(mixed, compute_uv=False)))
            total[start : start + count] += np.square(cosines).sum(1)
            if not forced:
                largest[start : start + count] = cosines.max(1)
        return total, largest

    def largest_cosine(self, samples: int = 200, seed: int = 0) -> float:
        """The median of the largest cosine under the null, by Monte Carlo."""
        return _median_largest(self.k, self.m, self.dimension, samples, seed)


@lru_cache(maxsize=1024)
def _median_largest(k: int, m: int, dimension: int, samples: int, seed: int) -> float:
    return float(np.median(SubspaceOverlap(k, m, dimension).draws(samples, seed)[1]))


@lru_cache(maxsize=256)
def _drawn(k: int, m: int, dimension: int) -> PooledMaximum:
    return PooledMaximum.of(SubspaceOverlap(k, m, dimension).draws(SAMPLES)[0])


def _bartlett(rng: np.random.Generator, count: int, size: int, degrees: int) -> Array:
    """Lower triangular factors ``[count, size, size]`` of Wishart matrices, ``degrees >= size``."""
    factor = np.tril(rng.standard_normal((count, size, size)), -1)
    diagonal = np.sqrt(rng.chisquare(degrees - np.arange(size), (count, size)))
    factor[:, np.arange(size), np.arange(size)] = diagonal
    return factor
