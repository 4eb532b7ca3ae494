"""Singular directions of every named matrix, and what they match."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from dt_lens.directions import Decomposition, decompose_matrix
from dt_lens.embeddings import Embedding, EmbeddingRegistry
from dt_lens.errors import DtLensError, nearest
from dt_lens.matrices import RESIDUAL, Matrix, SideName, Snapshot, find_matrix, fingerprint, select_matrices
from dt_lens.nulls import HaarMaximum, frame_maximum, q_values

if TYPE_CHECKING:
    from dt_lens.label_text import Filter, Rule
    from dt_lens.lens import Lens
    from dt_lens.token_tables import TokenTable

__all__ = ["COLUMNS", "Decomposition", "WeightSVD"]

COLUMNS = ["matrix", "layer", "head", "side", "sv", "block", "sigma", "embedding", "label", "cosine"]
COLUMNS += ["z", "p_value", "q_value"]
STRONGEST = ["matrix", "side", "embedding", "sv", "label", "cosine", "null_median", "p_value", "q_value"]
NULLS = ("haar",)
TINY = 1e-12  # of its own length, or the rounding of its dtype: what centring leaves of a direction is no direction
Array = NDArray[np.float64]
Names = Sequence[str] | str


class _Rows(NamedTuple):
    """An embedding as one side of a matrix meets it: unit or zero rows ``[n, d_model]``, and their space."""

    embedding: Embedding
    directions: Array
    dimension: int
    digest: bytes


class WeightSVD:
    """Singular value decompositions of a model's matrices, computed when asked for.

    Args:
        model: a wrapped model.
        rank: how many directions of each matrix; all of them when ``None``.
        embeddings: a registry of this model's, or names of its own embeddings (shell patterns), which are then compared
            with every side; the model's own registry when ``None``.
        fold_layernorm: decompose what acts on the stream, ``(I - 11^T/d) diag(w) W``, and compare with effective
            embedding directions; ``False`` takes raw weights and raw directions.

    Raises:
        DtLensError: for something that is no wrapped model, a registry of another model or of another dimension, or a
            rank below 1.
    """

    def __init__(
        self,
        model: Lens,
        rank: int | None = None,
        embeddings: EmbeddingRegistry | Names | None = None,
        fold_layernorm: bool = True,
    ) -> None:
        if not hasattr(model, "structure") or not hasattr(model, "embeddings"):
            raise DtLensError(
                f"WeightSVD takes a wrapped model, not a {type(model).__name__}; call dt_lens.wrap or dt_lens.load "
                "first."
            )
        if rank is not None and (not hasattr(rank, "__index__") or operator.index(rank) < 1):
            raise DtLensError(f"rank is {rank!r}; it must be a whole number of at least 1, or None for all directions.")
        self.model = model
        self.rank = rank
        self.fold_layernorm = fold_layernorm
        self._registry = embeddings if isinstance(embeddings, EmbeddingRegistry) else None
        own, given = model.embeddings, self._registry
        if given is not None and (given.d_model, given.owner) != (own.d_model, own.owner):
            raise DtLensError(
                "These embeddings belong to another model; register copies with owner=None to compare on purpose."
            )
        # Named embeddings are compared with every side; unnamed ones with the sides where they can be met.
        self._named: Names | None = None if isinstance(embeddings, EmbeddingRegistry) else embeddings
        if self._named is not None:
            own.select(self._named)
        self._done: dict[str, tuple[bytes, Decomposition]] = {}
        self._nulls: dict[tuple[Any, ...], HaarMaximum] = {}

    @property
    def registry(self) -> EmbeddingRegistry:
        """The embeddings that directions are compared with."""
        return self.model.embeddings if self._registry is None else self._registry

    def __getitem__(self, name: str) -> Decomposition:
        """The decomposition of the matrix called ``name``; kept until a bit of its weights changes.

        Raises:
            DtLensError: for a name that is not in the catalogue, with the nearest that is; for weights that hold NaN.
        """
        return self._decomposition(Snapshot.of(self.model), name)

    def _decomposition(self, lens: Snapshot, name: str) -> Decomposition:
        matrix = find_matrix(lens, name)
        state = fingerprint(lens, matrix)
        if name not in self._done or self._done[name][0] != state:
            self._done[name] = (state, decompose_matrix(lens, matrix, self.rank, self.fold_layernorm))
        return self._done[name][1]

    def scan(
        self,
        matrices: Names | None = None,
        null: str = "haar",
        seed: int = 0,
        embeddings: Names | None = None,
    ) -> pd.DataFrame:
        """What every direction of every matrix matches best, with the chance of a match as good.

        A row is one direction, or one block of directions that cannot be told apart, against one embedding: the label
        of largest absolute cosine (for a block, of largest projection on its span, which has no sign), ``z`` and
        ``p_value`` under the null that the direction or span is rotated at random (the maximum over the labels), and
        ``q_value`` by Benjamini-Hochberg over the whole table.

        Args:
            matrices: shell patterns such as ``"*.W_in"``; every catalogued matrix when ``None``.
            null: ``"haar"``.
            seed: of the null's Monte Carlo part.
            embeddings: names (patterns) to compare with on every side; by default input embeddings meet reading sides
                and output embeddings writing sides.

        Returns:
            a DataFrame with the columns ``matrix layer head side sv block sigma embedding label cosine z p_value
            q_value``; ``sv`` is the direction, or the first of ``block`` directions that cannot be told apart.
            ``table.attrs`` tells what was folded, which embeddings are untrained heads, the null and the seed.

        Raises:
            DtLensError: for an unknown matrix, embedding or null, or values that are not finite.
        """
        if null not in NULLS:
            raise DtLensError(f"Unknown null {null!r}; known are {', '.join(NULLS)}." + nearest(null, NULLS))
        parts: list[dict[str, Any]] = []
        for found, side, rows in self._meetings(matrices, embeddings):
            parts.append(self._matches(found, side, rows, seed))
        columns: dict[str, Any] = {
            name: np.concatenate([part[name] for part in parts]) if parts else [] for name in COLUMNS[:-1]
        }
        table = pd.DataFrame(columns)
        table["head"] = pd.array([None if head < 0 else head for head in table["head"]], dtype="Int64")
        table["q_value"] = q_values(table["p_value"].to_numpy(dtype=np.float64))
        table.attrs = {
            "fold_layernorm": self.fold_layernorm,
            "null": null,
            "seed": seed,
            "untrained": [e.name for e in self.registry.values() if not e.trained],
        }
        return table

    def _meetings(
        self, matrices: Names | None, embeddings: Names | None
    ) -> Iterator[tuple[Decomposition, SideName, _Rows]]:
        """Every matrix side on the residual stream with every embedding that it is to be compared with."""
        lens = Snapshot.of(self.model)
        named = self._named if embeddings is None else embeddings
        chosen = self.registry.select(named)
        seen: dict[tuple[str, bool], _Rows] = {}  # the same rows meet many matrices
        for matrix in select_matrices(lens, matrices):
            found = self._decomposition(lens, matrix.name)
            for side in matrix.residual_sides:
                for embedding in chosen:
                    if named is None and (embedding.side == "out") != (side == "write"):
                        continue
                    key = (embedding.name, self._centred(matrix, side))
                    if key not in seen:
                        seen[key] = self._rows(matrix, side, embedding)
                    yield found, side, seen[key]

    def _matches(self, found: Decomposition, side: SideName, rows: _Rows, seed: int) -> dict[str, Any]:
        """The columns of one matrix side against one embedding, an entry for each block of directions."""
        matrix, count = found.matrix, len(found.blocks)
        starts = np.array([start for start, _ in found.blocks], dtype=np.int64)
        sizes = np.array([stop - start for start, stop in found.blocks], dtype=np.int64)
        cosines = found.side(side).cpu().numpy() @ rows.directions.T
        # The length of a label's projection on each block's span; for a block of one, the absolute cosine.
        lengths = np.sqrt(np.add.reduceat(cosines**2, starts, axis=0)) if count else cosines
        best = lengths.argmax(1)
        value = np.minimum(lengths[np.arange(count), best], 1.0)
        p, z = np.ones(count), np.zeros(count)
        for size in np.unique(sizes):
            null, these = self._null(rows, int(size), seed), sizes == size
            p[these], z[these] = null.p_value(value[these]), null.z(value[these])
        return {
            "matrix": np.full(count, matrix.name, dtype=object),
            "layer": np.full(count, matrix.layer),
            "head": np.full(count, -1 if matrix.head is None else matrix.head),
            "side": np.full(count, side, dtype=object),
            "sv": starts,
            "block": sizes,
            "sigma": found.sigma.cpu().numpy()[starts],
            "embedding": np.full(count, rows.embedding.name, dtype=object),
            "label": np.asarray(rows.embedding.labels, dtype=object)[best],
            "cosine": np.where(sizes == 1, np.sign(cosines[starts, best]) * value, value),
            "z": z,
            "p_value": p,
        }

    def _centred(self, matrix: Matrix, side: SideName) -> bool:
        return self.fold_layernorm and matrix.centred(matrix.side(side))

    def _rows(self, matrix: Matrix, side: SideName, embedding: Embedding) -> _Rows:
        """An embedding as one side of a matrix meets it.

        With folding, effective directions; on a side that reads through a LayerNorm also centred, since a constant is
        what the centring removes: directions and labels live in ``d_model - 1`` dimensions then.
        """
        raw = embedding.directions.detach().double()
        if not bool(torch.isfinite(raw).all()):
            raise DtLensError(
                f"The embedding {embedding.name!r} holds NaN or infinite values; every entry must be finite."
            )
        E = (embedding.effective if self.fold_layernorm else raw).detach().double()
        centred = self._centred(matrix, side)
        if centred:
            E = E - E.mean(-1, keepdim=True)
        lengths, whole = E.norm(dim=1, keepdim=True), raw.norm(dim=1, keepdim=True)
        if self.fold_layernorm and embedding.layernorm is not None:
            whole = whole * embedding.layernorm.abs().max().double()
        tiny = max(TINY, torch.finfo(embedding.directions.dtype).eps)
        E = torch.where(lengths > tiny * whole, E / lengths.clamp_min(1e-300), 0.0)
        directions = np.ascontiguousarray(E.cpu().numpy())
        digest = hashlib.blake2b(directions.tobytes(), digest_size=16).digest()
        return _Rows(embedding, directions, E.shape[1] - int(centred), digest)

    def _null(self, rows: _Rows, span: int, seed: int) -> HaarMaximum:
        key = (rows.digest, rows.dimension, span, seed)
        if key not in self._nulls:
            self._nulls[key] = HaarMaximum.of(rows.directions, rows.dimension, seed, span)
        return self._nulls[key]

    def strongest(
        self,
        matrices: Names | None = None,
        embeddings: Names | None = None,
        samples: int = 1000,
        seed: int = 0,
    ) -> pd.DataFrame:
        """The best match of each whole matrix with each embedding; all its directions are rotated at once.

        The null for "I looked at every direction and every label and saw 0.24". ``p_value`` is the share of ``samples``
        random rotations with a match as good, or the union bound over the directions where that is smaller: a share
        cannot be smaller than ``1 / (samples + 1)``.

        Args: as for ``scan``.

        Returns:
            a DataFrame ``matrix side embedding sv label cosine null_median p_value q_value``.
        """
        draws: dict[tuple[Any, ...], Array] = {}
        table: list[tuple[Any, ...]] = []
        for found, side, rows in self._meetings(matrices, embeddings):
            if not len(found.sigma):
                continue
            cosines = found.side(side).cpu().numpy() @ rows.directions.T
            sv, label = np.unravel_index(int(np.abs(cosines).argmax()), cosines.shape)
            key = (rows.digest, len(cosines), rows.dimension)
            if key not in draws:
                draws[key] = frame_maximum(rows.directions, len(cosines), rows.dimension, samples, seed)
            value, drawn = float(cosines[sv, label]), draws[key]
            share = (1 + int((drawn >= abs(value)).sum())) / (1 + samples)
            # Both are monotone in the same statistic, so the smaller of the two is as valid as either.
            p = min(share, len(cosines) * float(self._null(rows, 1, seed).p_value(value)))
            name, labels = rows.embedding.name, rows.embedding.labels
            median = float(np.median(drawn))
            table.append((found.matrix.name, side, name, int(sv), labels[int(label)], value, median, p))
        frame = pd.DataFrame(table, columns=STRONGEST[:-1])
        frame["q_value"] = q_values(frame["p_value"].to_numpy(dtype=np.float64))
        return frame

    def cosines(self, matrix: str, embedding: str, side: SideName | None = None, k: int | None = None) -> pd.DataFrame:
        """The cosines of one matrix's first ``k`` directions (rows, by ``sv``) with one embedding's labels (columns).

        Args:
            side: by default the side where the embedding is met, reading sides for input embeddings.

        Raises:
            DtLensError: for an unknown matrix or embedding, a side that is not on the residual stream, or QK without a
                side.
        """
        found, labelled = self[matrix], self.registry[embedding]
        side = self._side(found.matrix, labelled, side)
        values = found.side(side)[:k].cpu().numpy() @ self._rows(found.matrix, side, labelled).directions.T
        return pd.DataFrame(values, columns=list(labelled.labels), index=pd.RangeIndex(len(values), name="sv"))

    def top(
        self, matrix: str, embedding: str, k: int = 8, side: SideName | None = None, labels: int = 3
    ) -> pd.DataFrame:
        """Both poles of the first ``k`` directions: the ``labels`` that each points towards most, and away from most.

        Returns:
            a DataFrame ``sv block sigma pole rank label cosine``. ``block`` is how many directions cannot be told apart
            from this one, itself included; ``pole`` is ``"+"`` or ``"-"``, and a direction's sign is a convention, so
            neither pole is the right one.

        Raises:
            DtLensError: as ``cosines`` does.
        """
        table, found = self.cosines(matrix, embedding, side, max(k, 0)), self[matrix]
        names, rows = list(table.columns), []
        for sv, values in enumerate(table.to_numpy()):
            start, stop = found.block_of(sv)
            order = np.argsort(-values, kind="stable")
            half = min(labels, len(order) // 2)
            poles = [("+", order[:half]), ("-", order[::-1][:half])]
            if len(order) == 1:
                poles = [("+" if values[0] >= 0 else "-", order)]
            for pole, picked in poles:
                for rank, j in enumerate(picked):
                    row = (sv, stop - start, float(found.sigma[sv]), pole, rank, names[j], float(values[j]))
                    rows.append(row)
        return pd.DataFrame(rows, columns=["sv", "block", "sigma", "pole", "rank", "label", "cosine"])

    def tokens(
        self,
        matrices: Names,
        embeddings: Names | None = None,
        k: int = 8,
        n: int = 10,
        where: Rule | Filter | Sequence[Rule | Filter] | None = None,
        side: SideName | None = None,
    ) -> TokenTable:
        """The ``n`` labels at both poles of the first ``k`` directions, several embeddings side by side.

        A table for Jupyter, pandas and HTML; the arguments are told at ``dt_lens.token_tables.token_table``.
        """
        from dt_lens.token_tables import token_table

        return token_table(self, matrices, self._named if embeddings is None else embeddings, k, n, where, side)

    def _side(self, matrix: Matrix, embedding: Embedding, side: SideName | None) -> SideName:
        """The side of a matrix on which an embedding is met."""
        sides = matrix.residual_sides
        if side is None and {"read", "write"} == set(sides):
            side = "write" if embedding.side == "out" else "read"
        side = matrix.left if matrix.side(side) == "left" else matrix.right
        if side not in RESIDUAL:
            raise DtLensError(
                f"The {side} side of {matrix.name} is not in the residual stream, where embeddings are; "
                f"say {' or '.join(sides)}."
            )
        return side
