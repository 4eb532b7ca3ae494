"""The best match of each whole matrix with each whole embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dt_lens.arguments import LAST_SEED, whole_number
from dt_lens.errors import DtLensError
from dt_lens.progress import silent
from dt_lens.statistics.multiplicity import q_values, tail_or_share
from dt_lens.statistics.nulls.haar import frame_maximum
from dt_lens.svd.decompositions import Decompositions
from dt_lens.svd.null_sources import OF_THE_STREAM, Pools, draw_pools, require_null
from dt_lens.svd.pairings import Pairing

__all__ = ["strongest"]

COLUMNS = ["matrix", "side", "embedding", "sv", "label", "cosine", "null_median", "p_value", "q_value"]


def strongest(
    svd: Decompositions,
    matrices: Sequence[str] | str | None,
    embeddings: Sequence[str] | str | None,
    samples: int,
    seed: int,
    null: str | Pools,
    draws: int | None,
) -> pd.DataFrame:
    """See ``WeightSVD.strongest``."""
    require_null(null.name if isinstance(null, Pools) else null)
    if null in OF_THE_STREAM:
        raise DtLensError(
            f"null={null!r} draws single directions, not the frame of a whole matrix; use scan(null={null!r}) "
            "or another null."
        )
    samples, seed = whole_number(samples, "samples", 1, 10**7), whole_number(seed, "seed", 0, LAST_SEED)
    pairings = [pairing for pairing in svd.pairings(matrices, embeddings) if len(pairing.decomposition.sigma)]
    pools = null if isinstance(null, Pools) else None
    if null in ("untrained", "shuffled"):
        pools = draw_pools(svd, str(null), pairings, seed, draws, silent)
    draws_of: dict[tuple[Any, ...], NDArray[np.float64]] = {}
    table: list[tuple[Any, ...]] = []
    for pairing in pairings:
        sv, label, value = _best(pairing)
        if pools is not None:
            pool = pools.frame(pairing)
            median, p = float(np.median(pool.drawn)), float(pool.p_value(value))
        else:
            labels, count = pairing.labels, len(pairing.decomposition.sigma)
            key = (labels.digest, count, labels.dimension)
            if key not in draws_of:
                draws_of[key] = frame_maximum(labels.directions, count, labels.dimension, samples, seed)
            drawn = draws_of[key]
            share = (1 + int((drawn >= abs(value)).sum())) / (1 + samples)
            union = min(1.0, count * float(svd.rotations(labels, 1, seed).p_value(value)))
            # Weighted directions are not orthogonal, as a rotated frame is; the union bound holds for any directions.
            skewed = bool(pairing.decomposition.activations) and pairing.matrix.side(pairing.side) == "left"
            median, p = float(np.median(drawn)), union if skewed else float(tail_or_share(union, share, samples))
        name, known = pairing.labels.embedding.name, pairing.labels.embedding.labels
        table.append((pairing.matrix.name, pairing.side, name, sv, known[label], value, median, p))
    frame = pd.DataFrame(table, columns=COLUMNS[:-1])
    frame["q_value"] = q_values(frame["p_value"].to_numpy(dtype=np.float64))
    return frame


def _best(pairing: Pairing) -> tuple[int, int, float]:
    """The direction and the label of largest absolute cosine, and that cosine."""
    cosines = pairing.labels.cosines(pairing.directions)
    sv, label = np.unravel_index(int(np.abs(cosines).argmax()), cosines.shape)
    return int(sv), int(label), float(cosines[sv, label])
