"""The null of a random rotation: the best match of a random direction with a set of labels.

The null is a random rotation: one direction, uniform on the sphere (Haar), against a given set of labelled directions.
For one label ``cos^2`` is Beta(1/2, (d-1)/2) (Muirhead, "Aspects of Multivariate Statistical Theory", theorem 1.5.7).
The statistic is the best match over all labels, so the null is the distribution of that maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dt_lens.arguments import LAST_SEED, whole_number
from dt_lens.errors import DtLensError
from dt_lens.statistics.arrays import numbers

__all__ = ["HaarMaximum", "LabelBlocks", "cap_probability", "frame_maximum"]

Array = NDArray[np.float64]
Floats = NDArray[Any]  # float32 or float64
CHUNK = 4_000_000  # numbers held at a time
PIECE = 2**16  # numbers that fit into the processor's cache several times over
OUTSIDE = 1e-6  # the share of labels' squared lengths that may lie outside the given number of dimensions


def cap_probability(cosine: ArrayLike, dimension: int, span: int = 1) -> Array:
    """The probability that a unit vector's projection on a random subspace is ``cosine`` or longer; exact.

    The subspace has ``span`` of ``dimension`` dimensions; ``cosine`` is the length of the vector's projection on it,
    any shape, and for ``span=1`` the absolute cosine. Its square is Beta(span/2, (dimension-span)/2).

    >>> float(cap_probability(0.0, 10)), float(cap_probability(1.0, 10))
    (1.0, 0.0)
    """
    t = np.clip(np.abs(numbers(cosine, "cosine")), 0.0, 1.0)
    dimension, span = whole_number(dimension, "dimension", 1), whole_number(span, "span", 1)
    if span >= dimension:
        return np.ones_like(t)
    from scipy.special import betaincc  # SciPy takes a while to import

    return np.asarray(betaincc(span / 2, (dimension - span) / 2, t**2))


def _cap_cosine(probability: ArrayLike, dimension: int, span: int) -> Array:
    """The inverse of ``cap_probability``."""
    from scipy.special import betainccinv

    return np.asarray(np.sqrt(betainccinv(span / 2, (dimension - span) / 2, np.asarray(probability, dtype=np.float64))))


@dataclass(frozen=True)
class HaarMaximum:
    """The distribution of the best match of one random direction, or of one random subspace, with a set of labels.

    The match with a label is the absolute cosine, for a subspace the length of the label's projection. The event "at
    least one label is matched at t" is a union of equally likely events, so its probability is ``n P(cap) E[1/N]``,
    with ``N`` the number of labels matched by a direction drawn from a randomly chosen label's cap (the union estimator
    of Karp, Luby and Madras, "Monte-Carlo approximation algorithms for enumeration problems", 1989). The relative error
    is bounded at every t, however far in the tail; it is exact for one label, and for labels so far apart that their
    caps do not intersect. ``E[1/N]`` is smooth in ``t``: it is drawn on a grid with common random numbers, and
    interpolated. Where p is large plain draws of the best match are the better estimate, and the two are weighted by
    their precision.

    Attributes:
        n_labels: how many labels.
        dimension: of the space that direction and labels lie in.
        span: dimensions of the subspace; 1 for a direction.
        mean, std: of the best match under the null.
    """

    assumes: ClassVar[str] = (
        "A direction that means nothing points anywhere with equal chance, in all dimensions of the residual stream."
    )

    n_labels: int
    dimension: int
    span: int
    mean: float
    std: float
    _grid: Array
    _log_share: Array  # log E[1/N] on the grid
    _drawn: Array  # best matches of random directions, sorted; empty where p is exact

    @classmethod
    def of(
        cls,
        labels: ArrayLike | LabelBlocks,
        dimension: int | None = None,
        seed: int = 0,
        span: int = 1,
        samples: int | None = None,
    ) -> HaarMaximum:
        """The null for ``labels [n, d]`` (any lengths; zero rows are left out).

        Depends on the angles between the labels and not on the basis that they are written in, to the last Monte Carlo
        draw.

        Args:
            labels: directions in rows; ``LabelBlocks`` know their dimension.
            dimension: of the space in which labels and direction lie, default ``d``; ``d - 1`` behind a LayerNorm's
                centring, where all of them are orthogonal to the constant vector.
            seed: of the Monte Carlo part.
            span: of how many dimensions the random subspace is.
            samples: draws, by default 5,000 (fewer for more than 800 labels, and for spans; at least 800).

        Raises:
            DtLensError: for labels that are not finite or do not lie in so few dimensions, or numbers below 1 (a seed
                below 0).
        """
        seed, span = whole_number(seed, "seed", 0, LAST_SEED), whole_number(span, "span", 1)
        E: Array | None = None
        if isinstance(labels, LabelBlocks):
            n, dimension = labels.n, labels.dimension
        else:
            E = unit_labels(labels)
            n, dimension = len(E), _dimension(E, dimension)
        if n == 0 or span >= dimension:
            # Without labels the best match is 0; the whole space matches every label perfectly.
            flat = np.full(2, -np.log(max(n, 1)))
            return cls(n, dimension, span, float(n > 0), 0.0, np.array([0.0, 1.0]), flat, np.empty(0))
        tail = _cap_cosine(np.concatenate([np.linspace(1, 0.1, 10), np.logspace(-1.5, -16, 18)]), dimension, span)
        grid = np.unique(np.concatenate([tail, tail[-1] + (1 - tail[-1]) * np.sin(np.linspace(0, np.pi / 2, 10))]))
        share, drawn = np.ones_like(grid), np.empty(0)
        if n > 1:
            if samples is None:
                samples = max(800, int(min(4e6 / n, 5000)) // span)
            samples = whole_number(samples, "samples", 1)
            rng = np.random.default_rng([seed, n, dimension, span])
            C = labels if isinstance(labels, LabelBlocks) else _Whole(_coordinates(np.asarray(E), dimension))
            share, drawn = _shares(C, span, grid, samples, rng), _best_matches(C, span, samples, rng)
        null = cls(n, dimension, span, 0.0, 0.0, grid, np.log(share), drawn)
        t = np.linspace(0, float(_cap_cosine(1e-18 / n, dimension, span)), 601)
        survival = null.p_value(t)
        mean = float(np.trapezoid(survival, t))
        second = float(np.trapezoid(2 * t * survival, t))
        std = float(np.sqrt(max(second - mean**2, 0.0)))
        return cls(n, dimension, span, mean, std, grid, np.log(share), drawn)

    def tensors(self) -> dict[str, Tensor]:
        """The distribution, as tensors that a file can hold."""
        numbers = np.array([self.n_labels, self.dimension, self.span, self.mean, self.std], dtype=np.float64)
        arrays = {"numbers": numbers, "grid": self._grid, "log_share": self._log_share, "drawn": self._drawn}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor]) -> HaarMaximum:
        """The inverse of ``tensors``."""
        n_labels, dimension, span, mean, std = stored["numbers"].tolist()
        grids = (stored[name].numpy() for name in ("grid", "log_share", "drawn"))
        return cls(int(n_labels), int(dimension), int(span), mean, std, *grids)

    def p_value(self, cosine: ArrayLike) -> Array:
        """The probability that the best match is ``cosine`` (its absolute value) or more."""
        t = np.clip(np.abs(np.asarray(cosine, dtype=np.float64)), 0.0, 1.0)
        if self.n_labels == 0:
            return np.ones_like(t)
        from scipy.interpolate import PchipInterpolator

        share = np.exp(PchipInterpolator(self._grid, self._log_share)(t))
        p = np.clip(self.n_labels * cap_probability(t, self.dimension, self.span) * share, 0.0, 1.0)
        if not len(self._drawn):
            return p
        # With B draws each the variances are about p^2 / B for the union and p (1 - p) / B for the plain share.
        plain = 1 - np.searchsorted(self._drawn, t) / len(self._drawn)
        return np.asarray((1 - p) * p + p * plain)

    def z(self, cosine: ArrayLike) -> Array:
        """How many of the null's standard deviations the best match lies above the null's mean; 0 if they are 0."""
        above = np.abs(np.asarray(cosine, dtype=np.float64)) - self.mean
        return above / self.std if self.std > 0 else np.zeros_like(above)


def unit_labels(labels: ArrayLike) -> Array:
    """Labels as unit rows in float64, zero rows left out.

    Raises:
        DtLensError: for values that are not finite or not ``[n, d]``.
    """
    E = numbers(labels, "labels")
    if E.ndim != 2 or not np.isfinite(E).all():
        raise DtLensError(f"Labels have shape {list(E.shape)}; a null takes finite directions in rows, [n, d].")
    norms = np.linalg.norm(E, axis=1)
    return np.asarray(E[norms > 0] / norms[norms > 0, None])


def _dimension(E: Array, dimension: int | None) -> int:
    """The dimension of the space of the labels ``[n, d]``: ``d`` unless given."""
    return E.shape[1] if dimension is None else whole_number(dimension, "dimension", 1)


def _coordinates(E: Array, dimension: int) -> Array:
    """The labels ``[n, d]`` in coordinates that depend on their angles alone, ``[n, dimension]``.

    A rotated model is then compared with the very same draws.
    """
    n = len(E)
    if n <= dimension:
        # The Cholesky factor is unique; the tiny ridge keeps labels that coincide from breaking it.
        inside = np.linalg.cholesky(E @ E.T + 1e-12 * np.eye(n))
    else:
        squares, axes = np.linalg.eigh(E.T @ E)
        if squares[:-dimension].sum() > OUTSIDE * n:
            raise DtLensError(f"The labels do not lie in {dimension} dimensions; leave dimension out, or give more.")
        inside = E @ axes[:, ::-1][:, :dimension]
        inside = inside * np.where(inside[np.abs(inside).argmax(0), np.arange(inside.shape[1])] < 0, -1.0, 1.0)
    return np.pad(inside, ((0, 0), (0, dimension - inside.shape[1])))


@dataclass(frozen=True)
class LabelBlocks:
    """Labels ``[n, d]``, too many to hold in float64 at once, read a block at a time whenever they are needed.

    The null then depends on the labels' basis, but only through its Monte Carlo draws.

    Attributes:
        n: how many labels, zero rows left out.
        width: ``d``.
        centred: all labels are orthogonal to the constant vector, and so is the random direction.
        rows: unit rows in float64 for an array of numbers of labels.
        blocks: all unit rows in order, in float32, as an iterator over blocks ``[m, d]``.
    """

    n: int
    width: int
    centred: bool
    rows: Callable[[NDArray[np.int64]], Array]
    blocks: Callable[[], Iterator[Floats]]

    @property
    def dimension(self) -> int:
        """The dimension of the space in which labels and directions lie."""
        return self.width - int(self.centred)

    def draw(self, rng: np.random.Generator, size: int, span: int) -> Array:
        """Standard normal vectors of that space, ``[size, d, span]``."""
        x = rng.standard_normal((size, self.width, span))
        return np.asarray(x - x.mean(1, keepdims=True)) if self.centred else x

    def batch(self, span: int) -> int:
        """Draws to hold at a time."""
        return max(1, 4 * CHUNK // (self.width * span))


class _Whole:
    """All labels at once, in coordinates of their own."""

    def __init__(self, C: Array) -> None:
        self.C = C
        self.n, self.dimension = C.shape

    def rows(self, index: NDArray[np.int64]) -> Array:
        return np.asarray(self.C[index])

    def blocks(self) -> Iterator[Floats]:
        yield self.C

    def draw(self, rng: np.random.Generator, size: int, span: int) -> Array:
        return rng.standard_normal((size, self.dimension, span))

    def batch(self, span: int) -> int:
        return max(1, int(CHUNK // (max(self.n, self.dimension) * (span + 2))))


def _shares(C: _Whole | LabelBlocks, span: int, grid: Array, samples: int, rng: np.random.Generator) -> Array:
    """``E[1/N]`` at every threshold of the grid, from subspaces drawn in a random label's cap.

    A subspace in which a label has a projection of length ``c`` holds one vector ``c label + sqrt(1 - c^2) h``, and the
    rest of it is orthogonal to the label and to ``h``.
    """
    total, caps = np.zeros_like(grid), cap_probability(grid, C.dimension, span)
    # How deep in the cap a draw lies is its quantile; the inverse of the distribution is slow, so it is tabulated.
    nodes = np.linspace(np.log(1e-7), 0.0, 256)
    depth = [_cap_cosine(np.exp(nodes) * cap, C.dimension, span) for cap in caps]
    chunk = C.batch(span)
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        chosen, log_uniform = rng.integers(C.n, size=size), np.log1p(-rng.random(size))
        own = C.rows(chosen)
        frame = C.draw(rng, size, span)
        frame -= own[:, :, None] * np.einsum("sd,sdk->sk", own, frame)[:, None]
        frame = np.linalg.qr(frame)[0]
        # The sign of a QR column is LAPACK's choice: draw it at random.
        coin = rng.choice(np.array([-1, 1], dtype=np.float32), size)[:, None]
        cosines = [np.maximum(np.interp(log_uniform, nodes, table), t) for table, t in zip(depth, grid, strict=True)]
        turns = [(c[:, None].astype(np.float32), np.sqrt(1 - c**2)[:, None].astype(np.float32)) for c in cosines]
        counts, begin = np.zeros((len(grid), size), np.int64), 0
        for block in C.blocks():
            # Single precision: a draw that falls on the wrong side of t by 1e-7 moves nothing.
            near = _times(own, block).astype(np.float32, copy=False)
            inside = np.stack([_times(frame[:, :, i], block).astype(np.float32, copy=False) for i in range(span)])
            here = np.flatnonzero((chosen >= begin) & (chosen < begin + len(block)))
            _count(counts, near, inside[0] * coin, inside[1:], grid, turns, (here, chosen[here] - begin))
            begin += len(block)
        total += (1 / counts).sum(1)
    return total / samples


def _times(directions: Array, block: Floats) -> Floats:
    """The cosines ``[k, m]`` of directions with the labels of a block, in the block's precision."""
    if block.dtype == np.float64:
        return np.asarray(directions @ block.T)
    # By torch, which prepares blocks: NumPy's threads stay busy for a while after a product, and slow torch's.
    narrow = torch.from_numpy(np.ascontiguousarray(directions, dtype=np.float32))
    return np.asarray((narrow @ torch.from_numpy(block).T).numpy())


