"""The table of a scan: the best match of every direction of every matrix, and how probable it is under a null."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from dt_lens.arguments import LAST_SEED, whole_number
from dt_lens.errors import DtLensError
from dt_lens.lens.matrices import Snapshot
from dt_lens.progress import ProgressCallback, stage
from dt_lens.statistics.multiplicity import q_values
from dt_lens.statistics.nulls.haar import HaarMaximum
from dt_lens.statistics.nulls.kinds import Null
from dt_lens.svd.decompositions import Decompositions
from dt_lens.svd.null_sources import (
    OF_THE_STREAM,
    CovarianceSource,
    NullSource,
    Pools,
    SpectrumSource,
    draw_pools,
    require_null,
)
from dt_lens.svd.pairings import DECOMPOSING, Pairing
from dt_lens.svd.side_labels import Best, SideLabels

__all__ = ["COLUMNS", "null_source", "scan_table"]

COLUMNS = ["matrix", "layer", "head", "side", "sv", "block", "sigma", "embedding", "label", "cosine"]
COLUMNS += ["z", "p_value", "q_value"]

Array = NDArray[np.float64]


def scan_table(
    svd: Decompositions,
    matrices: Sequence[str] | str | None,
    null: str | Pools,
    seed: int,
    embeddings: Sequence[str] | str | None,
    activations: Any,
    draws: int | None,
    tell: ProgressCallback,
) -> pd.DataFrame:
    """See ``WeightSVD.scan``."""
    require_null(null if not isinstance(null, Pools) else null.name)
    seed = whole_number(seed, "seed", 0, LAST_SEED)
    draws = None if draws is None else whole_number(draws, "draws", 1)
    drawn = null in ("untrained", "shuffled")  # models are drawn, and decomposed as often
    pairings = svd.pairings(matrices, embeddings, stage(tell, 0.0, 0.1) if drawn else tell)
    source = null_source(svd, null, pairings, seed, activations, draws, tell)
    parts = _parts(svd, pairings, source, tell)
    columns: dict[str, Any] = {
        name: np.concatenate([part[name] for part in parts]) if parts else [] for name in COLUMNS[:-1]
    }
    table = pd.DataFrame(columns)
    table["head"] = pd.array([None if head < 0 else head for head in table["head"]], dtype="Int64")
    table["q_value"] = q_values(table["p_value"].to_numpy(dtype=np.float64))
    attrs: dict[Any, Any] = source.attrs()
    table.attrs = {
        "fold_layernorm": svd.fold_layernorm,
        **attrs,
        "seed": null.seed if isinstance(null, Pools) else seed,
        "untrained": [e.name for e in svd.registry.values() if not e.trained],
    }
    if svd.activations is not None:
        table.attrs["weighted_by"] = svd.activations.digest
    return table


def null_source(
    svd: Decompositions,
    null: str | Pools,
    pairings: list[Pairing],
    seed: int,
    activations: Any,
    draws: int | None,
    tell: ProgressCallback,
) -> NullSource:
    """Where a scan's nulls come from.

    Raises:
        DtLensError: for activations that the null does not use, and as the nulls do.
    """
    if isinstance(null, Pools):
        return null
    if activations is not None and null not in OF_THE_STREAM:
        raise DtLensError(
            f"Only the nulls {', '.join(OF_THE_STREAM)} use activations=, and null is {null!r}; leave them out."
        )
    if null == "haar":
        return _Rotations(svd, seed, draws)
    stream = (Snapshot.of(svd.model), activations, svd.fold_layernorm, seed, draws, svd.cache)
    if null == "covariance":
        return CovarianceSource(*stream)
    if null in OF_THE_STREAM:
        return SpectrumSource(null, *stream)
    return draw_pools(svd, null, pairings, seed, draws, stage(tell, 0.1 * DECOMPOSING, DECOMPOSING))


def _parts(
    svd: Decompositions, pairings: list[Pairing], source: NullSource, tell: ProgressCallback
) -> list[dict[str, Any]]:
    """The columns of every pairing; those with the same labels are computed together, so a vocabulary is read once."""
    groups: dict[int, list[int]] = {}
    for place, pairing in enumerate(pairings):
        groups.setdefault(id(pairing.labels), []).append(place)
    parts: list[dict[str, Any]] = [{}] * len(pairings)
    for number, places in enumerate(groups.values()):
        labels, some = pairings[places[0]].labels, [pairings[place] for place in places]
        share = DECOMPOSING + (1 - DECOMPOSING) * number / len(groups)
        tell(f"comparing with {labels.embedding.name}", share)
        best = _best(svd, labels, some)
        tell(f"drawing the null of {labels.embedding.name}", share)
        p, z = _significance(source, some, best.length)
        begin = 0
        for place, pairing in zip(places, some, strict=True):
            mine = slice(begin, begin + len(pairing.starts))
            begin = mine.stop
            parts[place] = pairing.columns(best.cosine[mine], best.label[mine], z[mine], p[mine])
    return parts


def _significance(source: NullSource, pairings: list[Pairing], lengths: Array) -> tuple[Array, Array]:
    """``p`` and ``z`` of every block's best match; pairings of one null are looked up in it together."""
    p, z = np.ones(len(lengths)), np.zeros(len(lengths))
    together: dict[int, tuple[Null, list[NDArray[np.int64]]]] = {}
    begin = 0
    for pairing in pairings:
        sizes = pairing.sizes
        for size in np.unique(sizes):
            law = source.null(pairing, int(size))
            together.setdefault(id(law), (law, []))[1].append(begin + np.flatnonzero(sizes == size))
        begin += len(sizes)
    for law, several in together.values():
        these = np.concatenate(several)
        p[these], z[these] = law.p_value(lengths[these]), law.z(lengths[these])
    return p, z


def _best(svd: Decompositions, labels: SideLabels, pairings: list[Pairing]) -> Best:
    """The best label of every block of directions, for all pairings with these labels one after the other."""
    directions = np.concatenate([pairing.directions for pairing in pairings])
    before = np.cumsum([0, *(len(pairing.directions) for pairing in pairings)])
    starts = np.concatenate([pairing.starts + first for pairing, first in zip(pairings, before, strict=False)])
    if not len(starts):
        return Best(np.empty(0), np.empty(0), np.empty(0, np.int64))

    def make() -> dict[str, Tensor]:
        found = labels.best(directions, starts)._asdict()
        return {name: torch.from_numpy(value) for name, value in found.items()}

    if labels.whole or svd.cache.folder is None:
        return labels.best(directions, starts)
    state = hashlib.blake2b(directions.tobytes() + starts.tobytes(), digest_size=16).hexdigest()
    stored = svd.cache.get(f"best {labels.digest.hex()} {state}", make)
    return Best(*(stored[name].numpy() for name in Best._fields))


class _Rotations:
    """The null source of ``"haar"``: random rotations, which ``Decompositions`` caches."""

    def __init__(self, svd: Decompositions, seed: int, draws: int | None) -> None:
        self._svd, self._seed, self._draws = svd, seed, draws

    def null(self, pairing: Pairing, span: int) -> Null:
        return self._svd.rotations(pairing.labels, span, self._seed, self._draws)

    def attrs(self) -> dict[str, Any]:
        return {"null": "haar", "assumes": HaarMaximum.assumes}
