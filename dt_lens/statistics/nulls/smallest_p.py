"""The null of the smallest of several p-values: statistics of different size, compared with the draws' own smallest.

Each statistic is given a p-value among the draws, since one with more levels is larger by chance. Then the smallest of
them is compared with the smallest of each draw (Westfall and Young, "Resampling-Based Multiple Testing", 1993, section
2.3.3, "minP"). The observed row is counted as one of the draws throughout, which makes the p-values exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dt_lens.errors import DtLensError
from dt_lens.statistics.arrays import numbers

__all__ = ["SmallestP", "Tested"]

Array = NDArray[np.float64]
TIED = 1e-9  # a draw that falls short by less counts as equal


class Tested(NamedTuple):
    """The p-values of observed rows."""

    p_value: Array  # [rows], of the smallest
    each: Array  # [rows, statistics]


@dataclass(frozen=True)
class SmallestP:
    """Draws of several statistics under the null, ``[B, statistics]``; large values speak against it.

    >>> null = SmallestP.of([[1, 10], [2, 30], [3, 20]])
    >>> found = null.test([[2.5, 40], [0, 0]])
    >>> found.each.tolist()
    [[0.5, 0.25], [1.0, 1.0]]
    >>> found.p_value.tolist()  # the draw (3, 20) has the largest first statistic: it is as extreme as the first row
    [0.5, 1.0]
    """

    sorted: Array  # [B, statistics], each column from the smallest on
    smallest: Array  # [B], sorted: the least rank of each draw, 1 for the largest of a statistic
    reached: NDArray[np.bool_]  # [B, statistics], in the same order: in which statistics a draw has its least rank

    @classmethod
    def of(cls, drawn: ArrayLike) -> SmallestP:
        """The null of these draws.

        Raises:
            DtLensError: unless they are finite numbers ``[B, statistics]``, at least one.
        """
        T = numbers(drawn, "drawn")
        if T.ndim != 2 or not T.size or not np.isfinite(T).all():
            raise DtLensError(f"drawn has shape {list(T.shape)}; it must be finite statistics [draws, statistics].")
        ascending = np.sort(T, axis=0)
        # Of tied draws each counts all of them.
        rank = np.stack([len(T) - np.searchsorted(a, t - TIED) for a, t in zip(ascending.T, T.T, strict=True)], axis=1)
        least = rank.min(1)
        order = np.argsort(least)
        return cls(ascending, least[order].astype(np.float64), (rank == least[:, None])[order])

    def __len__(self) -> int:
        return len(self.smallest)

    def test(self, observed: ArrayLike) -> Tested:
        """The p-values of rows of statistics ``[rows, statistics]``.

        Of a row, ``c_f`` draws have as large a statistic ``f``, and ``c`` is the least of these counts. A rank is the
        number of those that are as large, so that ties share the largest. A draw is as extreme if its rank in any
        statistic, the row itself counted, is at most ``c + 1``: if its rank among the draws is at most ``c``, or it is
        ``c + 1`` in a statistic in which the draw is larger than the row.
        """
        x = numbers(observed, "observed")
        if x.ndim != 2 or x.shape[1] != self.sorted.shape[1]:
            raise DtLensError(f"observed has shape {list(x.shape)}; it must be [rows, {self.sorted.shape[1]}].")
        B = len(self)
        above = np.stack([B - np.searchsorted(a, t - TIED) for a, t in zip(self.sorted.T, x.T, strict=True)], axis=1)
        c = above.min(1)
        count = np.searchsorted(self.smallest, c, side="right").astype(np.float64)
        # Draws whose least rank is c + 1, in a statistic in which they lie above the row; tied ones stand together.
        for least in np.unique(c[c < B]):
            rows = np.flatnonzero(c == least)
            found = slice(*np.searchsorted(self.smallest, [least + 1, least + 2]))
            larger = self.sorted[B - 1 - least] > x[rows] + TIED
            count[rows] += (self.reached[found].astype(np.float32) @ larger.T.astype(np.float32) > 0).sum(0)
        return Tested((1 + count) / (1 + B), (1 + above) / (1 + B))
