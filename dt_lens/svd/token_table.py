"""Token tables: the labels that singular directions point towards and away from, several embeddings side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from dt_lens.svd.label_filters import Filter, Rule, kept_labels
from dt_lens.svd.side_labels import row_blocks, unit_rows

if TYPE_CHECKING:
    from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["TokenTable", "extremes", "poles", "token_table"]

PLACE = ["matrix", "layer", "head", "side", "sv", "block", "sigma"]
COLUMNS = [*PLACE, "embedding", "pole", "rank", "label", "index", "cosine"]
SPARE = 16  # candidates more than asked for: single precision ranks, double precision decides
LARGE = 1024  # from this short side on, no more directions are computed than are shown
Names = Sequence[str] | str


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The labels at both poles of singular directions. Shown by Jupyter as a coloured table, printed as text.

    Attributes:
        rows: a row per direction, embedding, pole and rank, with the columns ``matrix layer head side sv block sigma
            embedding pole rank label index cosine``. ``pole`` is ``"+"`` for the labels of largest cosine, ``"-"`` for
            those of smallest; a direction's sign is a convention, so neither pole is the right one. ``block`` is how
            many directions cannot be told apart from this one, itself included; ``index`` is the label's row in its
            embedding.
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
        """The table as HTML that fits a light and a dark page, for the first ``limit`` matrices; see the report."""
        from dt_lens.svd.token_page import token_html

        return token_html(self, limit)

    def save(self, file: str | Path) -> Path:
        """Write the rows to a ``.csv`` file, or a page of its own to a ``.html`` file.

        Raises:
            DtLensError: for another suffix, or a file that cannot be written.
        """
        from dt_lens.svd.token_page import save_tokens

        return save_tokens(self, local_path(file, "file"))

    def _repr_html_(self) -> str:
        return self.to_html(limit=12)

    def __repr__(self) -> str:
        from dt_lens.lens.token_text import spelled, texts

        lines = []
        for (matrix, side), part in self.rows.groupby(["matrix", "side"], sort=False):
            lines.append(f"{matrix}, {side} side")
            for (sv, sigma), one in part.groupby(["sv", "sigma"], sort=False):
                lines.append(f"  sv {sv}  σ {sigma:.4g}")
                for (embedding, pole), found in one.groupby(["embedding", "pole"], sort=False):
                    words = zip(texts(list(found["label"])), found["cosine"], strict=True)
                    told = "  ".join(f"{spelled(word)} {cosine:+.2f}" for word, cosine in words)
                    lines.append(f"    {embedding} {pole}  {told}")
        return "\n".join(lines)

    def __len__(self) -> int:
        return len(self.rows)


class _Meeting(NamedTuple):
    """One matrix side with one embedding, and which of the group's directions are this matrix's."""

    matrix: Matrix
    side: SideName
    embedding: str
    sigma: Float[Tensor, " k"]
    blocks: list[int]
    directions: Float[Tensor, "k d_model"]
    centred: bool


def token_table(
    svd: WeightSVD,
    matrices: Names,
    embeddings: Names | None = None,
    k: int = 8,
    n: int = 10,
    where: Rule | Filter | Sequence[Rule | Filter] | None = None,
    side: SideName | None = None,
) -> TokenTable:
    """Both poles of the first ``k`` directions of some matrices, in several embeddings.

    Args:
        svd: the decompositions; folded or not is theirs to say.
        matrices: names or shell patterns.
        embeddings: names or shell patterns. By default reading sides meet input embeddings and writing sides output
            embeddings; named ones are met on whatever side a matrix has in the residual stream, and where it both reads
            and writes, on the side where such an embedding is met.
        k: directions of each matrix.
        n: labels at each pole. Where fewer than ``2 n`` are left, each is shown once, on the side that it points to as
            far as there is room.
        where: a filter or several, all of which a label must pass: ``dt_lens.svd.ascii_only``, ``whole_words``,
            ``at_least(counts, 100)``, or any function of a label's text. Sets of which none passes are left out.
        side: only this side of every matrix, with every embedding.

    Raises:
        DtLensError: for an unknown matrix, embedding or side, a filter that nothing passes, or a count below 1.
    """
    k, n = whole_number(k, "k", 1), whole_number(n, "n", 1)
    chosen = svd.registry.select(embeddings)
    named = embeddings is not None
    kept = {embedding.name: kept_labels(list(embedding.labels), where) for embedding in chosen}
    met = list(_meetings(svd, matrices, chosen, named, k, side))
    if not met:
        raise DtLensError("None of the embeddings is met on a side of these matrices; name the embeddings to compare.")
    parts: dict[int, dict[str, Any]] = {}
    shown = {}
    for embedding in chosen:
        passing = kept[embedding.name]
        count = len(embedding) if passing is None else len(passing)
        shown[embedding.name] = (count, len(embedding))
        for centred in (False, True):
            # One pass over the vocabulary serves all matrices.
            group = [(i, m) for i, m in enumerate(met) if (m.embedding, m.centred) == (embedding.name, centred)]
            if not group:
                continue
            if not count:
                continue
            together = torch.cat([m.directions for _, m in group])
            index, cosine = extremes(together, embedding, n, passing, svd.fold_layernorm, centred)
            start = 0
            for place, meeting in group:
                stop = start + len(meeting.directions)
                parts[place] = _rows(meeting, embedding, index[start:stop], cosine[start:stop], n)
                start = stop
    if not parts:
        names = ", ".join(dict.fromkeys(m.embedding for m in met))
        raise DtLensError(f"No label of {names} passes the filter; loosen it, or name another set.")
    columns = {name: [value for i in sorted(parts) for value in parts[i][name]] for name in COLUMNS}
    rows = pd.DataFrame(columns)
    rows["head"] = rows["head"].astype("Int64")
    # A direction's embeddings stand together.
    order = rows.groupby(["matrix", "side", "sv"], sort=False).ngroup()
    rows = rows.iloc[np.argsort(order.to_numpy(), kind="stable")].reset_index(drop=True)
    return TokenTable(rows, {e: shown[e] for e in dict.fromkeys(rows["embedding"])}, svd.fold_layernorm)


def _meetings(
    svd: WeightSVD, matrices: Names, chosen: Sequence[Embedding], named: bool, k: int, side: SideName | None
) -> Iterator[_Meeting]:
    lens = Snapshot.of(svd.model)
    for matrix in select_matrices(lens, matrices):
        sides = matrix.residual_sides
        if side is not None:
            sides = (matrix.left if matrix.side(side) == "left" else matrix.right,)
            if sides[0] not in matrix.residual_sides:
                raise DtLensError(f"The {side} side of {matrix.name} is not in the residual stream, where labels are.")
        natural = not named or (side is None and set(sides) == {"read", "write"})
        found: Decomposition | None = None
        for one in sides:
            for embedding in chosen:
                if natural and (embedding.side == "out") != (one == "write"):
                    continue
                found = found or _decomposed(svd, lens, matrix, k)
                directions = found.side(one)[:k].clone()
                blocks = [stop - start for start, stop in map(found.block_of, range(len(directions)))]
                centred = svd.fold_layernorm and matrix.centred(matrix.side(one))
                yield _Meeting(matrix, one, embedding.name, found.sigma[:k], blocks, directions, centred)


def _decomposed(svd: WeightSVD, lens: Snapshot, matrix: Matrix, k: int) -> Decomposition:
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
    """Where the ``+`` and the ``-`` pole lie among cosines in falling order; the ``-`` pole's last is its strongest."""
    count = len(cosine)
    plus = n if count >= 2 * n else min(max(int((cosine >= 0).sum()), count - n), n)
    return slice(0, plus), slice(max(plus, count - n), count)


def _rows(meeting: _Meeting, embedding: Embedding, index: list[Tensor], cosine: list[Tensor], n: int) -> dict[str, Any]:
    made: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    matrix = meeting.matrix
    for sv, (rows, values) in enumerate(zip(index, cosine, strict=True)):
        plus, minus = poles(values, n)
        for pole, chosen in (("+", range(plus.start, plus.stop)), ("-", range(minus.stop - 1, minus.start - 1, -1))):
            for rank, i in enumerate(chosen):
                at = int(rows[i])
                row: tuple[Any, ...] = (matrix.name, matrix.layer, matrix.head, meeting.side, sv, meeting.blocks[sv])
                row += (
                    float(meeting.sigma[sv]),
                    embedding.name,
                    pole,
                    rank,
                    embedding.labels[at],
                    at,
                    float(values[i]),
                )
                for name, value in zip(COLUMNS, row, strict=True):
                    made[name].append(value)
    return made
