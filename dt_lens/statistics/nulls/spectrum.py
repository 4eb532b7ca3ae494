"""The nulls that keep how much of each direction lies on every principal axis of the stream.

A direction ``v`` is written in the eigenvectors of the stream's covariance, and the eigenvectors are cut into bands.
Under the null its part in each band keeps its length ``r_b`` and is rotated at random. With one axis to a band
(``SpectrumMaximum``) only signs are random; ``BandMaximum`` puts eigenvalues within a factor of 4 into one band. Unlike
draws from a Gaussian with that covariance, such vectors fill the space as evenly as the singular vectors that they
stand for: a whole orthonormal frame, turned like this, is orthonormal again.

For a label ``e`` whose part in band ``b`` (of ``m_b`` dimensions) has the length ``l_b``, the cosine is
``X = sum_b r_b l_b x_b``, with ``x_b`` a coordinate of a uniform unit vector in ``m_b`` dimensions, whose moment
generating function is ``0F1(m_b / 2, k^2 / 4)``. The event "at least one label is matched at t" is drawn from a mixture
of exponentially tilted laws, one for each label and sign, and weighted back (Owen, Maximov and Chertkov, "Importance
sampling the union of rare events with an application to power systems analysis", 2019). A tilted part in one band is
von Mises-Fisher, drawn by Wood's rejection ("Simulation of the von Mises Fisher distribution", 1994).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import hyp0f1

from dt_lens.arguments import whole_number
from dt_lens.errors import DtLensError
from dt_lens.statistics.nulls.covariance import covariance_axes
from dt_lens.statistics.nulls.haar import LabelBlocks, unit_labels

__all__ = ["BandMaximum", "SpectrumMaximum"]

Array = NDArray[Any]
FACTOR = 4.0  # eigenvalues of one band lie within it
FLAT = 1e-12  # eigenvalues below this share of the largest count as one, zero
PLAIN, LEAST = 400, 30  # draws of every direction (no fewer than LEAST); a share of at least COMMON of them is p
COMMON = 0.1
TILTED = 2000  # draws for a direction with a smaller p
MOST = 2048  # labels that are drawn for; the others add a bound
STEEPEST = 300.0  # of a tilt in one band
HELD = 4_000_000  # numbers held at a time


@dataclass(frozen=True)
class _Bands:
    """The principal axes in columns ``[d, d]``, largest variance first, and where each band begins."""

    axes: Array
    starts: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        return np.diff(np.append(self.starts, self.axes.shape[1]))

    def lengths_squared(self, rows: Array) -> Array:
        """``[n, d]`` in coordinates along the axes to ``[n, bands]``."""
        return np.asarray(np.add.reduceat(np.square(rows), self.starts, axis=-1))


class SpectrumMaximum:
    """The distribution of each direction's best match if only the signs of its coordinates were random.

    Each direction has a null of its own, so ``p_value`` and ``z`` take one best match per direction, in the order of
    ``directions``. For single directions p is an unbiased estimate with a bounded relative error (a few per cent),
    however far in the tail; where more than 2,048 labels could be matched the others add Hoeffding's bound. For spans
    all directions of a span are turned by the same signs, and p is the share ``(1 + #) / (1 + B)`` of ``B`` draws.

    Attributes:
        n_labels: how many labels.
        span: dimensions of the subspaces; 1 for directions.
        mean, std: of every direction's best match under the null, ``[k]``.
    """

    assumes: ClassVar[str] = (
        "A direction that means nothing keeps its squared length on every principal axis of the vectors on its side of "
        "the matrix, and its signs there are random."
    )
    factor: ClassVar[float] = 1.0  # eigenvalues within it are rotated into one another

    def __init__(
        self,
        directions: ArrayLike,
        labels: ArrayLike | LabelBlocks,
        covariance: ArrayLike,
        centred: bool = False,
        seed: int = 0,
        samples: int | None = None,
    ) -> None:
        """The nulls of ``directions``, ``[k, d]`` or spans of orthonormal ones ``[k, span, d]``.

        Args:
            directions: unit rows.
            labels: ``[n, d]`` (any lengths; zero rows are left out).
            covariance: ``[d, d]``, whose eigenvectors are the principal axes; its scale does not matter.
            centred: constants are removed from the covariance, as a LayerNorm does; directions and labels have none.
            seed: of the draws.
            samples: draws for each span, and for each direction whose p is small; 2,000 by default.

        Raises:
            DtLensError: for labels, directions or a covariance that are not finite or do not fit one another, and for
                numbers below 1 (a seed below 0).
        """
        width = labels.width if isinstance(labels, LabelBlocks) else int(np.shape(labels)[-1])
        V = np.asarray(directions, dtype=np.float64)
        V = V[:, None] if V.ndim == 2 else V
        if V.ndim != 3 or V.shape[-1] != width or not np.isfinite(V).all():
            raise DtLensError(
                f"Directions have shape {list(np.shape(directions))}; expected finite unit rows of {width} numbers, "
                "[k, d], or [k, span, d]."
            )
        values, axes = covariance_axes(covariance, width, centred)
        self._bands = _Bands(axes, _starts(values, self.factor))
        self.span, self.seed = V.shape[1], whole_number(seed, "seed", 0)
        self._samples = TILTED if samples is None else whole_number(samples, "samples", 1)
        self._labels = labels if isinstance(labels, LabelBlocks) else None  # read a block at a time, or
        self._turned = np.empty((0, width)) if isinstance(labels, LabelBlocks) else unit_labels(labels) @ axes
        self.n_labels = len(self._turned) if self._labels is None else self._labels.n
        self._V = V @ axes
        plain = self._samples if self.span > 1 else min(PLAIN, max(LEAST, self._samples))
        if self._labels is not None and self.span == 1:
            plain = max(LEAST, min(plain, int(4e9 / max(1, self.n_labels * width * len(V)))))
        self._drawn = np.zeros((len(V), plain))
        if self.n_labels:
            for i in range(len(V)):
                self._drawn[i] = np.sort(self._plain(i, plain))
        self.mean, self.std = self._drawn.mean(1), self._drawn.std(1)

    def p_value(self, cosine: ArrayLike) -> Array:
        """How probable each direction's best match ``[k]`` (its absolute value) or more is.

        Raises:
            DtLensError: unless there is one match for each direction.
        """
        t = self._fitting(cosine)
        if not self.n_labels:
            return np.ones_like(t)
        near = t * (1 - 1e-9)  # the direction is one of its own draws, up to rounding
        above = (self._drawn >= near[:, None]).sum(1)
        p = np.asarray((1 + above) / (1 + self._drawn.shape[1]))
        if self.span > 1:
            return p
        small = np.flatnonzero(p < COMMON)
        reach = self._spread(small)
        for column, i in enumerate(small):
            p[i] = self._tail(int(i), float(near[i]), reach[:, column])
        return p

    def z(self, cosine: ArrayLike) -> Array:
        """How many standard deviations of its null each direction's best match ``[k]`` lies above the null's mean."""
        above = self._fitting(cosine) - self.mean
        return np.asarray(np.divide(above, self.std, out=np.zeros_like(above), where=self.std > 1e-12))

    def _fitting(self, cosine: ArrayLike) -> Array:
        t = np.clip(np.abs(np.asarray(cosine, dtype=np.float64)), 0.0, 1.0)
        if t.shape != (len(self._V),):
            raise DtLensError(f"This null takes one best match for each of its {len(self._V)} directions.")
        return t

    def _rng(self, i: int, stage: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.n_labels, self._V.shape[-1], i, stage])

    def _blocks(self) -> Iterator[Array]:
        """All labels in coordinates along the axes, ``[m, d]`` at a time."""
        if self._labels is None:
            yield self._turned
        else:
            for block in self._labels.blocks():
                yield block @ self._bands.axes.astype(block.dtype)

    def _plain(self, i: int, draws: int) -> Array:
        """Best matches of direction (or span) ``i``, turned at random."""
        rng, best = self._rng(i, 0), np.zeros(draws)
        d = self._V.shape[-1]
        step = max(1, HELD // max(d * self.span, min(self.n_labels, 20_000)))
        for begin in range(0, draws, step):
            found = best[begin : begin + step]
            frames = self._rotated(self._V[i], len(found), rng)
            for block in self._blocks():
                squares = sum(np.square(frames[:, s].astype(block.dtype) @ block.T) for s in range(self.span))
                np.maximum(found, np.sqrt(np.max(squares, axis=1)), out=found)
        return np.minimum(best, 1.0)

    def _rotated(self, rows: Array, draws: int, rng: np.random.Generator) -> Array:
        """``rows [span, d]``, in each band rotated together at random, ``[draws, span, d]``."""
        frames, sizes = np.empty((draws, *rows.shape)), self._bands.sizes
        lone = self._bands.starts[sizes == 1]
        frames[:, :, lone] = rows[:, lone] * rng.choice(np.array([-1.0, 1.0]), (draws, 1, len(lone)))
        for start, size in zip(self._bands.starts[sizes > 1], sizes[sizes > 1], strict=True):
            part = rows[:, start : start + size]
            if len(rows) == 1:
                turned = rng.standard_normal((draws, 1, size))
                turned *= np.linalg.norm(part) / np.linalg.norm(turned, axis=2, keepdims=True)
                frames[:, :, start : start + size] = turned
                continue
            across = np.linalg.qr(part.T, mode="r")  # what the rows are in a frame of their own
            turned = np.linalg.qr(rng.standard_normal((draws, size, len(across))))[0]
            # The sign of a QR column is LAPACK's choice: draw it at random.
            turned *= rng.choice(np.array([-1.0, 1.0]), (draws, 1, len(across)))
            frames[:, :, start : start + size] = np.einsum("bmr,rs->bsm", turned, across)
        return frames

    def _spread(self, some: NDArray[np.int64]) -> Array:
        """The variance of each label's cosine (rows) with each of these directions (columns)."""
        weights = (self._bands.lengths_squared(self._V[some, 0]) / self._bands.sizes).T
        parts = [self._bands.lengths_squared(block) @ weights.astype(block.dtype) for block in self._blocks()]
        return np.concatenate(parts) if len(some) else np.empty((0, 0))

    def _tail(self, i: int, t: float, variance: Array) -> float:
        """P(the best match of direction ``i`` is at least ``t``), by tilted draws."""
        # A coordinate of a uniform unit vector in m dimensions is sub-Gaussian with variance 1 / m.
        with np.errstate(divide="ignore", over="ignore"):
            bound = 2 * np.exp(-(t**2) / (2 * np.asarray(variance, dtype=np.float64)))
        chosen = np.argsort(-bound, kind="stable")[:MOST]
        others = float(bound.sum() - bound[chosen].sum())
        E = self._turned[chosen] if self._labels is None else self._labels.rows(chosen) @ self._bands.axes
        sizes, radius = self._bands.sizes, np.sqrt(self._bands.lengths_squared(self._V[i, 0]))
        own = np.sqrt(self._bands.lengths_squared(E))
        weight = own * radius  # [n, bands]
        possible = weight.sum(1) >= t * (1 - 1e-9)
        if not possible.any():
            return min(1.0, max(others, np.finfo(float).tiny))
        E, own, weight = E[possible], own[possible], weight[possible]
        tilt, height = _tilts(weight, sizes, t)
        log_share = height - tilt * t
        share = np.exp(log_share - log_share.max())
        share /= share.sum()
        rng, total, hits = self._rng(i, 1), 0.0, 0
        step = max(1, HELD // max(len(E), E.shape[1]))
        for begin in range(0, self._samples, step):
            count = min(step, self._samples - begin)
            label = rng.choice(len(E), size=count, p=share)
            drawn = self._tilted(E[label], own[label], tilt[label, None] * weight[label], radius, rng)
            X = drawn @ E.T
            inside = np.abs(X).max(1) >= t * (1 - 1e-9)
            # log of the mixture's density relative to the null: cosh(tilt X) / its mean, by label.
            steep = np.abs(tilt * X[inside])
            log_each = np.log(share) + steep + np.log1p(np.exp(-2 * steep)) - np.log(2) - height
            total += float(np.exp(-np.logaddexp.reduce(log_each, axis=1)).sum())
            hits += int(inside.sum())
        p = total / self._samples if hits else float(2 * np.exp(log_share).sum())  # Chernoff's bound
        return float(min(1.0, max(p + others, np.finfo(float).tiny)))

    def _tilted(self, E: Array, own: Array, kappa: Array, radius: Array, rng: np.random.Generator) -> Array:
        """One vector for each row of labels ``E [B, d]``, tilted towards it by ``kappa [B, bands]``."""
        found, sizes = np.empty_like(E), self._bands.sizes
        lone = np.flatnonzero(sizes == 1)
        at = self._bands.starts[lone]
        along = rng.random((len(E), len(lone))) < 1 / (1 + np.exp(-2 * kappa[:, lone]))
        found[:, at] = radius[lone] * np.where(E[:, at] < 0, -1.0, 1.0) * np.where(along, 1.0, -1.0)
        for band in np.flatnonzero(sizes > 1):
            here = slice(self._bands.starts[band], self._bands.starts[band] + sizes[band])
            axis = np.divide(
                E[:, here], own[:, band, None], out=np.zeros_like(E[:, here]), where=own[:, band, None] > 0
            )
            x = _wood(kappa[:, band], int(sizes[band]), rng)[:, None]
            across = rng.standard_normal(axis.shape)
            across -= (across * axis).sum(1, keepdims=True) * axis
            across /= np.linalg.norm(across, axis=1, keepdims=True)
            flat = own[:, band] <= 0  # no label there: anywhere on the sphere
            x[flat] = 0.0
            found[:, here] = radius[band] * (x * axis + np.sqrt(np.maximum(1 - x**2, 0.0)) * across)
        return np.asarray(found * rng.choice(np.array([-1.0, 1.0]), (len(E), 1)))


class BandMaximum(SpectrumMaximum):
    """The same with a random rotation inside each band of eigenvalues within a factor of 4.

    Axes of nearly equal variance are an estimate, and any rotation of them describes the stream about as well: this
    null does not depend on which of them was found.
    """

    assumes = (
        "A direction that means nothing keeps its squared length on every band of principal axes whose variances are "
        "within a factor of 4, and points anywhere inside each band."
    )
    factor = FACTOR


def _starts(values: Array, factor: float) -> NDArray[np.int64]:
    """Where bands of eigenvalues ``[d]``, largest first, begin."""
    if factor <= 1:
        return np.arange(len(values))
    starts, top = [0], float(values[0])
    for i, value in enumerate(values):
        if value * factor < top and top > FLAT * values[0]:
            starts.append(i)
            top = float(value)
    return np.array(starts, dtype=np.int64)


def _tilts(weight: Array, sizes: NDArray[np.int64], t: float) -> tuple[Array, Array]:
    """The tilt of each label ``weight [n, bands]`` that moves its mean to ``t``, and its log moment function there.

    Newton's method from ``t / variance``: the mean is a concave function of the tilt, so no step goes too far.
    """
    tilt = t / np.maximum((np.square(weight) / sizes).sum(1), 1e-300)
    steepest = STEEPEST / weight.max(1)
    for _ in range(12):
        tilt = np.minimum(tilt, steepest)
        x, _, slope = _laws(tilt[:, None] * weight, sizes)
        rise = np.maximum((np.square(weight) * slope).sum(1), 1e-300)
        tilt = tilt + np.maximum(t - (weight * x).sum(1), 0.0) / rise
    tilt = np.minimum(tilt, steepest)
    return tilt, _laws(tilt[:, None] * weight, sizes)[1].sum(1)


def _laws(kappa: Array, sizes: NDArray[np.int64]) -> tuple[Array, Array, Array]:
    """Mean, log moment function and variance of a coordinate in ``sizes`` dimensions, tilted by ``kappa``."""
    x, variance = np.tanh(kappa), 1 - np.tanh(kappa) ** 2
    height = np.abs(kappa) + np.log1p(np.exp(-2 * np.abs(kappa))) - np.log(2)
    for band in np.flatnonzero(sizes > 1):
        m, k = int(sizes[band]), kappa[:, band]
        whole = hyp0f1(m / 2, k**2 / 4)
        height[:, band] = np.log(whole)
        x[:, band] = k / m * hyp0f1(m / 2 + 1, k**2 / 4) / whole
        inner = np.where(k > 1e-4, (m - 1) * x[:, band] / np.maximum(k, 1e-4), (m - 1) / m)
        variance[:, band] = np.maximum(1 - x[:, band] ** 2 - inner, 0.0)
    return x, height, variance


def _wood(kappa: Array, m: int, rng: np.random.Generator) -> Array:
    """The coordinate along the mean of von Mises-Fisher vectors in ``m`` dimensions, one for each ``kappa``."""
    x, left = np.empty_like(kappa), np.arange(len(kappa))
    b = (m - 1) / (2 * kappa + np.sqrt(4 * kappa**2 + (m - 1) ** 2))
    top = (1 - b) / (1 + b)
    level = kappa * top + (m - 1) * np.log1p(-(top**2))
    while len(left):
        z, u = rng.beta((m - 1) / 2, (m - 1) / 2, len(left)), rng.random(len(left))
        w = (1 - (1 + b[left]) * z) / (1 - (1 - b[left]) * z)
        kept = kappa[left] * w + (m - 1) * np.log(1 - top[left] * w) - level[left] >= np.log(u)
        x[left[kept]], left = w[kept], left[~kept]
    return x
