"""How far values sort labels by the levels of factors: rank statistics of many rows of values at once.

For each row of values ``[n]``, one for each label, and each factor (a level for each label), the effect is

- Kruskal and Wallis's epsilon squared, ``H / (n - 1)``, for more than two levels: the share of the variance of the
  ranks that lies between levels, from 0 to 1 (Tomczak and Tomczak, "The need to report effect size estimates
  revisited", 2014);
- the two-sided area under the ROC curve for two levels: ``max(A, 1 - A)``, with ``A`` the chance that a label of the
  one level has a larger value than one of the other, ties counted half; from 0.5 to 1.

Within strata the ranks of ``m`` labels become ``(rank - (m + 1) / 2) / (m + 1)`` and are compared over all strata
together: for two levels van Elteren's statistic ("On the combination of independent two-sample tests of Wilcoxon",
1960). Nothing depends on the sign of the values, nor on a monotone map of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dt_lens.errors import DtLensError, as_written
from dt_lens.statistics.arrays import numbers, row

__all__ = ["RankEffects", "epsilon_squared", "two_sided_auc"]

Array = NDArray[np.float64]
Levels = Sequence[Any]
HELD = 100_000  # values ranked at a time: they fit the cache


def epsilon_squared(values: ArrayLike, levels: Levels) -> float:
    """Kruskal and Wallis's H over its largest possible value, ``H / (n - 1)``, corrected for ties.

    Args:
        values: ``[n]``.
        levels: a level for each value; values whose level is ``None`` are left out.

    Raises:
        DtLensError: unless there are at least two levels and a level for each value.

    >>> round(epsilon_squared([1, 2, 3, 4, 5, 6], "aabbcc"), 3)
    0.914
    """
    x = row(values, "values")
    return float(RankEffects({"factor": levels}, two_levels_as_auc=False)(x[None])[0, 0])


def two_sided_auc(values: ArrayLike, levels: Levels) -> float:
    """How well values tell two levels apart: the chance to put a pair in order, in the better of the two orders.

    Args: as for ``epsilon_squared``.

    Raises:
        DtLensError: unless there are two levels, and a level for each value.

    >>> two_sided_auc([1, 2, 3, 4], "xxyy"), two_sided_auc([4, 1, 2, 3], "xyyy"), two_sided_auc([1, 1], "xy")
    (1.0, 1.0, 0.5)
    """
    x = row(values, "values")
    effects = RankEffects({"factor": levels})
    if effects.measures != ("auc",):
        raise DtLensError("The area under the ROC curve is of two levels; take epsilon_squared for more.")
    return float(effects(x[None])[0, 0])


class RankEffects:
    """The effects of several factors on rows of values, all rows together.

    Attributes:
        names: of the factors, in order.
        measures: ``"auc"`` or ``"epsilon_squared"`` for each.
        n: how many labels.

    >>> effects = RankEffects({"half": "xxyy", "third": ["a", "b", "c", None]})
    >>> effects([[1, 2, 3, 4], [4, 3, 2, 1], [2, 4, 1, 3]]).round(2).tolist()
    [[1.0, 1.0], [1.0, 1.0], [0.75, 1.0]]
    """

    def __init__(
        self, factors: Mapping[str, Levels], strata: Sequence[Levels] = (), *, two_levels_as_auc: bool = True
    ) -> None:
        """Which levels the labels have.

        Args:
            factors: for each factor the level of every label, ``None`` where it does not apply.
            strata: the levels of the factors whose combinations are the strata; none for one stratum. A label with a
                ``None`` here is in no stratum and left out.
            two_levels_as_auc: whether the effect of a factor with two levels is the area under the ROC curve.

        Raises:
            DtLensError: for a factor without at least two levels (within a stratum), or another number of labels.
        """
        if not isinstance(factors, Mapping):
            raise DtLensError(f"factors is {as_written(factors)}; it must be a dictionary of levels by factor.")
        if not factors:
            raise DtLensError("There is no factor; give at least one, with a level for each label.")
        self.names = tuple(factors)
        codes = {name: coded(levels) for name, levels in factors.items()}
        self.n = len(next(iter(codes.values())))
        stratum = _crossed([coded(levels) for levels in strata], self.n)
        ranked: dict[bytes, _Ranking] = {}
        self._of: list[tuple[_Ranking, slice]] = []
        measures = []
        for name, code in codes.items():
            if len(code) != self.n or len(stratum) != self.n:
                raise DtLensError(f"The factor {name!r} has {len(code)} levels; it must have one for each label.")
            parts = _strata_of(code, stratum)
            if not parts:
                within = " in any stratum" if strata else ""
                raise DtLensError(f"The factor {name!r} does not have two levels{within}; leave it out.")
            key = b"|".join(part.tobytes() for part in parts)
            ranking = ranked.setdefault(key, _Ranking(parts, self.n))
            two = two_levels_as_auc and len(np.unique(code[np.concatenate(parts)])) == 2
            measures.append("auc" if two else "epsilon_squared")
            self._of.append((ranking, ranking.add(code, two)))
        self.measures = tuple(measures)
        self._rankings = list(ranked.values())

    def __call__(self, values: ArrayLike) -> Array:
        """The effects ``[rows, factors]`` on ``values [rows, n]``.

        Raises:
            DtLensError: for values of another shape, or that are not finite.
        """
        x = numbers(values, "values")
        if x.ndim != 2 or x.shape[1] != self.n or not np.isfinite(x).all():
            raise DtLensError(
                f"values has shape {list(x.shape)}; it must be finite numbers in rows of {self.n}, one for each label."
            )
        found = np.empty((len(x), len(self.names)))
        step = max(1, HELD // max(1, self.n))
        for begin in range(0, len(x), step):
            some = slice(begin, begin + step)
            done = {id(ranking): ranking.sums(x[some]) for ranking in self._rankings}
            for factor, (ranking, levels) in enumerate(self._of):
                sums, total = done[id(ranking)]
                found[some, factor] = ranking.effect(sums[:, levels], total, levels)
        return found


def coded(levels: Levels) -> NDArray[np.int64]:
    """A number from 0 on for each level, in order of appearance; -1 for ``None`` and NaN.

    Raises:
        DtLensError: for what is no row of levels.

    >>> coded(["b", "a", None, "b"]).tolist()
    [0, 1, -1, 0]
    """
    known: dict[Any, int] = {}
    try:
        codes = [
            -1 if level is None or level != level else known.setdefault(level, len(known))  # NaN is not itself
            for level in levels
        ]
    except (TypeError, ValueError, RuntimeError):  # not a row, or of what cannot be compared
        raise DtLensError(f"levels is {as_written(levels)}; it must be a level for each label, in a list.") from None
    return np.array(codes, dtype=np.int64)


def _crossed(strata: Sequence[NDArray[np.int64]], n: int) -> NDArray[np.int64]:
    """A number for each combination of levels; -1 where any is."""
    if not strata:
        return np.zeros(n, np.int64)
    together = np.stack(strata, axis=1)
    found = np.unique(together, axis=0, return_inverse=True)[1].ravel().astype(np.int64)
    found[(together < 0).any(1)] = -1
    return found


def _strata_of(code: NDArray[np.int64], stratum: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The labels of each stratum in which the factor has two levels at least."""
    applies = (code >= 0) & (stratum >= 0)
    parts = [np.flatnonzero(applies & (stratum == one)) for one in np.unique(stratum[applies])]
    return [part for part in parts if len(np.unique(code[part])) > 1]


