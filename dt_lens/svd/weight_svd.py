"""Singular directions of every named matrix, and what they match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dt_lens.arguments import local_path, require_activations, require_wrapped, whole_number
from dt_lens.errors import DtLensError
from dt_lens.lens.embeddings import Embedding, EmbeddingRegistry
from dt_lens.lens.matrices import RESIDUAL, Matrix, MatrixFactors, SideName, Snapshot, find_matrix, select_matrices
from dt_lens.lens.weights import fingerprint
from dt_lens.progress import Tell, reporting, silent
from dt_lens.statistics.nulls.haar import HaarMaximum
from dt_lens.svd.cache import KeptResults
from dt_lens.svd.decomposition import Decomposition, decompose_matrix
from dt_lens.svd.null_sources import Pools, draw_pools
from dt_lens.svd.pairings import DECOMPOSING, Pairing
from dt_lens.svd.side_labels import SideLabels
from dt_lens.svd.weighted import decompose_weighted

if TYPE_CHECKING:
    from dt_lens.lens.activations import Activations
    from dt_lens.lens.protocol import Lens
    from dt_lens.svd.label_filters import Filter, Rule
    from dt_lens.svd.token_table import TokenTable

__all__ = ["Decomposition", "WeightSVD"]

Array = NDArray[np.float64]
Names = Sequence[str] | str


class WeightSVD:
    """Singular value decompositions of a model's matrices, computed when asked for.

    Args:
        model: a wrapped model.
        rank: how many directions of each matrix; all of them when ``None``.
        embeddings: a registry of this model's, or names of its own embeddings (shell patterns), which are then compared
            with every side; the model's own registry when ``None``.
        fold_layernorm: decompose what acts on the stream, ``(I - 11^T/d) diag(w) W``, and compare with effective
            embedding directions; ``False`` takes raw weights and raw directions.
        resume: a folder where every finished decomposition is kept, and found again when the same is asked for later:
            for models that take long, and runs that may be stopped.
        activations: what ``dt_lens.collect_activations`` gives: weight the decompositions by the covariance of real
            inputs, so that ``sigma`` is the standard deviation of the output along a direction. What a direction reads
            is then ``M v_i`` at unit length, and not orthogonal; see ``dt_lens.svd.weighted``.

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
        resume: str | Path | None = None,
        *,
        activations: Activations | None = None,
    ) -> None:
        require_wrapped(model, "WeightSVD", "structure", "embeddings")
        self.model = model
        self.rank = None if rank is None else whole_number(rank, "rank", 1)
        self.fold_layernorm = fold_layernorm
        if activations is not None:
            require_activations(activations)
        self.activations = activations
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
        # What takes long, and is found again.
        self.kept = KeptResults(None if resume is None else local_path(resume, "resume"))

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
            weighted = "" if self.activations is None else f" {self.activations.digest}"
            key = f"svd {name} {state.hex()} {self.rank} {self.fold_layernorm}{weighted}"
            kept = self.kept.get(key, lambda: self._decomposed(lens, matrix).tensors())
            self._done[name] = (state, Decomposition.from_tensors(matrix, kept))
        return self._done[name][1]

    def _decomposed(self, lens: Snapshot, matrix: Matrix) -> Decomposition:
        factors = MatrixFactors.of(lens, matrix, self.fold_layernorm)
        if self.activations is None:
            return decompose_matrix(factors, self.rank)
        return decompose_weighted(factors, self.activations, self.rank)

    def scan(
        self,
        matrices: Names | None = None,
        null: str | Pools = "haar",
        seed: int = 0,
        embeddings: Names | None = None,
        progress: bool | Tell = False,
        *,
        activations: Any = None,
        draws: int | None = None,
    ) -> pd.DataFrame:
        """What every direction of every matrix matches best, with the chance of a match as good.

        A row is one direction, or one block of directions that cannot be told apart, against one embedding: the label
        of largest absolute cosine (for a block, of largest projection on its span, which has no sign), ``z`` and
        ``p_value`` of a best match (the maximum over the labels) under the null, and ``q_value`` by Benjamini-Hochberg
        over the whole table.

        Args:
            matrices: shell patterns such as ``"*.W_in"``; every catalogued matrix when ``None``.
            null: what a direction without meaning is: ``"haar"``, turned at random; ``"covariance"``, drawn from the
                Gaussian of what its side of the matrix meets; ``"untrained"`` or ``"shuffled"``, found in a freshly
                initialised model or in weights whose entries are in random order. Or what ``pools`` gave. The classes
                in ``dt_lens.statistics.nulls`` tell how each is computed.
            seed: of the null's Monte Carlo part.
            embeddings: names (patterns) to compare with on every side; by default input embeddings meet reading sides
                and output embeddings writing sides.
            progress: ``True`` for a progress bar on standard error, or a function of (what is being done, share done).
            activations: for ``"covariance"``: what ``dt_lens.collect_activations`` gives, a file of them, or a
                covariance ``[d_model, d_model]`` to be used on every side.
            draws: for ``"untrained"`` and ``"shuffled"`` how many models are drawn: with ``B`` pooled matches no
                p-value is below ``1 / (1 + B)`` (``table.attrs["smallest_p"]``), so by default as many as make ``B``
                10,000 in every pool of single directions, 3 at least and 100 at most. Otherwise how many directions
                are drawn for each null that is not exact.

        Returns:
            a DataFrame with the columns ``matrix layer head side sv block sigma embedding label cosine z p_value
            q_value``; ``sv`` is the direction, or the first of ``block`` directions that cannot be told apart.
            ``table.attrs`` tells what was folded, which embeddings are untrained heads, the null, what it ``assumes``,
            and the seed.

        Raises:
            DtLensError: for an unknown matrix, embedding or null, values that are not finite, a seed below 0, or fewer
                than one draw.
        """
        from dt_lens.svd.scan import scan_table

        with reporting(progress) as tell:
            return scan_table(self, matrices, null, seed, embeddings, activations, draws, tell)

    def pools(
        self,
        null: str,
        matrices: Names | None = None,
        embeddings: Names | None = None,
        *,
        seed: int = 0,
        draws: int | None = None,
        progress: bool | Tell = False,
    ) -> Pools:
        """The best matches of drawn models, for ``scan(null=pools)`` and ``strongest(null=pools)``.

        Drawing is what takes long; pools of ``"untrained"`` models serve every model of the same shape.

        Args: as for ``scan``.

        Raises:
            DtLensError: for a null that is not ``"untrained"`` or ``"shuffled"``, and as ``scan`` does.
        """
        with reporting(progress) as tell:
            return draw_pools(self, null, self.meetings(matrices, embeddings), seed, draws, tell)

    def like(self, drawn: Any) -> WeightSVD:
        """The same questions to another model of the same shape."""
        registry = self._named if self._registry is None else drawn.embeddings
        # Other weights, and the same inputs.
        inputs = None if self.activations is None else replace(self.activations, made_of={})
        return WeightSVD(drawn, self.rank, registry, self.fold_layernorm, activations=inputs)

    def meetings(
        self, matrices: Names | None = None, embeddings: Names | None = None, tell: Tell = silent
    ) -> list[Pairing]:
        """Every matrix side on the residual stream with every embedding that it is to be compared with."""
        lens = Snapshot.of(self.model)
        named = self._named if embeddings is None else embeddings
        chosen = self.registry.select(named)
        seen: dict[tuple[str, bool], SideLabels] = {}  # the same rows meet many matrices
        meetings: list[Pairing] = []
        wanted = select_matrices(lens, matrices)
        for number, matrix in enumerate(wanted):
            tell(f"decomposing {matrix.name}", DECOMPOSING * number / len(wanted))
            found = self._decomposition(lens, matrix.name)
            for side in matrix.residual_sides:
                for embedding in chosen:
                    if named is None and (embedding.side == "out") != (side == "write"):
                        continue
                    key = (embedding.name, self._centred(matrix, side))
                    if key not in seen:
                        seen[key] = SideLabels(embedding, self.fold_layernorm, key[1])
                    meetings.append(Pairing(found, side, seen[key]))
        return meetings

    def _centred(self, matrix: Matrix, side: SideName) -> bool:
        return self.fold_layernorm and matrix.centred(matrix.side(side))

    def _labels(self, matrix: Matrix, side: SideName, embedding: Embedding) -> SideLabels:
        return SideLabels(embedding, self.fold_layernorm, self._centred(matrix, side))

    def rotations(self, labels: SideLabels, span: int, seed: int, draws: int | None = None) -> HaarMaximum:
        """The null of a random rotation; kept."""
        key = (labels.digest, labels.dimension, span, seed, draws)
        if key not in self._nulls:
            kept = self.kept if not labels.whole else KeptResults(None)
            made = kept.get(f"null {key}", lambda: labels.null(span, seed, draws).tensors())
            self._nulls[key] = HaarMaximum.from_tensors(made)
        return self._nulls[key]

    def strongest(
        self,
        matrices: Names | None = None,
        embeddings: Names | None = None,
        samples: int = 1000,
        seed: int = 0,
        null: str | Pools = "haar",
        draws: int | None = None,
    ) -> pd.DataFrame:
        """The best match of each whole matrix with each embedding: "I looked at everything and saw 0.24".

        Under ``"haar"`` all directions are rotated at once: ``p_value`` is the share of ``samples`` random rotations
        with a match as good, or the union bound over the directions where that is below ``100 / (samples + 1)``. Under
        ``"untrained"`` and ``"shuffled"`` it is the share among the matrices of the same kind in ``draws`` models.
        ``"covariance"`` says nothing of whole frames.

        Args: as for ``scan``.

        Returns:
            a DataFrame ``matrix side embedding sv label cosine null_median p_value q_value``.
        """
        from dt_lens.svd.strongest import strongest

        return strongest(self, matrices, embeddings, samples, seed, null, draws)

    def subspaces(
        self,
        matrices: Names | None = None,
        embeddings: Names | None = None,
        k: int | Sequence[int] = (1, 2, 4, 8, 16, 32),
        *,
        seed: int = 0,
        progress: bool | Tell = False,
    ) -> pd.DataFrame:
        """Spans instead of vectors: the first ``k`` directions of each matrix against all labels of each embedding.

        Args:
            matrices, embeddings, progress: as for ``scan``.
            k: one or several; each is moved to the nearest number that cuts no block of near-equal sigmas.
            seed: of the draws behind ``haar_largest``.

        Returns:
            a DataFrame ``matrix layer head side k embedding labels dimension largest haar_largest overlap haar_overlap
            z p_value q_value``. ``labels`` is the dimension ``m`` of the labels' span in a space of ``dimension``
            (one less where a LayerNorm's centring stands on either side of the comparison);
            ``largest`` the cosine of the smallest principal angle, ``haar_largest`` its median under a random rotation;
            ``overlap`` the mean squared cosine of the ``min(k, m)`` principal angles, ``haar_overlap`` its mean under
            a random rotation, which is exact, like ``p_value`` where ``k`` or ``m`` is 1 (``nulls.SubspaceOverlap``
            tells how it is drawn or approximated otherwise). ``q_value`` is over the whole table.

        Raises:
            DtLensError: for a ``k`` that is no whole number of at least 1, and as ``scan`` does.
        """
        from dt_lens.svd.subspaces import subspaces

        return subspaces(self, matrices, embeddings, k, seed=seed, progress=progress)

    def cosines(self, matrix: str, embedding: str, side: SideName | None = None, k: int | None = None) -> pd.DataFrame:
        """The cosines of one matrix's first ``k`` directions (rows, by ``sv``) with one embedding's labels (columns).

        Args:
            side: by default the side where the embedding is met, reading sides for input embeddings.
            k: all of them when ``None``.

        Raises:
            DtLensError: for an unknown matrix or embedding, a side that is not on the residual stream, QK without a
                side, or a negative ``k``.
        """
        k = None if k is None else whole_number(k, "k", 0)
        found, labelled = self[matrix], self.registry[embedding]
        side = self._side(found.matrix, labelled, side)
        values = self._labels(found.matrix, side, labelled).cosines(found.side(side)[:k].cpu().numpy())
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
            DtLensError: as ``cosines`` does, and for a negative number of labels.
        """
        labels = whole_number(labels, "labels", 0)
        table, found = self.cosines(matrix, embedding, side, k), self[matrix]
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

        A table for Jupyter, pandas and HTML; the arguments are told at ``dt_lens.svd.token_table.token_table``.
        """
        from dt_lens.svd.token_table import token_table

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
