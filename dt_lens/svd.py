"""Singular directions of every named matrix, and what they match.

``M = sum_i sigma_i left_i right_i^T``; for ``y = x M`` the left vectors live on the input side, the right ones on the
output side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dt_lens.decompose import SVD, decompose
from dt_lens.embeddings import Embedding, EmbeddingRegistry
from dt_lens.errors import DtLensError
from dt_lens.matrices import RESIDUAL, Matrix, SideName, find_matrix, perturbation, select_matrices
from dt_lens.nulls import HaarMaximum, cap_probability, frame_maximum, q_values

if TYPE_CHECKING:
    from dt_lens.lens import Lens

__all__ = ["COLUMNS", "Decomposition", "WeightSVD"]

COLUMNS = [
    "matrix",
    "layer",
    "head",
    "side",
    "sv",
    "block",
    "sigma",
    "embedding",
    "label",
    "cosine",
    "z",
    "p_value",
    "q_value",
]
NULLS = ("haar",)
# Two singular vectors count as told apart when rounding the weights turns them by less than this many radians.
MAX_ANGLE = 0.1


@dataclass(frozen=True)
class Decomposition:
    """The singular directions of one matrix, largest sigma first, cut at its numerical rank.

    Attributes:
        sigma: ``[k]``.
        left, right: ``[k, d_left]``, ``[k, d_right]``, unit rows. Signs are canonical: the entry of largest magnitude
            on the first side that faces the residual stream is positive.
        folded: whether the LayerNorm before the matrix is folded in.
        blocks: the directions in groups, ``[start, stop)``; a group of more than one holds sigmas too close to tell
            apart under rounding of the weights, and only its span means anything (Davis and Kahan, 1970: the angle is
            at most the perturbation over the gap).
        error: ``||M - sum|| / ||M||``, measured.
    """

    matrix: Matrix
    sigma: Float[Tensor, " k"]
    left: Float[Tensor, "k d_left"]
    right: Float[Tensor, "k d_right"]
    folded: bool
    blocks: tuple[tuple[int, int], ...]
    error: float

    def side(self, side: SideName | None = None) -> Float[Tensor, "k d"]:
        """The directions on a side by its name (``None``: the only side on the residual stream)."""
        return self.left if self.matrix.side(side) == "left" else self.right

    def _maybe(self, side: SideName) -> Tensor | None:
        return self.side(side) if side in (self.matrix.left, self.matrix.right) else None

    @property
    def read(self) -> Float[Tensor, "k d_model"] | None:
        """Directions read from the stream; ``None`` where there are none (QK has ``query`` and ``key``)."""
        return self._maybe("read")

    @property
    def write(self) -> Float[Tensor, "k d_model"] | None:
        """Directions written to the stream, or ``None``."""
        return self._maybe("write")

    @property
    def neuron(self) -> Float[Tensor, "k d_mlp"] | None:
        """Directions over the MLP's neurons, or ``None``."""
        return self._maybe("neuron")

    @property
    def head(self) -> Float[Tensor, "k d_head"] | None:
        """Directions inside the attention heads, or ``None``."""
        return self._maybe("head")

    @property
    def query(self) -> Float[Tensor, "k d_model"] | None:
        """QK's directions on the query's stream, or ``None``."""
        return self._maybe("query")

    @property
    def key(self) -> Float[Tensor, "k d_model"] | None:
        """QK's directions on the key's stream, or ``None``."""
        return self._maybe("key")

    def block_of(self, sv: int) -> tuple[int, int]:
        """The group ``[start, stop)`` that direction ``sv`` belongs to."""
        return next(block for block in self.blocks if block[0] <= sv < block[1])

    def as_embedding(self, side: SideName | None = None, k: int | None = None) -> Embedding:
        """These directions as an embedding, so that later layers can be compared with what this matrix writes."""
        directions = self.side(side)[:k]
        labels = [f"{self.matrix.name}[{i}]" for i in range(len(directions))]
        return Embedding(directions, labels, kind="direction", side="in")

    def __repr__(self) -> str:
        sides = f"{self.matrix.left} [{self.left.shape[1]}] -> {self.matrix.right} [{self.right.shape[1]}]"
        how = "folded" if self.folded else "raw"
        return (
            f"Decomposition({self.matrix.name}, {len(self.sigma)} directions, {sides}, {how}, error {self.error:.0e})"
        )


