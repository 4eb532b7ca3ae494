"""How large a match chance alone would give, and what that makes of a table of matches.

The null is a random rotation: one direction, uniform on the sphere (Haar), against a given set of labelled directions.
For one label ``cos^2`` is Beta(1/2, (d-1)/2) (Muirhead, "Aspects of Multivariate Statistical Theory", theorem 1.5.7).
Nobody looks at one label: the statistic is the best match over all of them, so the null is the distribution of that
maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import PchipInterpolator
from scipy.special import betaincc, betainccinv
from scipy.stats import false_discovery_control

from dt_lens.errors import DtLensError

__all__ = ["HaarMaximum", "cap_probability", "frame_maximum", "q_values"]

Array = NDArray[np.float64]


def cap_probability(cosine: ArrayLike, dimension: int, span: int = 1) -> Array:
    """The chance that a random subspace meets a given unit vector at ``cosine`` or more; exact.

    The subspace has ``span`` of ``dimension`` dimensions; ``cosine`` is the length of the vector's projection on it,
    any shape, and for ``span=1`` the absolute cosine.

    >>> float(cap_probability(0.0, 10)), float(cap_probability(1.0, 10))
    (1.0, 0.0)
    """
    t = np.clip(np.asarray(cosine, dtype=np.float64), 0.0, 1.0)
    if span >= dimension:
        return np.ones_like(t)
    return np.asarray(betaincc(span / 2, (dimension - span) / 2, t**2))


@dataclass(frozen=True)
class HaarMaximum:
    """The distribution of ``max_j |cos(g, label_j)|`` for one direction ``g`` uniform on the sphere.

    The event "at least one label is matched at t" is a union of double caps of equal size, so its probability is
    ``n * P(cap) * E[1 / N]``, with ``N`` the number of labels matched by a direction drawn from a randomly chosen cap
    (the union estimator of Karp, Luby and Madras, 1989). The relative error is bounded at every t, however far in the
    tail; it is exact for one label, and for labels so far apart that their caps do not meet. ``E[1/N]`` is smooth in
    ``t``: it is drawn on a grid with common random numbers and interpolated.

    Attributes:
        n_labels: how many labels.
        mean, std: of the maximum under the null.
    """

    n_labels: int
    dimension: int
    mean: float
    std: float
    _grid: Array
    _share: Array  # E[1/N] on the grid

    @classmethod
    def of(
        cls, labels: ArrayLike, dimension: int | None = None, seed: int = 0, samples: int | None = None
    ) -> HaarMaximum:
        """The null for ``labels [n, d]`` (any lengths; zero rows are left out), directions in ``dimension`` or ``d``.

        ``dimension`` is smaller than ``d`` when directions and labels are both known to lie in a subspace, as behind a
        LayerNorm's centring. ``samples`` defaults to 4,000, fewer for very large label sets.
        """
        E = np.asarray(labels, dtype=np.float64)
        norms = np.linalg.norm(E, axis=1)
        E = E[norms > 0] / norms[norms > 0, None]
        n, d = E.shape
        dimension = dimension or d
        grid = np.sin(np.linspace(0, np.pi / 2, 41))  # dense towards 1, where caps separate
        share = np.ones_like(grid)
        if n == 0:
            raise DtLensError("An embedding has no direction that is not zero, so nothing can be compared with it.")
        if n > 1:
            samples = samples or int(np.clip(1e8 / (n * d), 200, 4000))
            share = _shares(E, dimension, grid, samples, np.random.default_rng([seed, n, d]))
        null = cls(n, dimension, 0.0, 0.0, grid, share)
        t = np.linspace(0, 1, 2001)
        survival = null.p_value(t)
        mean = float(np.trapezoid(survival, t))
        second = float(np.trapezoid(2 * t * survival, t))
        return cls(n, dimension, mean, float(np.sqrt(max(second - mean**2, 0.0))), grid, share)

    def p_value(self, cosine: ArrayLike) -> Array:
        """The chance that the best match is ``cosine`` (its absolute value) or more."""
        t = np.abs(np.asarray(cosine, dtype=np.float64))
        share = PchipInterpolator(self._grid, self._share)(np.clip(t, 0, 1)) if self.n_labels > 1 else 1.0
        return np.clip(self.n_labels * cap_probability(t, self.dimension) * share, 0.0, 1.0)

    def z(self, cosine: ArrayLike) -> Array:
        """How many of the null's standard deviations the best match lies above the null's mean."""
        return (np.abs(np.asarray(cosine, dtype=np.float64)) - self.mean) / max(self.std, 1e-300)


def _shares(E: Array, dimension: int, grid: Array, samples: int, rng: np.random.Generator) -> Array:
    """``E[1/N]`` at every threshold of the grid, from directions drawn in a random label's cap."""
    n, d = E.shape
    chosen = rng.integers(n, size=samples)
    own = E[chosen]
    gaussian = rng.standard_normal((samples, d))
    if dimension < d:
        gaussian -= gaussian.mean(1, keepdims=True)  # the subspace behind a centring
    beside = gaussian - np.einsum("sd,sd->s", gaussian, own)[:, None] * own
    beside /= np.linalg.norm(beside, axis=1, keepdims=True)
    # Single precision: a draw that falls on the wrong side of t by 1e-7 moves nothing.
    near, far = (own @ E.T).astype(np.float32), (beside @ E.T).astype(np.float32)
    uniform = rng.random(samples)
    a, b = 0.5, (dimension - 1) / 2
    share = np.empty_like(grid)
    for i, t in enumerate(grid):
        if t >= 1:
            # Only labels that coincide with the chosen one are matched perfectly.
            share[i] = np.mean(1 / (np.abs(near) > 1 - 1e-6).sum(1))
            continue
        s = np.sqrt(betainccinv(a, b, uniform * betaincc(a, b, t**2)))
        s = np.maximum(s, t)
        along, across = s[:, None].astype(np.float32), np.sqrt(1 - s**2)[:, None].astype(np.float32)
        matched = np.abs(along * near + across * far) >= t
        matched[np.arange(samples), chosen] = True
        share[i] = np.mean(1 / matched.sum(1))
    return share


