"""The null of the claims about weights: what a random rotation of a matrix's directions would give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dt_lens.study.court.case import Labels
from dt_lens.study.court.claims import Finding

__all__ = ["NullComparison", "best_match", "weights_finding", "rotated", "compare_with_null"]

Array = NDArray[np.float64]
OPERATIONS = 4e11  # multiplications that a null may take; large vocabularies get fewer draws
LEAST = 200  # draws of a null
HELD = 8_000_000  # cosines in memory at a time


def best_match(cosines: Array) -> Array:
    """The mean over labels of the best |cosine| over directions: ``[draw, label, direction]`` -> ``[draw]``."""
    return np.asarray(np.abs(cosines).max(2).mean(1))


def rotated(labels: Labels, directions: int, statistic: Callable[[Array], Array], draws: int, seed: list[int]) -> Array:
    """Draw a statistic of the cosines between labels and orthonormal directions that are turned at random.

    Args:
        labels: ``[n, d]``.
        directions: how many directions; at most the labels' dimension.
        statistic: of cosines ``[draw, n, direction]``, giving ``[draw]``.
        draws: how many draws at most; with many labels fewer, but at least 200.
        seed: of the draws.

    Returns:
        ``[draws]``, in the order in which they were drawn.
    """
    rows, dimension = labels.rows, labels.dimension
    # Only the span of the labels matters: the frame is drawn in coordinates whose first axes are that span.
    if len(rows) < dimension:
        inside = np.linalg.svd(rows, full_matrices=False)
        rows = inside[0] * inside[1]
    else:
        basis = np.linalg.svd(rows.T @ rows)[0][:, :dimension]
        rows = rows @ basis
    n, m = rows.shape
    k = min(directions, dimension)
    draws = int(np.clip(OPERATIONS / (2.0 * n * m * k), min(LEAST, draws), draws))
    rng = np.random.default_rng([*seed, n, k, dimension])
    E = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
    found, step = [], max(1, HELD // max(n * k, dimension * min(m, k)))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        normal = rng.standard_normal((size, dimension, min(m, k)), dtype=np.float32)
        frame = torch.linalg.qr(torch.from_numpy(normal))[0]
        # The corner [m, k] of a random orthogonal matrix: the short side is drawn, the long one cut.
        corner = frame[:, :m] if k <= m else frame[:, :k].mT
        found.append(statistic((E @ corner).numpy().astype(np.float64)))
    return np.concatenate(found)


class NullComparison(NamedTuple):
    """A statistic, and where it lies in its null."""

    statistic: float
    mean: float
    low: float
    high: float
    critical: float
    p_value: float

    @property
    def excess(self) -> float:
        """How far the statistic lies above the null's mean."""
        return self.statistic - self.mean


def compare_with_null(statistic: float, null: Array) -> NullComparison:
    """Compare ``statistic`` with draws ``[n]`` of its null: mean, central 95 %, 95 % point less the mean, and p."""
    low, point, high = np.quantile(null, (0.025, 0.95, 0.975))
    p = (1 + int((null >= statistic).sum())) / (1 + len(null))
    mean = float(null.mean())
    return NullComparison(float(statistic), mean, float(low), float(high), float(point) - mean, p)


def weights_finding(
    compared: NullComparison, margin: float, quiet: bool, said: str, numbers: Mapping[str, object]
) -> Finding:
    """The finding on a claim about weights, whose effect is the excess over the null's mean."""
    return Finding(
        compared.statistic,
        compared.low,
        compared.high,
        effect=compared.excess,
        margin=margin,
        p_value=compared.p_value,
        critical=compared.critical,
        quiet=quiet,
        said=said,
        numbers=numbers,
    )
