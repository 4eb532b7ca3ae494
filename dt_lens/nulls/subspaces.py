"""How much of one subspace lies in another, and how much chance alone would put there.

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
from scipy.special import betaincc

from dt_lens.errors import DtLensError

__all__ = ["SubspaceOverlap"]

Array = NDArray[Any]
HELD = 4_000_000  # numbers held at a time


@dataclass(frozen=True)
class SubspaceOverlap:
    """The sum ``s`` of the squared cosines between a fixed ``m``- and a random ``k``-dimensional subspace.

    Mean and variance are exact: ``k m / d`` and ``2 k m (d-k) (d-m) / (d^2 (d-1) (d+2))``. The distribution is exact
    where either subspace, or the complement of either, is a line: ``cos^2 ~ Beta(m/2, (d-m)/2)``. In between, ``s`` is
    given the Beta distribution of that mean and variance on its range, ``max(0, k+m-d)`` to ``min(k, m)``; ``draws``
    makes exact ones to hold it against.

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
        "A subspace that means nothing is turned anywhere with equal chance, in all dimensions of the residual stream."
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
        """Of the sum of squared cosines; 0 where either is nothing, or the whole space."""
        k, m, d = self.k, self.m, self.dimension
        if d < 2:
            return 0.0
        return float(np.sqrt(2.0 * k * m * (d - k) * (d - m) / (d**2 * (d - 1) * (d + 2))))

    @property
    def _range(self) -> tuple[float, float]:
        return float(max(0, self.k + self.m - self.dimension)), float(min(self.k, self.m))

    @property
    def exact(self) -> bool:
        """Whether ``p_value`` is no approximation."""
        low, high = self._range
        return high - low <= 1

    def p_value(self, overlap: ArrayLike) -> Array:
        """The chance of a sum of squared cosines of ``overlap`` or more, any shape."""
        s = np.asarray(overlap, dtype=np.float64)
        low, high = self._range
        if self.std == 0 or high <= low:
            return np.ones_like(s)
        share, width = np.clip((s - low) / (high - low), 0.0, 1.0), high - low
        centre, spread = (self.mean - low) / width, self.std / width
        weight = centre * (1 - centre) / spread**2 - 1
        return np.asarray(betaincc(centre * weight, (1 - centre) * weight, share))

    def z(self, overlap: ArrayLike) -> Array:
        """How many standard deviations above the mean; 0 where there is nothing to vary."""
        above = np.asarray(overlap, dtype=np.float64) - self.mean
        return np.asarray(above / self.std if self.std > 0 else np.zeros_like(above))

    def draws(self, samples: int, seed: int = 0) -> tuple[Array, Array]:
        """Sums of squared cosines and largest cosines of random subspaces, ``[samples]`` each.

        ``A^T P_B A`` is ``T (T + R)^-1`` for Wishart matrices ``T`` and ``R`` of the smaller of the two dimensions,
        with ``max(k, m)`` and ``d - max(k, m)`` degrees of freedom; each is drawn by Bartlett's decomposition
        (Muirhead, theorem 3.2.14). Where the two fill the space, the complements are drawn instead.
        """
        k, m, d = self.k, self.m, self.dimension
        forced = max(0, k + m - d)
        if forced:
            k, m = d - k, d - m  # tr(PQ) = k + m - d + tr((1-P)(1-Q))
        small, large = min(k, m), max(k, m)
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


def _bartlett(rng: np.random.Generator, count: int, size: int, degrees: int) -> Array:
    """Lower triangular factors ``[count, size, size]`` of Wishart matrices, ``degrees >= size``."""
    factor = np.tril(rng.standard_normal((count, size, size)), -1)
    diagonal = np.sqrt(rng.chisquare(degrees - np.arange(size), (count, size)))
    factor[:, np.arange(size), np.arange(size)] = diagonal
    return factor
