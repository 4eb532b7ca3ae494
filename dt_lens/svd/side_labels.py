"""The labels of an embedding as matrix sides are compared with them: best matches, cosines, and their null.

A vocabulary of fifty thousand tokens need not fit in memory in float64: its rows are computed, compared and discarded a
block at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dt_lens.errors import DtLensError
from dt_lens.lens.embeddings import Embedding
from dt_lens.lens.weights import checksum_of, hash_of
from dt_lens.statistics.nulls.haar import HaarMaximum, LabelBlocks

__all__ = ["TINY", "BLOCK", "unit_rows", "row_blocks", "Best", "SideLabels"]

TINY = 1e-12  # a direction of which centring leaves less than this share, or its dtype's rounding, counts as zero
BLOCK = 2**23  # numbers held at a time, several times over in float64

Array = NDArray[np.float64]
WHOLE = 2**23  # numbers of an embedding that is held at once, in float64
HELD = 3 * 2**24  # numbers, 192 MiB in float32, of the rows that a null keeps while it is drawn
ROWS = 1024  # chosen labels computed together


class Best(NamedTuple):
    """The best label of each of ``n`` directions or blocks of directions.

    ``length`` is the absolute cosine, for a block the length of the label's projection on its span; ``cosine`` has the
    sign of a single direction's.
    """

    length: Array  # [n]
    cosine: Array  # [n]
    label: NDArray[np.int64]  # [n]


class SideLabels:
    """Unit or zero rows ``[n, d]`` of an embedding, and the space they live in.

    With folding the rows are effective directions. On a side that reads through a LayerNorm they are also centred,
    since the LayerNorm removes constants: directions and labels then live in ``d_model - 1`` dimensions.

    Raises:
        DtLensError: when the embedding holds values that are not finite.
    """

    def __init__(self, embedding: Embedding, folded: bool, centred: bool) -> None:
        self.embedding, self.folded, self.centred = embedding, folded, centred
        self.n, self.width = embedding.directions.shape
        if not all(bool(torch.isfinite(end)) for end in embedding.directions.detach().aminmax()):
            raise DtLensError(
                f"The embedding {embedding.name!r} holds NaN or infinite values; every entry must be finite."
            )

    @property
    def dimension(self) -> int:
        """The dimension of the space in which labels and directions lie."""
        return self.width - int(self.centred)

    @property
    def whole(self) -> bool:
        """Whether the rows are held at once."""
        return self.n * self.width <= WHOLE

    @property
    def directions(self) -> Array:
        """All rows, in float64."""
        return self._rows if self.whole else self._made()

    @cached_property
    def _rows(self) -> Array:
        return self._made()

    def _made(self) -> Array:
        rows = unit_rows(self.embedding, slice(None), self.folded, self.centred)
        return np.ascontiguousarray(rows.numpy())

    @cached_property
    def digest(self) -> bytes:
        """A hash of everything that the rows depend on."""
        if self.whole:
            return hashlib.blake2b(self._rows.tobytes(), digest_size=16).digest()
        digest = hashlib.blake2b(f"{self.folded} {self.centred} {self.embedding.rms}".encode(), digest_size=16)
        digest.update(hash_of(self.embedding.directions))
        if self.embedding.scale is not None:
            digest.update(hash_of(self.embedding.scale))
        return digest.digest()

    @cached_property
    def mark(self) -> bytes | tuple[Any, ...]:
        """``digest`` for use within a process: of a large embedding a checksum, in a fraction of the time."""
        if self.whole:
            return self.digest
        parts = [self.embedding.directions, *([] if self.embedding.scale is None else [self.embedding.scale])]
        return self.folded, self.centred, self.embedding.rms, *(checksum_of(part.cpu()) for part in parts)

    def _blocks(self, width: int, begin: int = 0) -> Iterator[tuple[int, NDArray[np.float32] | Array]]:
        """The rows from ``begin`` on, with the number of a block's first: at once in float64, or a few in float32."""
        if self.whole:
            yield 0, self._rows
            return
        if begin == self.n:
            return
        some = range(begin, self.n) if begin else None
        for numbers, rows in row_blocks(self.embedding, some, width, self.folded, self.centred, torch.float32):
            yield int(numbers[0]), rows.numpy()

    def best(self, directions: Array, starts: NDArray[np.int64]) -> Best:
        """The best label of each block of ``directions [k, d]``; block ``i`` begins at row ``starts[i]``."""
        count = len(starts)
        value, label = np.full(count, -1.0), np.zeros(count, np.int64)
        single = count == len(directions)
        narrow = directions if self.whole else directions.astype(np.float32)
        for begin, rows in self._blocks(len(directions)):
            cosines = torch.from_numpy(narrow) @ torch.from_numpy(rows).T
            if single:
                lengths = cosines.abs_()
            else:
                squares = np.add.reduceat(cosines.square_().numpy(), starts, axis=0)
                lengths = torch.from_numpy(np.sqrt(squares))
            top = lengths.amax(1)
            better = (top > torch.from_numpy(value)).numpy()
            value[better] = top[better]
            label[better] = lengths[better].argmax(1) + begin
        sizes = np.diff(np.append(starts, len(directions)))
        return Best(*self._exact(directions, starts, sizes, label), label)

    def _exact(
        self, directions: Array, starts: NDArray[np.int64], sizes: NDArray[np.int64], label: NDArray[np.int64]
    ) -> tuple[Array, Array]:
        """The lengths and the signed cosines with the chosen labels, in float64."""
        length, cosine = np.empty(len(starts)), np.empty(len(starts))
        for first in range(0, len(starts), ROWS):
            some = slice(first, first + ROWS)
            if self.whole:
                chosen = self._rows[label[some]]
            else:
                chosen = unit_rows(self.embedding, torch.from_numpy(label[some]), self.folded, self.centred).numpy()
            for i, row in zip(range(first, first + len(chosen)), chosen, strict=True):
                cosines = directions[starts[i] : starts[i] + sizes[i]] @ row
                length[i] = min(float(np.sqrt(cosines @ cosines)), 1.0)
                cosine[i] = np.sign(cosines[0]) * length[i] if sizes[i] == 1 else length[i]
        return length, cosine

    def cosines(self, directions: Array) -> Array:
        """The cosines of ``directions [k, d]`` with all labels, ``[k, n]``."""
        if self.whole:
            return directions @ self._rows.T
        found = np.empty((len(directions), self.n))
        for numbers, rows in row_blocks(self.embedding, None, len(directions), self.folded, self.centred):
            found[:, int(numbers[0]) : int(numbers[-1]) + 1] = directions @ rows.numpy().T
        return found

    def null(self, span: int, seed: int, draws: int | None = None) -> HaarMaximum:
        """The null of the best match of one direction, or of one span of directions, rotated at random."""
        return HaarMaximum.of(self.for_null, self.dimension if self.whole else None, seed, span, draws)

    @property
    def for_null(self) -> Array | LabelBlocks:
        """The rows as nulls take them: at once, or a block at a time."""
        if self.whole:
            return self._rows
        kept, held, end = np.empty(0, np.int64), list[NDArray[np.float32]](), 0
        for begin, rows in self._blocks(self.width):
            some = np.flatnonzero(rows.any(1))
            kept = np.append(kept, begin + some)
            if (begin + len(rows)) * self.width <= HELD:  # the first rows are kept, the others made at every pass
                held.append(np.asarray(rows[some] if len(some) < len(rows) else rows, dtype=np.float32))
                end = begin + len(rows)

        def rows_of(index: NDArray[np.int64]) -> Array:
            numbers = torch.from_numpy(kept[index])
            return np.asarray(unit_rows(self.embedding, numbers, self.folded, self.centred).numpy())

        def blocks() -> Iterator[NDArray[np.float32]]:
            yield from held
            for _, rows in self._blocks(self.width, end):
                yield np.asarray(rows[rows.any(1)], dtype=np.float32)

        return LabelBlocks(len(kept), self.width, self.centred, rows_of, blocks)


