"""Token tables: the labels that singular directions point towards and away from, in several embeddings side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dt_lens.arguments import local_path, whole_number
from dt_lens.errors import DtLensError
from dt_lens.lens.embeddings import Embedding
from dt_lens.lens.matrices import Matrix, MatrixFactors, SideName, Snapshot, select_matrices
from dt_lens.svd.decomposition import Decomposition, decompose_matrix
from dt_lens.svd.decompositions import Decompositions
from dt_lens.svd.label_filters import Filter, Rule, passing_labels
from dt_lens.svd.pairings import is_natural, residual_side
from dt_lens.svd.side_labels import row_blocks, unit_rows
from dt_lens.svd.token_page import save_tokens, token_html

__all__ = ["TokenTable", "extremes", "poles", "token_table"]

PLACE = ["matrix", "layer", "head", "side", "sv", "block", "sigma"]
COLUMNS = [*PLACE, "embedding", "pole", "rank", "label", "index", "cosine", "trained"]
SPARE = 16  # extra candidates: single precision ranks them, double precision decides
LARGE = 1024  # from this short side on, no more directions are computed than are shown
Names = Sequence[str] | str


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The labels at both poles of singular directions; a coloured table in Jupyter, text when printed.

    Attributes:
        rows: a row per direction, embedding, pole and rank, with the columns ``matrix layer head side sv block sigma
            embedding pole rank label index cosine trained``. ``pole`` is ``"+"`` for labels of positive cosine, the
            largest first, and ``"-"`` for those of negative cosine, the smallest first; a direction's sign is a
            convention, so neither pole is the right one. ``block`` is how many directions cannot be distinguished from
            this one, itself included (``Decomposition.indistinct``); ``index`` is the label's row in its embedding;
            ``trained`` is false for an output head that had no loss: what it matches is chance.
        shown: for each embedding the labels that passed the filter, and all of them.
        folded: whether LayerNorms are folded in.
    """

    rows: pd.DataFrame
    shown: dict[str, tuple[int, int]]
    folded: bool

    def to_frame(self, wide: bool = False) -> pd.DataFrame:
        """The rows; with ``wide`` the embeddings side by side.

        Returns:
            long: ``rows``. Wide: an index ``matrix layer head side sv block sigma pole rank`` and for each embedding
            the columns ``(embedding, "label")`` and ``(embedding, "cosine")``.
        """
        if not wide:
            return self.rows.copy()
        keys = [*PLACE, "pole", "rank"]
        parts = {
            name: part.set_index(keys)[["label", "cosine"]] for name, part in self.rows.groupby("embedding", sort=False)
        }
        table = pd.concat(parts, axis=1, names=["embedding", None])
        order = pd.MultiIndex.from_frame(self.rows[keys].drop_duplicates())
        return table.reindex(order)

    def to_html(self, limit: int | None = None) -> str:
        """The table as HTML for light and dark pages, cut after ``limit`` matrix sides."""
        return token_html(self.rows, self.shown, limit)

    def save(self, file: str | Path) -> Path:
        """Write the rows to a ``.csv`` file, or a page to a ``.html`` file.

        Raises:
            DtLensError: for another suffix, or a file that cannot be written.
        """
        return save_tokens(self.rows, self.shown, self.folded, local_path(file, "file"))

    def _repr_html_(self) -> str:
        return self.to_html(limit=12)

    def __repr__(self) -> str:
        from dt_lens.lens.token_text import spelled, texts

        lines = []
        for (matrix, side), part in self.rows.groupby(["matrix", "side"], sort=False):
            lines.append(f"{matrix}, {side} side")
            for (sv, sigma), one in part.groupby(["sv", "sigma"], sort=False):
                lines.append(f"  sv {sv}  σ {sigma:.4g}")
                for (embedding, trained, pole), found in one.groupby(["embedding", "trained", "pole"], sort=False):
                    words = zip(texts(list(found["label"])), found["cosine"], strict=True)
                    shown = "  ".join(f"{spelled(word)} {cosine:+.2f}" for word, cosine in words)
                    lines.append(f"    {embedding}{'' if trained else ' (untrained)'} {pole}  {shown}")
        return "\n".join(lines)

    def __len__(self) -> int:
        return len(self.rows)


