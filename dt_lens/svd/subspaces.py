"""How much of the span of a matrix's leading directions lies in the span of an embedding's labels.

A span does not depend on the vectors that it is given by, so nothing here rests on a single vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.linalg import subspace_angles

from dt_lens.arguments import LAST_SEED, whole_number, whole_numbers
from dt_lens.errors import DtLensError
from dt_lens.progress import ProgressCallback, reporting
from dt_lens.statistics.multiplicity import q_values
from dt_lens.statistics.nulls.haar import LabelBlocks
from dt_lens.statistics.nulls.subspaces import SubspaceOverlap
from dt_lens.svd.decomposition import common_boundary
from dt_lens.svd.decompositions import Decompositions
from dt_lens.svd.pairings import Pairing
from dt_lens.svd.side_labels import SideLabels

__all__ = ["COLUMNS", "label_span", "subspaces"]

COLUMNS = ["matrix", "layer", "head", "side", "k", "embedding", "labels", "dimension", "largest", "haar_largest"]
COLUMNS += ["overlap", "haar_overlap", "z", "p_value", "q_value"]
SIZES = (1, 2, 4, 8, 16, 32)
RANK = 1e-6  # a singular value of the unit labels below so much of the largest adds no dimension
SAMPLES = 200  # random subspaces for the median of the largest cosine
Array = NDArray[np.float64]


def subspaces(
    svd: Decompositions,
    matrices: Sequence[str] | str | None = None,
    embeddings: Sequence[str] | str | None = None,
    k: int | Sequence[int] = SIZES,
    *,
    seed: int = 0,
    progress: bool | ProgressCallback | None = None,
) -> pd.DataFrame:
    """See ``WeightSVD.subspaces``."""
    sizes, seed = whole_numbers(k, "k", 1), whole_number(seed, "seed", 0, LAST_SEED)
    if not sizes:
        raise DtLensError("k is empty; give one or several whole numbers of at least 1.")
    rows: list[tuple[Any, ...]] = []
    spans: dict[bytes, Array] = {}
    with reporting(progress) as tell:
        pairings = svd.pairings(matrices, embeddings, lambda what, share: tell(what, share / 2))
        for number, pairing in enumerate(pairings):
            tell(f"comparing with {pairing.labels.embedding.name}", 0.5 + 0.5 * number / len(pairings))
            if pairing.labels.digest not in spans:
                spans[pairing.labels.digest] = label_span(pairing.labels)
            rows += _rows(pairing, spans[pairing.labels.digest], sizes, seed)
    table = pd.DataFrame(rows, columns=COLUMNS[:-1])
    table["head"] = table["head"].astype("Int64")
    table["q_value"] = q_values(table["p_value"].to_numpy(dtype=np.float64))
    table.attrs = {
        "fold_layernorm": svd.fold_layernorm,
        "null": "haar",
        "assumes": SubspaceOverlap.assumes,
        "seed": seed,
        "untrained": [e.name for e in svd.registry.values() if not e.trained],
    }
    return table


def label_span(labels: SideLabels) -> Array:
    """An orthonormal basis ``[m, d]`` of the span of an embedding's labels."""
    found = labels.for_null
    gram = np.zeros((labels.width, labels.width))
    for block in found.blocks() if isinstance(found, LabelBlocks) else [found]:
        gram += block.astype(np.float64).T @ block.astype(np.float64)
    values, vectors = np.linalg.eigh(gram)
    # The Gram matrix has the squares of the singular values, so half of their digits are lost.
    kept = values > max(RANK**2, 1e-13) * values[-1] if values[-1] > 0 else np.zeros(len(values), bool)
    return np.ascontiguousarray(vectors[:, kept].T)


def _rows(pairing: Pairing, span: Array, sizes: Sequence[int], seed: int) -> list[tuple[Any, ...]]:
    matrix, found, labels = pairing.matrix, pairing.decomposition, pairing.labels
    rows, directions, seen = [], pairing.directions, set()
    dimension, constants = labels.dimension, _behind_centring(labels)
    if constants:
        # What is written along the constant vector reaches no label: compare in the space orthogonal to it.
        directions, dimension = directions - directions.mean(1, keepdims=True), dimension - 1
    for wanted in sizes:
        # Directions that cannot be distinguished are all in the span, or none of them is.
        k = common_boundary(found, found, min(wanted, len(found.sigma)))
        if k == 0 or k in seen or not len(span):
            continue
        seen.add(k)
        within = _basis(directions[:k])
        if not len(within):
            continue
        cosines = np.cos(subspace_angles(within.T, span.T))
        null = SubspaceOverlap(len(within), min(len(span), dimension), dimension)
        overlap = float(np.square(cosines).sum())
        few = min(null.k, null.m)
        where = (matrix.name, matrix.layer, matrix.head, pairing.side, k, labels.embedding.name, null.m)
        largest = (float(cosines.max()), null.largest_cosine(SAMPLES, seed))
        shares = (overlap / few, null.mean / few, float(null.z(overlap)), float(null.p_value(overlap)))
        rows.append((*where, dimension, *largest, *shares))
    return rows


def _behind_centring(labels: SideLabels) -> bool:
    """Whether these labels read through a LayerNorm of their own on a side that is not centred itself."""
    embedding = labels.embedding
    through = embedding.layernorm is not None and not embedding.rms and embedding.side == "out"
    return labels.folded and through and not labels.centred


def _basis(directions: Array) -> Array:
    """Orthonormal rows of the span of directions that were orthonormal before centring."""
    _, sigma, right = np.linalg.svd(directions, full_matrices=False)
    return np.asarray(right[sigma > RANK])