def unit_rows(
    embedding: Embedding,
    rows: slice | Int[Tensor, " n"],
    folded: bool,
    centred: bool,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "n d_model"]:
    """Some of an embedding's directions as unit rows; zero rows where centring removes everything.

    Args:
        embedding: the labelled directions.
        rows: which of them.
        folded: effective directions instead of raw ones.
        centred: the side reads through a norm that removes constants, so they are removed here too.
        dtype: of the arithmetic and the rows; float32 is several times faster, and enough for ranking.

    Returns:
        the rows on the CPU, wherever the model is.

    Raises:
        DtLensError: for directions that are not finite.
    """
    # A copy, as the rest works in place; contiguous, since a head's directions are columns of its weight.
    picked = embedding.directions[rows].detach()
    E = picked.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(E.norm(dim=1)).all()):
        raise DtLensError(f"The embedding {embedding.name!r} holds NaN or infinite values; every entry must be finite.")
    left = _on_stream(E, embedding, folded, centred)
    lengths = E.norm(dim=1, keepdim=True)
    kept = (left > max(TINY, torch.finfo(embedding.directions.dtype).eps)) & (lengths > 0)
    E.mul_(torch.where(kept, 1 / lengths.clamp_min(1e-30), 0.0))
    if dtype != torch.float64:
        # A row that nearly vanishes under centring is decided in double precision.
        unsure = (left <= 1e-3).flatten().nonzero().flatten()
        if len(unsure):
            numbers = torch.arange(len(embedding))[rows] if isinstance(rows, slice) else rows
            E[unsure] = unit_rows(embedding, numbers[unsure], folded, centred).to(dtype)
    return E


def _on_stream(E: Tensor, embedding: Embedding, folded: bool, centred: bool) -> Tensor:
    """``Embedding.effective`` and the side's centring, in place and in the rows' own precision.

    Returns the share of its length that centring leaves of each row, ``[n, 1]``. Scaling does not count as a loss,
    whatever it does to the length: a direction may well be small compared with the largest scale.
    """
    left = E.new_ones(len(E), 1)

    def centre() -> None:
        before = E.norm(dim=1, keepdim=True)
        E.sub_(E.mean(-1, keepdim=True))
        left.mul_(torch.where(before > 0, E.norm(dim=1, keepdim=True) / before, 0.0))

    if folded and embedding.scale is not None:
        if embedding.side == "in" and not embedding.rms:
            centre()
        E.mul_(embedding.scale.detach().to(E))
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

    ``width`` is how many numbers the caller computes for each row; the more, the smaller the blocks.
    """
    numbers = torch.arange(len(embedding)) if kept is None else torch.as_tensor(list(kept), dtype=torch.long)
    size = max(1, BLOCK // (embedding.directions.shape[1] + width))
    for some in torch.split(numbers, size):
        # A slice reads adjacent rows without an index of them.
        together = len(some) and int(some[-1] - some[0]) + 1 == len(some)
        rows = slice(int(some[0]), int(some[-1]) + 1) if together else some
        yield some, unit_rows(embedding, rows, folded, centred, dtype)