class _Part(NamedTuple):
    """One matrix side with one embedding: the first ``k`` directions, to be compared with its labels."""

    matrix: Matrix
    side: SideName
    embedding: str
    sigma: Float[Tensor, " k"]
    blocks: list[int]
    directions: Float[Tensor, "k d_model"]
    centred: bool


def token_table(
    svd: Decompositions,
    matrices: Names,
    embeddings: Names | None = None,
    k: int = 8,
    n: int = 10,
    where: Rule | Filter | Sequence[Rule | Filter] | None = None,
    side: SideName | None = None,
) -> TokenTable:
    """Both poles of the first ``k`` directions of some matrices, in several embeddings.

    Args:
        svd: the decompositions, folded or raw.
        matrices: names or shell patterns.
        embeddings: names or shell patterns. By default input embeddings are compared with reading sides and output
            embeddings with writing sides; named ones with whatever side a matrix has on the residual stream, and where
            it both reads and writes, as by default.
        k: directions of each matrix.
        n: labels at each pole, at most: a label is shown at the pole of its cosine's sign, so a pole may have fewer.
        where: a filter or several, all of which a label must pass: ``dt_lens.svd.ascii_only``, ``whole_words``,
            ``at_least(counts, 100)``, or any function of a label's text. Embeddings of which no label passes are left
            out.
        side: only this side of every matrix; named embeddings are then all compared with it.

    Raises:
        DtLensError: for an unknown matrix, embedding or side, a filter that no label passes, or a count below 1.
    """
    k, n = whole_number(k, "k", 1), whole_number(n, "n", 1)
    chosen = svd.registry.select(embeddings)
    named = embeddings is not None
    kept = {embedding.name: passing_labels(list(embedding.labels), where) for embedding in chosen}
    compared = list(_parts(svd, matrices, chosen, named, k, side))
    if not compared:
        raise DtLensError("No embedding is compared with these matrices by default; name some with embeddings=.")
    parts: dict[int, dict[str, Any]] = {}
    shown = {}
    for embedding in chosen:
        passing = kept[embedding.name]
        count = len(embedding) if passing is None else len(passing)
        shown[embedding.name] = (count, len(embedding))
        for centred in (False, True):
            # One pass over the vocabulary serves all matrices.
            group = [
                (i, part)
                for i, part in enumerate(compared)
                if (part.embedding, part.centred) == (embedding.name, centred)
            ]
            if not group or not count:
                continue
            together = torch.cat([part.directions for _, part in group])
            index, cosine = extremes(together, embedding, n, passing, svd.fold_layernorm, centred)
            start = 0
            for place, part in group:
                stop = start + len(part.directions)
                parts[place] = _rows(part, embedding, index[start:stop], cosine[start:stop], n)
                start = stop
    if not parts:
        names = ", ".join(dict.fromkeys(part.embedding for part in compared))
        raise DtLensError(f"No label of {names} passes the filter; loosen it, or name another embedding.")
    columns = {name: [value for i in sorted(parts) for value in parts[i][name]] for name in COLUMNS}
    rows = pd.DataFrame(columns)
    rows["head"] = rows["head"].astype("Int64")
    # Rows of one direction are next to each other, whatever the embedding.
    order = rows.groupby(["matrix", "side", "sv"], sort=False).ngroup()
    rows = rows.iloc[np.argsort(order.to_numpy(), kind="stable")].reset_index(drop=True)
    return TokenTable(rows, {e: shown[e] for e in dict.fromkeys(rows["embedding"])}, svd.fold_layernorm)


