"""Nulls that are drawn, not derived: pooled best matches of models without learned structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dt_lens.errors import DtLensError

__all__ = ["PooledMaximum", "ShuffledMaximum", "UntrainedMaximum"]

Array = NDArray[Any]


@dataclass(frozen=True)
class PooledMaximum:
    """Best matches of drawn models, all directions of a kind together; ``p = (1 + #) / (1 + B)``.

    That is a valid p-value for every ``B``, and never smaller than ``1 / (1 + B)`` (Phipson and Smyth, "Permutation
    p-values should never be zero", 2010).

    Attributes:
        drawn: ``[B]``, sorted.

    >>> UntrainedMaximum.of([0.1, 0.3, 0.2]).p_value([0.05, 0.25, 0.9]).tolist()
    [1.0, 0.5, 0.25]
    """

    assumes: ClassVar[str] = ""

    drawn: Array

    @classmethod
    def of(cls, matches: ArrayLike | Sequence[ArrayLike]) -> PooledMaximum:
        """The null of these best matches, in any order.

        Raises:
            DtLensError: for an empty array, or values that are not finite.
        """
        drawn = np.sort(np.asarray(matches, dtype=np.float64).ravel())
        if not len(drawn) or not np.isfinite(drawn).all():
            raise DtLensError(f"A pooled null needs finite best matches, at least one; it was given {len(drawn)}.")
        return cls(drawn)

    @property
    def mean(self) -> float:
        """Of the best match under the null."""
        return float(self.drawn.mean())

    @property
    def std(self) -> float:
        """Of the best match under the null."""
        return float(self.drawn.std())

    @property
    def smallest(self) -> float:
        """The smallest possible p-value."""
        return 1 / (1 + len(self.drawn))

    def p_value(self, cosine: ArrayLike) -> Array:
        """The share of draws with a match as good, counting the match itself as one of them."""
        t = np.abs(np.asarray(cosine, dtype=np.float64))
        # A match that equals a draw up to rounding counts as equal.
        above = len(self.drawn) - np.searchsorted(self.drawn, t - 1e-12)
        return np.asarray((1 + above) / (1 + len(self.drawn)))

    def z(self, cosine: ArrayLike) -> Array:
        """How many standard deviations of the draws the best match lies above their mean; 0 if they are 0."""
        above = np.abs(np.asarray(cosine, dtype=np.float64)) - self.mean
        return np.asarray(above / self.std if self.std > 1e-12 else np.zeros_like(above))


class UntrainedMaximum(PooledMaximum):
    """The best matches of freshly initialised models of the same shape with their own embeddings."""

    assumes = (
        "A direction that means nothing is like those of the same kind of matrix in a freshly initialised model, whose "
        "embeddings are as fresh."
    )


class ShuffledMaximum(PooledMaximum):
    """The best matches of the model's own weights with their entries in random order, embeddings as they are."""

    assumes = (
        "A direction that means nothing comes from a matrix of the same entries in random order, and the "
        "embeddings are the model's own."
    )