def frame_maximum(
    labels: ArrayLike, directions: int, dimension: int | None = None, samples: int = 1000, seed: int = 0
) -> Array:
    """Draws of the best match over ``directions`` orthonormal directions and ``labels [n, d]``, randomly rotated.

    This is the null for "the strongest match in the whole matrix". Returns ``[samples]``, sorted. Monte Carlo: with
    ``B`` draws the smallest p-value is ``1 / (B + 1)``.
    """
    E = np.asarray(labels, dtype=np.float64)
    norms = np.linalg.norm(E, axis=1)
    E = E[norms > 0] / norms[norms > 0, None]
    n, d = E.shape
    dimension = dimension or d
    # Only the span of the labels matters; a rotation of the frame is one of the labels.
    if dimension < d:
        basis = np.linalg.svd(E - E.mean(1, keepdims=True), full_matrices=False)[2][: min(n, dimension)]
        E = E @ basis.T
        E = np.pad(E, ((0, 0), (0, dimension - E.shape[1])))
    rng = np.random.default_rng([seed, n, directions])
    best = np.empty(samples)
    for i in range(samples):
        frame, _ = np.linalg.qr(rng.standard_normal((dimension, min(directions, dimension))))
        best[i] = np.abs(E @ frame).max()
    return np.sort(best)


def q_values(p_values: ArrayLike) -> Array:
    """Benjamini and Hochberg's (1995) adjusted p-values: the share of false discoveries over the whole table.

    >>> [round(float(q), 3) for q in q_values([0.01, 0.02, 0.9])]
    [0.03, 0.03, 0.9]
    """
    p = np.asarray(p_values, dtype=np.float64)
    return np.asarray(false_discovery_control(p, method="bh")) if p.size else p