def _parts(
    svd: Decompositions, matrices: Names, chosen: Sequence[Embedding], named: bool, k: int, side: SideName | None
) -> Iterator[_Part]:
    lens = Snapshot.of(svd.model)
    for matrix in select_matrices(lens, matrices):
        sides = matrix.residual_sides
        if side is not None:
            sides = (residual_side(matrix, side),)
        natural = not named or (side is None and set(sides) == {"read", "write"})
        found: Decomposition | None = None
        for one in sides:
            for embedding in chosen:
                if natural and not is_natural(embedding, one):
                    continue
                found = found or _decomposed(svd, lens, matrix, k)
                directions = found.side(one)[:k].clone()
                blocks = [found.indistinct(sv, one) for sv in range(len(directions))]
                centred = svd.fold_layernorm and matrix.centred(matrix.side(one))
                yield _Part(matrix, one, embedding.name, found.sigma[:k], blocks, directions, centred)


def _decomposed(svd: Decompositions, lens: Snapshot, matrix: Matrix, k: int) -> Decomposition:
    factors = MatrixFactors.of(lens, matrix, svd.fold_layernorm)
    stored = factors.stored()
    if svd.rank is None and len(stored) == 1 and min(stored[0].shape) >= LARGE:
        return decompose_matrix(factors, k + 8)
    return svd[matrix.name]


def extremes(
    directions: Float[Tensor, "m d_model"],
    embedding: Embedding,
    n: int,
    kept: Sequence[int] | None,
    folded: bool,
    centred: bool,
) -> tuple[list[Int[Tensor, " c"]], list[Float[Tensor, " c"]]]:
    """For each direction the labels with the ``n`` largest and the ``n`` smallest cosines, best first.

    Labels are ranked block by block in single precision, and those near the ends once more in double.

    Returns:
        for each direction the labels' rows, largest cosine first, and the cosines.
    """
    directions = directions.cpu()
    single = directions.float()
    ends: list[tuple[Tensor, Tensor] | None] = [None, None]
    for numbers, E in row_blocks(embedding, kept, len(directions), folded, centred, torch.float32):
        cosines = single @ E.T
        for end, sign in enumerate((1, -1)):
            found = _best(sign * cosines, numbers.expand(len(directions), -1), n + SPARE)
            before = ends[end]
            if before is not None:
                found = _best(torch.cat([before[0], found[0]], 1), torch.cat([before[1], found[1]], 1), n + SPARE)
            ends[end] = found
    indices, values = [], []
    assert ends[0] is not None and ends[1] is not None
    for direction, above, below in zip(directions, ends[0][1], ends[1][1], strict=True):
        # In the order of the rows, so that equal cosines are in that order too.
        index = torch.unique(torch.cat([above, below]))
        cosine = unit_rows(embedding, index, folded, centred) @ direction
        order = cosine.argsort(descending=True, stable=True)
        indices.append(index[order])
        values.append(cosine[order])
    return indices, values


def _best(values: Float[Tensor, "m c"], numbers: Int[Tensor, "m c"], count: int) -> tuple[Tensor, Tensor]:
    value, at = values.topk(min(count, values.shape[1]), dim=1)
    return value, numbers.gather(1, at)


def poles(cosine: Float[Tensor, " c"], n: int) -> tuple[slice, slice]:
    """Where the ``+`` and the ``-`` pole lie among cosines in falling order; the ``-`` pole's last is its strongest.

    At most ``n`` labels each, of positive cosine (or 0) and of negative cosine.
    """
    count, positive = len(cosine), int((cosine >= 0).sum())
    return slice(0, min(n, positive)), slice(max(positive, count - n), count)


def _rows(part: _Part, embedding: Embedding, index: list[Tensor], cosine: list[Tensor], n: int) -> dict[str, Any]:
    made: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    matrix = part.matrix
    for sv, (rows, values) in enumerate(zip(index, cosine, strict=True)):
        plus, minus = poles(values, n)
        for pole, chosen in (("+", range(plus.start, plus.stop)), ("-", range(minus.stop - 1, minus.start - 1, -1))):
            for rank, i in enumerate(chosen):
                at = int(rows[i])
                row: tuple[Any, ...] = (matrix.name, matrix.layer, matrix.head, part.side, sv, part.blocks[sv])
                row += (
                    float(part.sigma[sv]),
                    embedding.name,
                    pole,
                    rank,
                    embedding.labels[at],
                    at,
                    float(values[i]),
                    embedding.trained,
                )
                for name, value in zip(COLUMNS, row, strict=True):
                    made[name].append(value)
    return made