def _count(
    counts: NDArray[np.int64],
    near: Floats,
    far: Floats,
    others: Floats,
    grid: Array,
    turns: list[tuple[Floats, Floats]],
    own: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> None:
    """Add to ``counts [grid, draws]`` how many of the labels ``[m]`` each draw matches at each threshold.

    Args:
        near, far: ``[draws, m]``: the cosines of the labels with a draw's own label and with ``h``; overwritten.
        others: ``[span - 1, draws, m]``: with the rest of the subspace.
        turns: at each threshold the parts of the two in the draw's vector, ``[draws, 1]`` each.
        own: of the draws whose own label is among these: their numbers, and its number.
    """
    counts[:, own[0]] += 1
    near[own] = far[own] = np.nan  # counted above, and never below
    step, ones = max(1, PIECE // near.shape[1]), np.ones(near.shape[1], np.float32)
    for first in range(0, len(near), step):
        some = slice(first, first + step)
        rest = np.square(others[:, some]).sum(0).ravel() if len(others) else None
        x, y, row = near[some].ravel(), far[some].ravel(), None
        reach = x * x + y * y if rest is None else x * x + y * y + rest
        for i, t in enumerate(grid):
            if t >= 1:  # only labels that coincide with the chosen one are matched perfectly
                counts[i, some] += (np.abs(near[some]) > 1 - 1e-6).sum(1)
                continue
            # Labels that no turn of the vector reaches are left out; those left at one threshold serve the next.
            within = reach >= np.float32(t**2 * (1 - 1e-5))
            if 2 * np.count_nonzero(within) < len(within):
                kept = np.flatnonzero(within)
                row = kept // near.shape[1] if row is None else row[kept]
                x, y, reach, rest = x[kept], y[kept], reach[kept], None if rest is None else rest[kept]
            along, across = (part[some] for part in turns[i])
            if row is None:
                squares = (along * x.reshape(-1, len(ones)) + across * y.reshape(-1, len(ones))).ravel()
            else:
                squares = along[row, 0] * x + across[row, 0] * y
            np.square(squares, out=squares)
            if rest is not None:
                squares += rest
            matched = squares >= np.float32(t) ** 2
            if row is None:
                counts[i, some] += (matched.reshape(-1, len(ones)).astype(np.float32) @ ones).astype(np.int64)
            else:
                counts[i, some] += np.bincount(row[matched], minlength=len(along))


def _best_matches(C: _Whole | LabelBlocks, span: int, samples: int, rng: np.random.Generator) -> Array:
    """Best matches of ``samples`` random subspaces with the labels, sorted."""
    best = np.zeros(samples)
    chunk = max(1, CHUNK // (max(C.n, C.dimension) * span)) if isinstance(C, _Whole) else C.batch(span)
    for start in range(0, samples, chunk):
        found = best[start : start + chunk]
        frame = np.linalg.qr(C.draw(rng, len(found), span))[0]
        for block in C.blocks():
            projected = sum(np.square(_times(frame[:, :, i], block)) for i in range(span))
            np.maximum(found, np.sqrt(np.max(projected, axis=1)), out=found)
    return np.sort(best)


def frame_maximum(
    labels: ArrayLike, directions: int, dimension: int | None = None, samples: int = 1000, seed: int = 0
) -> Array:
    """Draw the best match over ``directions`` orthonormal directions, randomly rotated, and ``labels [n, d]``.

    This is the null for "the strongest match in the whole matrix". Returns ``[samples]``, sorted. Monte Carlo: with
    ``B`` draws the smallest p-value is ``1 / (B + 1)``.

    Raises:
        DtLensError: as ``HaarMaximum.of`` does.
    """
    E = unit_labels(labels)
    dimension, directions = _dimension(E, dimension), whole_number(directions, "directions", 1)
    samples, seed = whole_number(samples, "samples", 1), whole_number(seed, "seed", 0, LAST_SEED)
    if not len(E):
        return np.zeros(samples)
    C = _coordinates(E, dimension)
    # Only the span of the labels matters, so of a Haar-random orthogonal matrix only as many rows are drawn as it
    # has dimensions, and as many columns as there are directions: the shorter of both, and cut.
    inside, count = min(len(E), dimension), min(directions, dimension)
    C = C[:, :inside].astype(np.float32)  # seven digits are enough for these products
    rng = np.random.default_rng([seed, len(E), directions, dimension])
    best = np.empty(samples)
    for i in range(samples):
        drawn = np.linalg.qr(rng.standard_normal((dimension, min(inside, count))))[0]
        corner = drawn[:inside] if count <= inside else drawn[:count].T
        best[i] = np.abs(C @ corner.astype(np.float32)).max()
    return np.sort(best)
