"""Match the singular directions of two versions of a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import subspace_angles
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dt_lens.svd.decomposition import Decomposition

__all__ = ["Pair", "match_directions"]

Array = NDArray[np.float64]
# A direction with at least this share of its energy in a block's span, on both sides, belongs to that block.
INSIDE = 0.8


@dataclass(frozen=True)
class Pair:
    """Directions of A with the directions of B that match them; either is empty where nothing matches.

    Attributes:
        a, b: indices of directions; a block where there are several.
        overlap: of the spans, the geometric mean of both sides: 0 to 1.
        sign: 1 where the pair maps the same input to the same output, -1 where to its opposite, 0 without a match.
        left_angle, right_angle: the largest principal angle between the spans, in degrees.
    """

    a: tuple[int, ...]
    b: tuple[int, ...]
    overlap: float = float("nan")
    sign: int = 0
    left_angle: float = float("nan")
    right_angle: float = float("nan")


def match_directions(a: Decomposition, b: Decomposition, least: float = 0.5) -> list[Pair]:
    """Pair the blocks of ``a`` with those of ``b`` for the largest total overlap, and drop pairs below ``least``.

    Directions that cannot be distinguished in one matrix are one block in both: a block of A whose span holds several
    directions of B is matched with all of them at once.

    Returns:
        the pairs in the order of A's sigmas, then the unmatched directions of B.
    """
    left, right = (np.asarray((x @ y.T).cpu().numpy()) for x, y in ((a.left, b.left), (a.right, b.right)))
    groups = _joined(_ranges(a), _ranges(b), left**2, right**2)
    in_a, in_b = (_members(side, count) for side, count in zip(groups, left.shape, strict=True))
    most = np.maximum(in_a.sum(1)[:, None], in_b.sum(1)[None])
    # The overlap of two spans: the mean squared cosine of their principal angles, missing ones counted as zero.
    overlap = np.sqrt((in_a @ left**2 @ in_b.T / most) * (in_a @ right**2 @ in_b.T / most))
    sign = np.sign(in_a @ (left * right) @ in_b.T).astype(int)
    rows, columns = linear_sum_assignment(-overlap)
    partner = {int(i): int(j) for i, j in zip(rows, columns, strict=True) if overlap[i, j] >= least}
    pairs = []
    for i, members in enumerate(groups[0]):
        if i not in partner:
            pairs.append(Pair(members, ()))
            continue
        j = partner[i]
        theirs = groups[1][j]
        angles = [
            float(np.degrees(subspace_angles(x[list(members)].T.cpu().numpy(), y[list(theirs)].T.cpu().numpy()).max()))
            for x, y in ((a.left, b.left), (a.right, b.right))
        ]
        pairs.append(Pair(members, theirs, min(float(overlap[i, j]), 1.0), int(sign[i, j]), *angles))
    return pairs + [Pair((), theirs) for j, theirs in enumerate(groups[1]) if j not in partner.values()]


def _ranges(found: Decomposition) -> list[tuple[int, ...]]:
    return [tuple(range(start, stop)) for start, stop in found.blocks]


def _members(groups: list[tuple[int, ...]], count: int) -> Array:
    table = np.zeros((len(groups), count))
    for i, members in enumerate(groups):
        table[i, list(members)] = 1.0
    return table


def _joined(
    a: list[tuple[int, ...]], b: list[tuple[int, ...]], left: Array, right: Array
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The blocks of both, joined where a block of one holds several of the other."""
    in_a, in_b = _members(a, left.shape[0]), _members(b, left.shape[1])
    size_a, size_b = in_a.sum(1)[:, None], in_b.sum(1)[None]
    least = np.minimum(size_a, size_b)
    inside = np.minimum(in_a @ left @ in_b.T, in_a @ right @ in_b.T) / least
    edges = np.argwhere((inside >= INSIDE) & (np.maximum(size_a, size_b) > 1))
    nodes = len(a) + len(b)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], len(a) + edges[:, 1])), shape=(nodes, nodes))
    part = connected_components(graph, directed=False)[1]
    joined = []
    for blocks, parts in ((a, part[: len(a)]), (b, part[len(a) :])):
        by_part: dict[int, tuple[int, ...]] = {}
        for block, number in zip(blocks, parts, strict=True):
            by_part[int(number)] = tuple(sorted((*by_part.get(int(number), ()), *block)))
        joined.append(list(by_part.values()))
    return joined[0], joined[1]
