"""Labelled directions as one side of a matrix meets them, a few rows at a time: a vocabulary need not fit twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dt_lens.lens.embeddings import Embedding
from dt_lens.errors import DtLensError

__all__ = ["TINY", "row_blocks", "unit_rows"]

TINY = 1e-12  # where centring leaves no more of a direction than this, or than its dtype's rounding, none is left
BLOCK = 2**23  # numbers held at a time, several times over in float64


def unit_rows(
    embedding: Embedding,
    rows: slice | Int[Tensor, " n"],
    folded: bool,
    centred: bool,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "n d_model"]:
    """Some of an embedding's directions as unit rows; zero rows where centring leaves nothing.

    Args:
        embedding: the labelled directions.
        rows: which of them.
        folded: effective directions instead of raw ones.
        centred: the side reads through a norm that removes constants, so they are removed here too.
        dtype: of the arithmetic and the rows; float32 is several times faster, and for ranking enough.

    On the processor, wherever the model is.

    Raises:
        DtLensError: for directions that are not finite.
    """
    # A copy, as what follows works in place, and in order: a head's directions are columns of its weight.
    picked = embedding.directions[rows].detach()
    E = picked.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(E.norm(dim=1)).all()):
        raise DtLensError(f"The embedding {embedding.name!r} holds NaN or infinite values; every entry must be finite.")
    left = _on_stream(E, embedding, folded, centred)
    lengths = E.norm(dim=1, keepdim=True)
    kept = (left > max(TINY, torch.finfo(embedding.directions.dtype).eps)) & (lengths > 0)
    E.mul_(torch.where(kept, 1 / lengths.clamp_min(1e-30), 0.0))
    if dtype != torch.float64:
        # What nearly vanishes under centring is told from nothing in double precision.
        unsure = (left <= 1e-3).flatten().nonzero().flatten()
        if len(unsure):
            numbers = torch.arange(len(embedding))[rows] if isinstance(rows, slice) else rows
            E[unsure] = unit_rows(embedding, numbers[unsure], folded, centred).to(dtype)
    return E


def _on_stream(E: Tensor, embedding: Embedding, folded: bool, centred: bool) -> Tensor:
    """``Embedding.effective`` and the side's centring, in place and in the rows' own precision.

    Returns what share of its length centring leaves of each row, ``[n, 1]``. Scaling is no loss, whatever it does to
    the length: a direction may well be small beside the largest scale.
    """
    left = E.new_ones(len(E), 1)

    def centre() -> None:
        before = E.norm(dim=1, keepdim=True)
        E.sub_(E.mean(-1, keepdim=True))
        left.mul_(torch.where(before > 0, E.norm(dim=1, keepdim=True) / before, 0.0))

    if folded and embedding.layernorm is not None:
        if embedding.side == "in" and not embedding.rms:
            centre()
        E.mul_(embedding.layernorm.detach().to(E))
        if embedding.side == "out" and not embedding.rms:
            centre()
    if centred:
        centre()
    return left


def row_blocks(
    embedding: Embedding,
    kept: Sequence[int] | None,
    width: int,
    folded: bool,
    centred: bool,
    dtype: torch.dtype = torch.float64,
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "n d_model"]]]:
    """The rows numbered ``kept`` (all when ``None``), block by block, with their numbers; see ``unit_rows``.

    ``width`` is how many numbers the caller computes for each row; blocks are the smaller for it.
    """
    numbers = torch.arange(len(embedding)) if kept is None else torch.as_tensor(list(kept), dtype=torch.long)
    size = max(1, BLOCK // (embedding.directions.shape[1] + width))
    for some in torch.split(numbers, size):
        # A slice reads rows that lie together without a table of them.
        together = len(some) and int(some[-1] - some[0]) + 1 == len(some)
        rows = slice(int(some[0]), int(some[-1]) + 1) if together else some
        yield some, unit_rows(embedding, rows, folded, centred, dtype)
