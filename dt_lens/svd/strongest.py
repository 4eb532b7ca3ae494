"""The best match of each whole matrix with each whole embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dt_lens.arguments import whole_number
from dt_lens.errors import DtLensError
from dt_lens.progress import silent
from dt_lens.statistics.multiplicity import q_values, tail_or_share
from dt_lens.statistics.nulls.haar import frame_maximum
from dt_lens.svd.null_sources import Pools, draw_pools, require_null
from dt_lens.svd.pairings import Pairing

if TYPE_CHECKING:
    from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["strongest"]

COLUMNS = ["matrix", "side", "embedding", "sv", "label", "cosine", "null_median", "p_value", "q_value"]


def strongest(
    svd: WeightSVD,
    matrices: Sequence[str] | str | None,
    embeddings: Sequence[str] | str | None,
    samples: int,
    seed: int,
    null: str | Pools,
    draws: int | None,
) -> pd.DataFrame:
    """See ``WeightSVD.strongest``."""
    require_null(null.name if isinstance(null, Pools) else null)
    if null == "covariance":
        raise DtLensError(
            "null='covariance' draws single directions and says nothing of a whole matrix's; use "
            "scan(null='covariance') or another null."
        )
    samples, seed = whole_number(samples, "samples", 1), whole_number(seed, "seed", 0)
    meetings = [meeting for meeting in svd.meetings(matrices, embeddings) if len(meeting.found.sigma)]
    pools = null if isinstance(null, Pools) else None
    if null in ("untrained", "shuffled"):
        pools = draw_pools(svd, str(null), meetings, seed, draws, silent)
    draws_of: dict[tuple[Any, ...], NDArray[np.float64]] = {}
    table: list[tuple[Any, ...]] = []
    for meeting in meetings:
        sv, label, value = _best(meeting)
        if pools is not None:
            pool = pools.frame(meeting)
            median, p = float(np.median(pool.drawn)), float(pool.p_value(value))
        else:
            labels, count = meeting.labels, len(meeting.found.sigma)
            key = (labels.digest, count, labels.dimension)
            if key not in draws_of:
                draws_of[key] = frame_maximum(labels.directions, count, labels.dimension, samples, seed)
            drawn = draws_of[key]
            share = (1 + int((drawn >= abs(value)).sum())) / (1 + samples)
            union = min(1.0, count * float(svd.rotations(labels, 1, seed).p_value(value)))
            # These directions are not orthogonal as a rotated frame is; the union bound holds for any.
            skewed = bool(meeting.found.activations) and meeting.matrix.side(meeting.side) == "left"
            median, p = float(np.median(drawn)), union if skewed else float(tail_or_share(union, share, samples))
        name, known = meeting.labels.embedding.name, meeting.labels.embedding.labels
        table.append((meeting.matrix.name, meeting.side, name, sv, known[label], value, median, p))
    frame = pd.DataFrame(table, columns=COLUMNS[:-1])
    frame["q_value"] = q_values(frame["p_value"].to_numpy(dtype=np.float64))
    return frame


def _best(meeting: Pairing) -> tuple[int, int, float]:
    """The direction and the label of largest absolute cosine, and the cosine."""
    cosines = meeting.labels.cosines(meeting.directions)
    sv, label = np.unravel_index(int(np.abs(cosines).argmax()), cosines.shape)
    return int(sv), int(label), float(cosines[sv, label])
