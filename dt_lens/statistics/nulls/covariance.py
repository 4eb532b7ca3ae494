"""The null of an anisotropic stream: a direction drawn from a Gaussian with a given covariance.

For one label ``a`` and ``x ~ N(0, S)`` the event ``cos^2(x, a) >= t^2`` is ``g^T B g >= 0`` for a quadratic form in
normals, ``B = S^1/2 (a a^T - t^2 I) S^1/2``, which has one positive eigenvalue. Imhof's inversion ("Computing the
distribution of quadratic forms in normal variables", 1961) oscillates, and loses all digits in the tail. With a single
positive eigenvalue there is an integral of a positive function instead (as in Craig, "A new, simple and exact result
for calculating the probability of error for two-dimensional signal constellations", 1991): from

    P(g0^2 >= q) = 1/pi int_1^oo exp(-u q / 2) / (u sqrt(u - 1)) du

and the moment generating function of the other part follows, with eigenvalues ``l_i`` of ``S`` and the label's
coordinates ``a_i`` in its eigenvectors,

    P = t/pi int_w0^oo prod_i (1 + w l_i)^-1/2 (F(w) - t^2)^-1/2 dw/w,    F(w) = sum_i a_i^2 w l_i / (1 + w l_i),

where ``F(w0) = t^2``. It keeps its relative accuracy however far in the tail. ``F`` grows from 0 to 1, so a grid of
``w0`` serves all labels at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import CubicSpline, PchipInterpolator
from scipy.optimize import brentq
from torch import Tensor

from dt_lens.arguments import LAST_SEED, whole_number
from dt_lens.errors import DtLensError
from dt_lens.statistics.multiplicity import tail_or_share
from dt_lens.statistics.nulls.haar import LabelBlocks, unit_labels

__all__ = ["CovarianceMaximum", "covariance_axes"]

Array = NDArray[Any]
NODES = 48  # of the quadrature
DEEPEST = 1380.0  # -2 log of the smallest probability that is computed
MANY = 300  # labels from which on the grid is coarser
FLAT = 1e-12  # an eigenvalue below this share of the largest counts as zero


@dataclass(frozen=True)
class CovarianceMaximum:
    """The distribution of the best match of a direction drawn from ``N(0, S)`` with a set of labels.

    For one label p is exact, up to quadrature (about six digits). For several it is the sum of the single labels'
    probabilities (the union bound) where that is below ``100 / (1 + B)``, which is tight where labels are far apart
    and too large where they are similar, and elsewhere the share of ``B`` draws, ``(1 + #) / (1 + B)``. For
    spans, drawn as the span of so many independent vectors, it is the share of draws alone, which is never below
    ``1 / (1 + B)``.

    Attributes:
        n_labels: how many labels.
        dimension: of the space that the Gaussian fills.
        span: dimensions of the subspace; 1 for a direction.
        mean, std: of the best match under the null.
    """

    assumes: ClassVar[str] = (
        "A direction that means nothing is a draw from a Gaussian with the covariance of the vectors on its side of "
        "the matrix, so it lies where the stream varies."
    )

    n_labels: int
    dimension: int
    span: int
    mean: float
    std: float
    _drawn: Array  # best matches, sorted
    _t: Array  # matches at which ...
    _log_union: Array  # ... this is the log of the union bound

    @classmethod
    def of(
        cls,
        labels: ArrayLike | LabelBlocks,
        covariance: ArrayLike,
        centred: bool = False,
        seed: int = 0,
        span: int = 1,
        samples: int | None = None,
    ) -> CovarianceMaximum:
        """The null for ``labels [n, d]`` (any lengths; zero rows are left out) and ``covariance [d, d]``.

        Args:
            labels: directions in rows.
            covariance: of the vectors that meaningless directions are drawn like; its scale does not matter.
            centred: constants are removed from what is drawn, as a LayerNorm does.
            seed: of the draws.
            span: of how many dimensions the random subspace is.
            samples: draws, by default 20,000 (fewer for large vocabularies and for spans; at least 2,000).

        Raises:
            DtLensError: for labels or a covariance that are not finite or do not fit one another, a covariance that is
                not symmetric and positive semidefinite, or one that is zero, and for numbers below 1 (a seed below 0).
        """
        width = labels.width if isinstance(labels, LabelBlocks) else np.shape(labels)[-1]
        values, vectors = _eigen(covariance, width, centred)
        n, blocks = _turned(labels, vectors)
        seed, span = whole_number(seed, "seed", 0, LAST_SEED), whole_number(span, "span", 1)
        if samples is None:
            samples = max(2000, int(min(20_000, 4e9 / max(1, n * len(values)))) // span)
        samples = whole_number(samples, "samples", 1)
        rng = np.random.default_rng([seed, n, len(values), span])
        if n == 0:
            return cls(0, len(values), span, 0.0, 0.0, np.zeros(1), np.array([0.0, 1.0]), np.zeros(2))
        drawn = _best_matches(blocks, values, min(span, len(values)), samples, rng)
        t, log_union = (np.array([0.0, 1.0]), np.zeros(2)) if span > 1 else _union(blocks, values, n)
        return cls(n, len(values), span, float(drawn.mean()), float(drawn.std()), drawn, t, log_union)

    def p_value(self, cosine: ArrayLike) -> Array:
        """How probable a best match of ``cosine`` (its absolute value) or more is; for several labels a bound."""
        t = np.clip(np.abs(np.asarray(cosine, dtype=np.float64)), 0.0, 1.0)
        if self.n_labels == 0:
            return np.ones_like(t)
        # Beyond the last point of the grid p stays at its value there.
        log_union = PchipInterpolator(_stretched(self._t), self._log_union)(_stretched(np.minimum(t, self._t[-1])))
        union = np.exp(np.minimum(log_union, 0.0))
        if self.n_labels == 1 and self.span == 1:
            return np.asarray(union)
        above = len(self._drawn) - np.searchsorted(self._drawn, t)
        return tail_or_share(union, (1 + above) / (1 + len(self._drawn)), len(self._drawn))

    def z(self, cosine: ArrayLike) -> Array:
        """How many of the null's standard deviations the best match lies above the null's mean; 0 if they are 0."""
        above = np.abs(np.asarray(cosine, dtype=np.float64)) - self.mean
        return np.asarray(above / self.std if self.std > 1e-12 else np.zeros_like(above))

    def tensors(self) -> dict[str, Tensor]:
        """The distribution, as tensors that a file can hold."""
        numbers = np.array([self.n_labels, self.dimension, self.span, self.mean, self.std], dtype=np.float64)
        arrays = {"numbers": numbers, "drawn": self._drawn, "t": self._t, "log_union": self._log_union}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor]) -> CovarianceMaximum:
        """The inverse of ``tensors``."""
        n_labels, dimension, span, mean, std = stored["numbers"].tolist()
        arrays = (stored[name].numpy() for name in ("drawn", "t", "log_union"))
        return cls(int(n_labels), int(dimension), int(span), mean, std, *arrays)


def _stretched(t: Array) -> Array:
    """A scale on which log p is nearly linear; for an isotropic Gaussian p falls like ``(1 - t^2)^(d/2)``."""
    return np.asarray(-np.log1p(-np.minimum(np.square(t), 1 - 1e-15)))


class _Blocks:
    """All labels in coordinates along the covariance's eigenvectors, ``[m, r]`` at a time."""

    def __init__(self, labels: Array | LabelBlocks, vectors: Array) -> None:
        self.labels, self.vectors = labels, vectors

    def __iter__(self) -> Iterator[Array]:
        if isinstance(self.labels, LabelBlocks):
            for block in self.labels.blocks():
                yield block @ self.vectors.astype(block.dtype)
        else:
            yield self.labels @ self.vectors


def _turned(labels: ArrayLike | LabelBlocks, vectors: Array) -> tuple[int, _Blocks]:
    if isinstance(labels, LabelBlocks):
        return labels.n, _Blocks(labels, vectors)
    E = unit_labels(labels)
    return len(E), _Blocks(E, vectors)


def _eigen(covariance: ArrayLike, width: int, centred: bool) -> tuple[Array, Array]:
    """The eigenvalues that do not count as zero, scaled so that the largest is 1, and their vectors in columns."""
    values, vectors = covariance_axes(covariance, width, centred)
    kept = values[::-1] > FLAT
    return values[::-1][kept], vectors[:, ::-1][:, kept]


def covariance_axes(covariance: ArrayLike, width: int, centred: bool) -> tuple[Array, Array]:
    """All eigenvalues of a covariance, the largest first and scaled to 1, and their vectors in columns.

    Args:
        covariance: ``[width, width]``.
        width: of the directions that it belongs to.
        centred: remove constants from both sides first.

    Raises:
        DtLensError: for one that does not fit, or is not finite, symmetric and positive semidefinite, or is zero.
    """
    S = np.asarray(covariance, dtype=np.float64)
    if S.shape != (width, width) or not np.isfinite(S).all():
        raise DtLensError(
            f"A covariance of shape {list(S.shape)} does not fit directions of {width} numbers; it must be finite and "
            f"{width} by {width}."
        )
    if not np.allclose(S, S.T, rtol=1e-5, atol=1e-6 * float(np.abs(S).max(initial=0.0))):
        raise DtLensError("A covariance must be symmetric; this one is not.")
    S = (S + S.T) / 2
    if centred:
        S = S - S.mean(0) - (S - S.mean(0)).mean(1, keepdims=True)
    values, vectors = np.linalg.eigh(S)
    if values[-1] <= 0 or values[0] < -1e-6 * values[-1]:
        raise DtLensError("A covariance must be positive semidefinite and not zero; this one is not.")
    return values[::-1] / values[-1], vectors[:, ::-1]


def _best_matches(blocks: _Blocks, values: Array, span: int, samples: int, rng: np.random.Generator) -> Array:
    """Best matches of ``samples`` directions, or spans of so many, with the labels; sorted."""
    best = np.zeros(samples)
    # Draws are held together for all labels of a block.
    step = max(1, 4_000_000 // (len(values) * span))
    for start in range(0, samples, step):
        found = best[start : start + step]
        frame = rng.standard_normal((len(found), len(values), span)) * np.sqrt(values)[:, None]
        if span == 1:
            frame /= np.linalg.norm(frame, axis=1, keepdims=True)
        else:
            frame = np.linalg.qr(frame)[0]
        for block in blocks:
            few = max(1, 8_000_000 // len(block))
            for i in range(0, len(found), few):
                part = frame[i : i + few].astype(block.dtype)
                squares = sum(np.square(part[:, :, j] @ block.T) for j in range(span))
                np.maximum(found[i : i + few], np.sqrt(np.max(squares, axis=1)), out=found[i : i + few])
    return np.sort(np.minimum(best, 1.0))


def _union(blocks: _Blocks, values: Array, n: int) -> tuple[Array, Array]:
    """Matches ``t`` from 0 up, and at each the log of the labels' probabilities of such a match, summed."""
    grid = _grid(values, 160 if n <= MANY else 72)
    w = np.exp(grid)[:, None]
    fine = np.linspace(grid[0], grid[-1] + 200.0, 4001)
    fallen = CubicSpline(fine, _log_determinant(fine, values))
    depth = fallen(grid)
    inside, outside = w * values / (1 + w * values), 1 / (1 + w * values)
    lift, weights = _quadrature(grid, fallen, values)
    most, mean = np.zeros(len(grid)), np.zeros(len(grid))
    for squares in _squares(blocks):
        F = squares @ inside.T
        most, mean = np.maximum(most, F.max(0)), mean + F.sum(0) / n
    t = np.sqrt(np.clip(np.unique(np.concatenate([[0.0], most, mean])), 0.0, 1.0))
    t = t[np.append(True, np.diff(_stretched(t)) > 1e-9)]
    slope = (inside * outside).T
    total = np.full(len(t), -np.inf)
    for squares in _squares(blocks):
        for some in np.array_split(squares, max(1, len(squares) * len(grid) * NODES // 8_000_000)):
            F, G = some @ inside.T, some @ outside.T  # they add up to the label's share in the Gaussian's support
            with np.errstate(divide="ignore", invalid="ignore"):
                D = np.tensordot(some, lift, 1)
                log_p = np.log(np.sqrt(F) / np.pi) - depth / 2 + np.log((weights / np.sqrt(D)).sum(2))
                z, dz = np.log(F / G), (some @ slope) * (1 / F + 1 / G)
            total = np.logaddexp(total, _at(t, F + G, z, dz, log_p, fallen, grid))
    total[0] = np.log(n)
    total = np.maximum(total, -1e4)  # no infinities to interpolate between
    # Single precision and rounding may leave ripples where nothing changes.
    return t, np.minimum.accumulate(total)


def _squares(blocks: _Blocks) -> Iterator[Array]:
    for block in blocks:
        yield np.square(block.astype(np.float64))


def _log_determinant(grid: Array, values: Array) -> Array:
    """``sum_i log(1 + w l_i)`` at ``w = exp(grid)``, any shape."""
    flat = np.zeros_like(grid)
    for value in values:
        flat += np.logaddexp(0.0, grid + np.log(value))
    return flat


def _grid(values: Array, count: int) -> Array:
    """Logarithms of ``w`` from where p is 1 to where it is the smallest that is computed."""
    low, high = np.log(1e-7 / values.sum()), np.log(1e14 / values[0])
    if _log_determinant(np.array([high]), values)[0] > DEEPEST:
        high = brentq(lambda x: float(_log_determinant(np.array([x]), values)[0]) - DEEPEST, low, high)
    # Half of the points evenly spaced, half where the probability falls.
    even = np.linspace(low, high, 2001)
    fallen = _log_determinant(even, values)
    measure = (even - low) / (high - low) + np.sqrt(fallen / fallen[-1])
    return np.interp(np.linspace(0, measure[-1], count), measure, even)


def _quadrature(grid: Array, fallen: CubicSpline[Any], values: Array) -> tuple[Array, Array]:
    """The integrand from every grid point on, in ``v = sqrt(log(w / w0))``, in which it is smooth.

    Returns:
        ``lift [r, k, q]``, the label's part ``F(w) - F(w0)`` by coordinate, and ``weights [k, q]``.
    """
    x, dx = np.polynomial.legendre.leggauss(NODES)
    x, dx = (x + 1) / 2, dx / 2
    # To where the integrand has fallen by exp(-40).
    depth, end = fallen(grid), np.interp(fallen(grid) + 80.0, fallen(fallen.x), fallen.x)
    reach = np.sqrt(end - grid)[:, None]
    v = reach * x
    later = grid[:, None] + v**2
    weights = 2 * v * dx * reach * np.exp(-(fallen(later) - depth[:, None]) / 2)
    first, last = np.exp(grid)[None, :, None], np.exp(later)[None]
    scale = values[:, None, None]
    lift = scale * first * np.expm1(v**2)[None] / ((1 + first * scale) * (1 + last * scale))
    return lift, weights


def _at(t: Array, support: Array, z: Array, dz: Array, log_p: Array, fallen: CubicSpline[Any], grid: Array) -> Array:
    """The log of the labels' summed probabilities at matches ``t [q]``, from their values on the grid, ``[n, k]``.

    ``log w`` is interpolated as a function of ``z = log(F / (support - F))``, equal to it for an isotropic Gaussian;
    then the probability's deviation from ``exp(-depth / 2)``, which changes slowly, as a function of ``log w``.
    """
    n, last = len(z), len(grid) - 1
    slow = log_p + fallen(grid) / 2
    total = np.full(len(t), -np.inf)
    rows = np.arange(n)
    ends = support[:, -1]
    for q, match in enumerate(t):
        with np.errstate(divide="ignore"):
            target = np.log(match**2) - np.log(np.maximum(ends - match**2, 0.0))
        i = np.clip((z <= target[:, None]).sum(1) - 1, 0, last - 1)
        h = z[rows, i + 1] - z[rows, i]
        # Outside the grid its nearest point is used, where the probability is larger.
        s = np.clip((target - z[rows, i]) / h, 0.0, 1.0)
        # Cubic Hermite: values and slopes of log w at both ends.
        m0, m1, rise = h / dz[rows, i], h / dz[rows, i + 1], grid[i + 1] - grid[i]
        along = rise * s**2 * (3 - 2 * s) + m0 * s * (1 - s) ** 2 - m1 * s**2 * (1 - s)
        part = along / rise
        value = slow[rows, i] * (1 - part) + slow[rows, i + 1] * part - fallen(grid[i] + along) / 2
        # A label outside the Gaussian's support cannot be matched better than its part inside it.
        value = np.where((ends < 1 - 1e-9) & (match**2 >= ends), -np.inf, value)
        total[q] = np.logaddexp.reduce(value)
    return total