@dataclass
class _Ranking:
    """The ranks that several factors share: those of the same labels within the same strata."""

    parts: list[NDArray[np.int64]]
    n: int

    def __post_init__(self) -> None:
        self._indicators = np.zeros((self.n, 0))
        self._counts = np.empty(0)  # labels of each level
        self._auc = np.empty(0)  # what the sum of level 1 is at an area of 1, less a half; NaN for epsilon squared

    def add(self, code: NDArray[np.int64], auc: bool) -> slice:
        """Take a factor in; returns the columns of its levels."""
        inside = np.concatenate(self.parts)
        levels = np.unique(code[inside])
        columns = np.zeros((self.n, len(levels)), np.float64)
        columns[inside] = code[inside, None] == levels
        start = self._indicators.shape[1]
        self._indicators = np.hstack([self._indicators, columns])
        self._counts = np.append(self._counts, columns.sum(0))
        most = np.nan
        if auc:
            most = sum(
                np.prod([(code[part] == level).sum() for level in levels]) / (len(part) + 1) for part in self.parts
            )
        self._auc = np.append(self._auc, np.full(len(levels), most))
        return slice(start, start + len(levels))

    def sums(self, x: Array) -> tuple[Array, Array]:
        """The sums of the scaled ranks of every level ``[rows, levels]``, and of all their squares ``[rows]``."""
        u = np.zeros(x.shape, np.float64)
        for part in self.parts:
            m = len(part)
            u[:, part] = (ranks(x[:, part]) - (m + 1) / 2) / (m + 1)
        return u @ self._indicators, np.einsum("bn,bn->b", u, u)

    def effect(self, sums: Array, total: Array, levels: slice) -> Array:
        """The effect of the factor in the columns ``levels``."""
        if np.isfinite(self._auc[levels.start]):
            # Each pair of labels is counted once, weighted as in the sum.
            return np.asarray(0.5 + np.abs(sums[:, 1]) / self._auc[levels.start])
        between = np.square(sums) @ (1 / self._counts[levels])
        return np.divide(between, total, out=np.zeros_like(total), where=total > 0)


def ranks(x: Array) -> Array:
    """The ranks from 1 on of each row ``[rows, n]``; ties, up to rounding, share their mean rank.

    A label's number is written into the last bits of its value, so that one fast sort gives the order too.

    >>> ranks(np.array([[0.3, 0.1, 0.3], [2.0, 3.0, 1.0]])).tolist()
    [[2.5, 1.0, 2.5], [2.0, 3.0, 1.0]]
    """
    n = x.shape[1]
    last = np.int64((1 << max(1, (n - 1).bit_length() + 4)) - 1)  # four bits more, for what rounding leaves of ties
    bits = np.ascontiguousarray(x + 0.0, dtype=np.float64).view(np.int64)
    keys = np.sort(((bits & ~last) | np.arange(n)).view(np.float64), axis=1).view(np.int64)
    order = keys & last
    rank = np.broadcast_to(np.arange(1, n + 1, dtype=np.float64), x.shape)
    keys &= ~last
    same = keys[:, 1:] == keys[:, :-1]
    if same.any():
        # The rank of the first and of the last label of each group of ties, carried through the group.
        edge = np.ones((len(x), 1), bool)
        first = np.maximum.accumulate(np.where(np.hstack([edge, ~same]), rank, 0), axis=1)
        final = np.where(np.hstack([~same, edge]), rank, n + 1)
        rank = (first + np.minimum.accumulate(final[:, ::-1], axis=1)[:, ::-1]) / 2
    found = np.empty(x.shape, np.float64)
    np.put_along_axis(found, order, rank, axis=1)
    return found