class WeightSVD:
    """Singular value decompositions of a model's matrices, computed when asked for.

    Args:
        model: a wrapped model.
        rank: how many directions of each matrix; all of them when ``None``.
        embeddings: a registry, or names of the model's own embeddings (shell patterns); the model's own registry when
            ``None``.
        fold_layernorm: decompose what acts on the stream, ``(I - 11^T/d) diag(w) W``, and compare with effective
            embedding directions; ``False`` takes raw weights and raw directions.

    Raises:
        DtLensError: for a registry of another model, or of another dimension.
    """

    def __init__(
        self,
        model: Lens,
        rank: int | None = None,
        embeddings: EmbeddingRegistry | Sequence[str] | str | None = None,
        fold_layernorm: bool = True,
    ) -> None:
        if not hasattr(model, "structure") or not hasattr(model, "embeddings"):
            raise DtLensError(
                f"WeightSVD takes a wrapped model, not a {type(model).__name__}; call dt_lens.wrap or dt_lens.load "
                "first."
            )
        if rank is not None and rank < 1:
            raise DtLensError(f"rank is {rank}; it must be at least 1, or None for all directions.")
        self.model = model
        self.rank = rank
        self.fold_layernorm = fold_layernorm
        own = model.embeddings
        if isinstance(embeddings, EmbeddingRegistry) and (embeddings.d_model, embeddings.owner) != (
            own.d_model,
            own.owner,
        ):
            raise DtLensError(
                "These embeddings belong to another model; register copies with owner=None to compare on purpose."
            )
        self.registry = embeddings if isinstance(embeddings, EmbeddingRegistry) else own
        # Named embeddings are compared with every side; unnamed ones with the sides where they can be met.
        self._named: Sequence[str] | str | None = None if isinstance(embeddings, EmbeddingRegistry) else embeddings
        self._done: dict[str, tuple[tuple[float, ...], Decomposition]] = {}
        self._nulls: dict[tuple[Any, ...], HaarMaximum] = {}

    def __getitem__(self, name: str) -> Decomposition:
        """The decomposition of the matrix called ``name``; kept until the weights change."""
        matrix = find_matrix(self.model, name)
        state = self._fingerprint(matrix)
        if name not in self._done or self._done[name][0] != state:
            self._done[name] = (state, decompose_matrix(self.model, matrix, self.rank, self.fold_layernorm))
        return self._done[name][1]

    def _fingerprint(self, matrix: Matrix) -> tuple[float, ...]:
        weights = self.model.weights
        names = [factor.weight for factor in matrix.factors]
        names += [f"{norm}.w" for norm in (matrix.left_norm, matrix.right_norm) if norm is not None]
        return tuple(
            float(value) for name in names for value in (weights[name].double().sum(), weights[name].double().norm())
        )

    def scan(
        self,
        matrices: Sequence[str] | str | None = None,
        null: str = "haar",
        seed: int = 0,
        embeddings: Sequence[str] | str | None = None,
    ) -> pd.DataFrame:
        """What every direction of every matrix matches best, with the chance of a match as good.

        A row is one direction (or one block of directions that cannot be told apart: the match is then with its span)
        against one embedding: the label of largest absolute cosine, ``z`` and ``p_value`` under the null that the
        direction is rotated at random (the maximum over the labels), and ``q_value`` by Benjamini-Hochberg over the
        whole table. ``table.attrs`` tells what was folded, which embeddings are untrained heads, the null and the seed.

        Args:
            matrices: shell patterns such as ``"*.W_in"``; every catalogued matrix when ``None``.
            null: ``"haar"``.
            seed: of the null's Monte Carlo part.
            embeddings: names (patterns) to compare with on every side; by default input embeddings meet reading sides
                and output embeddings writing sides.

        Returns:
            a DataFrame with the columns ``matrix layer head side sv block sigma embedding label cosine z p_value
            q_value``.
        """
        if null not in NULLS:
            raise DtLensError(f"Unknown null {null!r}; known are {', '.join(NULLS)}.")
        named = self._named if embeddings is None else embeddings
        parts: list[pd.DataFrame] = []
        for matrix in select_matrices(self.model, matrices):
            found = self[matrix.name]
            for side in matrix.residual_sides:
                for embedding in self.registry.select(named):
                    if named is not None or (embedding.side == "out") == (side == "write"):
                        parts.append(self._matches(found, side, embedding, seed))
        table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS[:-1])
        table["q_value"] = q_values(table["p_value"])
        table.attrs = {
            "fold_layernorm": self.fold_layernorm,
            "null": null,
            "seed": seed,
            "untrained": [e.name for e in self.registry.values() if not e.trained],
        }
        return table

    def _matches(self, found: Decomposition, side: SideName, embedding: Embedding, seed: int) -> pd.DataFrame:
        """The rows of one matrix side against one embedding, a row for each block of directions."""
        E, dimension = self.comparable(found, side, embedding)
        cosines = found.side(side).cpu().numpy() @ E.T
        null = self._null(E, dimension, (embedding.name, dimension < E.shape[1]), seed)
        starts = np.array([start for start, _ in found.blocks])
        # The length of a label's projection on each block's span; for a block of one, the absolute cosine.
        lengths = np.sqrt(np.add.reduceat(cosines**2, starts, axis=0))
        best = lengths.argmax(1)
        value = lengths[np.arange(len(starts)), best]
        p = null.p_value(value)
        sizes = np.diff([*starts, len(cosines)])
        for i in np.flatnonzero(sizes > 1):
            # The union bound over labels: valid for any span, and close in the tail.
            p[i] = min(1.0, null.n_labels * float(cap_probability(value[i], dimension, int(sizes[i]))))
        signed = np.where(sizes == 1, cosines[starts, best], value)
        labels = np.asarray(embedding.labels, dtype=object)
        return pd.DataFrame(
            {
                "matrix": found.matrix.name,
                "layer": found.matrix.layer,
                "head": pd.array([found.matrix.head] * len(starts), dtype="Int64"),
                "side": side,
                "sv": starts,
                "block": starts,
                "sigma": found.sigma.cpu().numpy()[starts],
                "embedding": embedding.name,
                "label": labels[best],
                "cosine": signed,
                "z": null.z(value),
                "p_value": p,
            }
        )

    def comparable(
        self, found: Decomposition, side: SideName, embedding: Embedding
    ) -> tuple[np.ndarray[Any, Any], int]:
        """An embedding's unit rows ``[n, d_model]`` as one side meets them, and the dimension of their space.

        With folding, effective directions; on a side that reads through a LayerNorm also centred, since a constant is
        what the centring removes: both live in ``d_model - 1`` dimensions then. Rows without length stay zero.
        """
        E = (embedding.effective if self.fold_layernorm else embedding.directions).detach().double()
        norm = found.matrix.left_norm if found.matrix.side(side) == "left" else found.matrix.right_norm
        centred = self.fold_layernorm and norm is not None
        if centred:
            E = E - E.mean(-1, keepdim=True)
        lengths = E.norm(dim=1, keepdim=True)
        E = torch.where(lengths > 1e-12 * lengths.max(), E / lengths.clamp_min(1e-300), 0.0)
        return E.cpu().numpy(), E.shape[1] - int(centred)

    def _null(self, E: np.ndarray[Any, Any], dimension: int, key: tuple[Any, ...], seed: int) -> HaarMaximum:
        key = (*key, seed, E.shape, float(E.sum()), float(np.abs(E).sum()))
        if key not in self._nulls:
            self._nulls[key] = HaarMaximum.of(E, dimension, seed)
        return self._nulls[key]

    def strongest(
        self,
        matrices: Sequence[str] | str | None = None,
        embeddings: Sequence[str] | str | None = None,
        samples: int = 1000,
        seed: int = 0,
    ) -> pd.DataFrame:
        """The best match of each whole matrix with each embedding; all its directions are rotated at once.

        The null for "I looked at every direction and every label and saw 0.24": columns ``matrix side embedding sv
        label cosine null_median p_value q_value``.
        """
        named = self._named if embeddings is None else embeddings
        draws: dict[tuple[Any, ...], np.ndarray[Any, Any]] = {}
        rows = []
        for matrix in select_matrices(self.model, matrices):
            found = self[matrix.name]
            for side in matrix.residual_sides:
                for embedding in self.registry.select(named):
                    if named is None and (embedding.side == "out") != (side == "write"):
                        continue
                    E, dimension = self.comparable(found, side, embedding)
                    cosines = found.side(side).cpu().numpy() @ E.T
                    sv, label = np.unravel_index(int(np.abs(cosines).argmax()), cosines.shape)
                    key = (embedding.name, len(cosines), dimension)
                    if key not in draws:
                        draws[key] = frame_maximum(E, len(cosines), dimension, samples, seed)
                    value, null = float(cosines[sv, label]), draws[key]
                    p = (1 + int((null >= abs(value)).sum())) / (1 + samples)
                    rows.append(
                        (
                            matrix.name,
                            side,
                            embedding.name,
                            int(sv),
                            embedding.labels[int(label)],
                            value,
                            float(np.median(null)),
                            p,
                        )
                    )
        table = pd.DataFrame(
            rows, columns=["matrix", "side", "embedding", "sv", "label", "cosine", "null_median", "p_value"]
        )
        table["q_value"] = q_values(table["p_value"])
        return table

    def cosines(self, matrix: str, embedding: str, side: SideName | None = None) -> pd.DataFrame:
        """All cosines of one matrix's directions (rows, by ``sv``) with one embedding's labels (columns)."""
        found = self[matrix]
        side = side or self._default_side(found.matrix, self.registry[embedding])
        E, _ = self.comparable(found, side, self.registry[embedding])
        values = found.side(side).cpu().numpy() @ E.T
        return pd.DataFrame(
            values, columns=list(self.registry[embedding].labels), index=pd.RangeIndex(len(values), name="sv")
        )

    def top(
        self, matrix: str, embedding: str, k: int = 8, side: SideName | None = None, labels: int = 3
    ) -> pd.DataFrame:
        """Both poles of the first ``k`` directions: the labels they point towards most, and away from most.

        Returns:
            a DataFrame ``sv block sigma pole rank label cosine``, ``pole`` being ``"+"`` or ``"-"``; a direction's sign
            is a convention, so neither pole is the right one.
        """
        table, found = self.cosines(matrix, embedding, side), self[matrix]
        rows = []
        for sv in range(min(k, len(table))):
            values = table.iloc[sv].to_numpy()
            order = np.argsort(-values, kind="stable")
            half = min(labels, max(1, len(values) // 2)) if len(values) > 1 else 1
            poles: list[tuple[str, Any]] = [("+", order[:half]), ("-", order[::-1][:half] if len(values) > 1 else [])]
            for pole, picked in poles:
                for rank, j in enumerate(picked):
                    rows.append(
                        (
                            sv,
                            found.block_of(sv)[0],
                            float(found.sigma[sv]),
                            pole,
                            rank,
                            table.columns[j],
                            float(values[j]),
                        )
                    )
        return pd.DataFrame(rows, columns=["sv", "block", "sigma", "pole", "rank", "label", "cosine"])

    def _default_side(self, matrix: Matrix, embedding: Embedding) -> SideName:
        sides = matrix.residual_sides
        wanted: SideName = "write" if embedding.side == "out" else "read"
        return wanted if wanted in sides else sides[0]


def decompose_matrix(lens: Lens, matrix: Matrix, rank: int | None, fold_layernorm: bool) -> Decomposition:
    """The decomposition of one catalogued matrix, with canonical signs and blocks."""
    folded = fold_layernorm and matrix.foldable
    factors = matrix.folded(lens) if folded else matrix.raw(lens)
    result: SVD = decompose(factors, rank)
    sign_side = result.left if matrix.left in RESIDUAL else result.right
    largest = sign_side.gather(1, sign_side.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(result.sigma)
    return Decomposition(
        matrix,
        result.sigma,
        result.left * signs,
        result.right * signs,
        folded,
        _blocks(result.sigma, perturbation(matrix, lens) / MAX_ANGLE),
        result.error,
    )


def _blocks(sigma: Tensor, gap: float) -> tuple[tuple[int, int], ...]:
    """Neighbours closer than ``gap`` share a block."""
    values = sigma.tolist()
    starts = [0] + [i for i in range(1, len(values)) if values[i - 1] - values[i] > gap]
    return tuple(zip(starts, [*starts[1:], len(values)], strict=True)) if values else ()
