"""A side of a matrix meets an embedding: what one part of a scan's table compares."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dt_lens.lens.matrices import Matrix, SideName
from dt_lens.svd.decomposition import Decomposition
from dt_lens.svd.side_labels import SideLabels

__all__ = ["DECOMPOSING", "Pairing"]

DECOMPOSING = 0.6  # the share of a scan's time that goes into decompositions, more or less

Array = NDArray[np.float64]


class Pairing(NamedTuple):
    """A matrix side on the residual stream, and the labels that it is compared with."""

    found: Decomposition
    side: SideName
    labels: SideLabels

    @property
    def matrix(self) -> Matrix:
        """The matrix."""
        return self.found.matrix

    @property
    def directions(self) -> Array:
        """``[k, d_model]``."""
        return np.asarray(self.found.spanning(self.side).cpu().numpy())

    @property
    def starts(self) -> NDArray[np.int64]:
        """The first direction of every block."""
        return np.array([start for start, _ in self.found.blocks], dtype=np.int64)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """How many directions every block holds."""
        return np.array([stop - start for start, stop in self.found.blocks], dtype=np.int64)

    def columns(self, cosine: Array, label: NDArray[np.int64], z: Array, p: Array) -> dict[str, Any]:
        """The columns of the table, an entry for each block."""
        matrix, embedding, starts = self.found.matrix, self.labels.embedding, self.starts
        count, names = len(starts), embedding.labels
        return {
            "matrix": np.full(count, matrix.name, dtype=object),
            "layer": np.full(count, matrix.layer),
            "head": np.full(count, -1 if matrix.head is None else matrix.head),
            "side": np.full(count, self.side, dtype=object),
            "sv": starts,
            "block": self.sizes,
            "sigma": self.found.sigma.cpu().numpy()[starts],
            "embedding": np.full(count, embedding.name, dtype=object),
            "label": np.array([names[i] for i in label], dtype=object),
            "cosine": cosine,
            "z": z,
            "p_value": p,
        }
