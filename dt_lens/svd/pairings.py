"""Which embeddings a matrix side is compared with, and the pairing of the two: one part of a scan's table."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dt_lens.errors import DtLensError
from dt_lens.lens.embeddings import Embedding
from dt_lens.lens.matrices import RESIDUAL, Matrix, SideName
from dt_lens.svd.decomposition import Decomposition
from dt_lens.svd.side_labels import SideLabels

__all__ = ["DECOMPOSING", "Pairing", "is_natural", "natural_side", "residual_side"]

DECOMPOSING = 0.6  # the share of a scan's time that goes into decompositions, more or less

Array = NDArray[np.float64]


def is_natural(embedding: Embedding, side: SideName) -> bool:
    """Whether an embedding is compared with a side by default.

    Output embeddings are compared with writing sides, all others with reading sides (``read``, ``query``, ``key``).
    """
    return (embedding.side == "out") == (side == "write")


def natural_side(matrix: Matrix, embedding: Embedding, side: SideName | None = None) -> SideName:
    """The side of a matrix to compare an embedding with: ``side`` or, if ``None``, the one that ``is_natural``.

    A matrix with one side on the residual stream has that side compared with every embedding.

    Raises:
        DtLensError: for a side that does not exist or is not on the residual stream, or ``None`` for a ``QK`` circuit.
    """
    if side is None and set(matrix.residual_sides) == {"read", "write"}:
        side = next(one for one in matrix.residual_sides if is_natural(embedding, one))
    return residual_side(matrix, side)


def residual_side(matrix: Matrix, side: SideName | None) -> SideName:
    """``side`` (if ``None``, the only one), checked to be on the residual stream.

    Raises:
        DtLensError: for a side that does not exist or is not on the residual stream, or ``None`` where there are two.
    """
    found = matrix.left if matrix.side(side) == "left" else matrix.right
    if found not in RESIDUAL:
        raise DtLensError(
            f"The {found} side of {matrix.name} is not in the residual stream, where embeddings are; "
            f"say {' or '.join(matrix.residual_sides)}."
        )
    return found


class Pairing(NamedTuple):
    """A matrix side on the residual stream, and the labels that it is compared with."""

    decomposition: Decomposition
    side: SideName
    labels: SideLabels

    @property
    def matrix(self) -> Matrix:
        """The matrix."""
        return self.decomposition.matrix

    @property
    def kind(self) -> tuple[str, SideName, str]:
        """The kind of matrix, the side and the embedding: matches of one kind are pooled."""
        return self.matrix.kind, self.side, self.labels.embedding.name

    @property
    def directions(self) -> Array:
        """``[k, d_model]``."""
        return np.asarray(self.decomposition.spanning(self.side).cpu().numpy())

    @property
    def starts(self) -> NDArray[np.int64]:
        """The first direction of every block."""
        return np.array([start for start, _ in self.decomposition.blocks], dtype=np.int64)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """How many directions every block holds."""
        return np.array([stop - start for start, stop in self.decomposition.blocks], dtype=np.int64)

    @property
    def indistinct(self) -> NDArray[np.int64]:
        """For every block, how many directions cannot be distinguished from its own; see ``Decomposition.indistinct``.

        More than ``sizes`` where rounding may turn the block out of the span of all the matrix's directions.
        """
        counts = [self.decomposition.indistinct(start, self.side) for start, _ in self.decomposition.blocks]
        return np.array(counts, dtype=np.int64)

    def columns(self, cosine: Array, label: NDArray[np.int64], z: Array, p: Array) -> dict[str, Any]:
        """The columns of the table, an entry for each block."""
        matrix, embedding, starts = self.matrix, self.labels.embedding, self.starts
        count, names = len(starts), embedding.labels
        return {
            "matrix": np.full(count, matrix.name, dtype=object),
            "layer": np.full(count, matrix.layer),
            "head": np.full(count, -1 if matrix.head is None else matrix.head),
            "side": np.full(count, self.side, dtype=object),
            "sv": starts,
            "block": self.indistinct,
            "sigma": self.decomposition.sigma.cpu().numpy()[starts],
            "embedding": np.full(count, embedding.name, dtype=object),
            "label": np.array([names[i] for i in label], dtype=object),
            "cosine": cosine,
            "z": z,
            "p_value": p,
        }
