"""Labelled directions as one side of a matrix meets them, a few rows at a time: a vocabulary need not fit twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dt_lens.embeddings import Embedding

__all__ = ["TINY", "row_blocks", "unit_rows"]

TINY = 1e-12  # of its own length, or the rounding of its dtype: what centring leaves of a direction is no direction
BLOCK = 2**23  # numbers held at a time, several times over in float64


def unit_rows(
    embedding: Embedding, rows: slice | Int[Tensor, " n"], folded: bool, centred: bool
) -> Float[Tensor, "n d_model"]:
    """Some of an embedding's directions as unit rows in float64; zero rows where centring leaves nothing.

    Args:
        embedding: the labelled directions.
        rows: which of them.
        folded: effective directions instead of raw ones.
        centred: the side reads through a norm that removes constants, so they are removed here too.

    On the processor, wherever the model is.
    """
    scale = None if embedding.layernorm is None else embedding.layernorm.detach().cpu()
    some = replace(embedding, directions=embedding.directions[rows].detach().cpu(), labels=(), layernorm=scale)
    raw = some.directions.double()
    E = some.effective.double() if folded else raw
    if centred:
        E = E - E.mean(-1, keepdim=True)
    lengths, whole = E.norm(dim=1, keepdim=True), raw.norm(dim=1, keepdim=True)
    if folded and scale is not None:
        whole = whole * scale.abs().max().double()
    tiny = max(TINY, torch.finfo(embedding.directions.dtype).eps)
    return torch.where(lengths > tiny * whole, E / lengths.clamp_min(1e-300), 0.0)


def row_blocks(
    embedding: Embedding, kept: Sequence[int] | None, width: int, folded: bool, centred: bool
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "n d_model"]]]:
    """The rows numbered ``kept`` (all when ``None``), block by block, with their numbers; see ``unit_rows``.

    ``width`` is how many numbers the caller computes for each row; blocks are the smaller for it.
    """
    numbers = torch.arange(len(embedding)) if kept is None else torch.as_tensor(list(kept), dtype=torch.long)
    size = max(1, BLOCK // (embedding.directions.shape[1] + width))
    for some in numbers.split(size):
        # A slice reads rows that lie together without a table of them.
        together = len(some) and int(some[-1] - some[0]) + 1 == len(some)
        rows = slice(int(some[0]), int(some[-1]) + 1) if together else some
        yield some, unit_rows(embedding, rows, folded, centred)
