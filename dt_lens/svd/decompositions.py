"""Decompositions of a model's matrices, computed when first used, and the embeddings they are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dt_lens.arguments import local_path, require_activations, require_wrapped, truth_value, whole_number
from dt_lens.errors import DtLensError
from dt_lens.lens.embeddings import Embedding, EmbeddingRegistry
from dt_lens.lens.matrices import Matrix, MatrixFactors, SideName, Snapshot, catalogue, find_matrix, select_matrices
from dt_lens.lens.printing import Printed, Rows, listed
from dt_lens.lens.weights import checksum, fingerprint
from dt_lens.progress import ProgressCallback, reporting, silent
from dt_lens.statistics.nulls.haar import HaarMaximum
from dt_lens.svd import solvers
from dt_lens.svd.cache import ResultCache
from dt_lens.svd.decomposition import Decomposition, decompose_matrix
from dt_lens.svd.pairings import DECOMPOSING, Pairing, is_natural
from dt_lens.svd.reading_ahead import ReadingAhead
from dt_lens.svd.side_by_side import in_order
from dt_lens.svd.side_labels import SideLabels
from dt_lens.svd.weighted import decompose_weighted

if TYPE_CHECKING:
    from dt_lens.lens.activations import Activations
    from dt_lens.lens.protocol import Lens

__all__ = ["Decompositions"]

Names = Sequence[str] | str


class Decompositions(Printed):
    """The decompositions of a model's matrices by name, and the pairings of their sides with embeddings.

    What every table of ``WeightSVD`` is computed from; ``WeightSVD`` describes the arguments and what they raise.

    Attributes:
        model: the wrapped model.
        rank: how many directions of each matrix at most; all when ``None``.
        fold_layernorm: whether LayerNorms are folded in.
        activations: what the decompositions are weighted by, or ``None``.
        cache: where finished results are stored, so that an interrupted run resumes.
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
        require_wrapped(model, type(self).__name__, "structure", "embeddings")
        self.model = model
        self.rank = None if rank is None else whole_number(rank, "rank", 1)
        self.fold_layernorm = truth_value(fold_layernorm, "fold_layernorm")
        if activations is not None:
            require_activations(activations)
        self.activations = activations
        self._registry = embeddings if isinstance(embeddings, EmbeddingRegistry) else None
        own, given = model.embeddings, self._registry
        if given is not None and (given.d_model, given.owner) != (own.d_model, own.owner):
            raise DtLensError(
                "These embeddings belong to another model; register copies with owner=None to compare on purpose."
            )
        # Named embeddings are compared with every side, unnamed ones with the sides that suit them.
        self._named: Names | None = None if isinstance(embeddings, EmbeddingRegistry) else embeddings
        if self._named is not None:
            own.select(self._named)
        self._done: dict[str, tuple[bytes | tuple[Any, ...], Decomposition]] = {}
        self._nulls: dict[tuple[Any, ...], HaarMaximum] = {}
        self.cache = ResultCache(None if resume is None else local_path(resume, "resume"))

    def _shown(self) -> tuple[str, Rows]:
        found = catalogue(Snapshot.of(self.model))
        kinds = dict.fromkeys(matrix.kind for matrix in found.values())
        folded = "LayerNorm folded in" if self.fold_layernorm else "raw weights"
        first = "" if self.rank is None else f", the first {self.rank} directions of each"
        named = self.registry if self._named is None else [one.name for one in self.registry.select(self._named)]
        rows = [("matrices", listed(kinds)), ("compared with", listed(named)), ("decomposed", listed(self._done, 3))]
        rows += [] if self.activations is None else [("weighted by", f"the activations {self.activations.digest}")]
        example = next((name for name in found if name.endswith("W_in")), next(iter(found), ""))
        rows.append(("next", f'svd.scan("*.W_in"), svd["{example}"], svd.top("{example}", EMBEDDING)'))
        return f"{type(self).__name__} of a {self.model.kind}: {len(found)} matrices, {folded}{first}", rows

    @property
    def registry(self) -> EmbeddingRegistry:
        """The embeddings that directions are compared with."""
        return self.model.embeddings if self._registry is None else self._registry

    def __getitem__(self, name: str) -> Decomposition:
        """The decomposition of the matrix called ``name``; computed again only when a bit of its weights changed.

        Raises:
            DtLensError: for a name that is not in the catalogue, with the nearest that is; for weights that hold NaN.
        """
        lens = Snapshot.of(self.model)
        return next(self._decomposed_in_order(lens, [find_matrix(lens, name)]))

    def decompose(
        self, matrices: Names | None = None, progress: bool | ProgressCallback | None = None
    ) -> dict[str, Decomposition]:
        """The decompositions of several matrices by name: ``svd[name]`` for each, small ones side by side.

        Args:
            matrices: names or shell patterns; every catalogued matrix when ``None``.
            progress: as for ``scan``.

        Raises:
            DtLensError: for an unknown matrix, or weights that hold NaN.
        """
        lens = Snapshot.of(self.model)
        wanted = select_matrices(lens, matrices)
        found = {}
        with reporting(progress) as tell:
            for matrix, one in zip(wanted, self._decomposed_in_order(lens, wanted), strict=True):
                found[matrix.name] = one
                tell(f"decomposed {matrix.name}", len(found) / len(wanted))
        return found

    def _decomposed_in_order(self, lens: Snapshot, matrices: Sequence[Matrix]) -> Iterator[Decomposition]:
        """The decomposition of every matrix."""

        def size(matrix: Matrix) -> int:
            return max(factor.view(lens.weights).numel() for factor in matrix.factors)

        with ReadingAhead(lens, matrices, lambda matrix: self._state(lens, matrix)) as states:
            yield from in_order(lambda matrix: self._decomposition(lens, matrix, states.take(matrix)), matrices, size)

    def _state(self, lens: Snapshot, matrix: Matrix) -> bytes | tuple[Any, ...]:
        # What is kept on disk goes by a hash; within a process a checksum, in a fifth of the time, says what changed.
        return checksum(lens, matrix) if self.cache.folder is None else fingerprint(lens, matrix)

    def _decomposition(self, lens: Snapshot, matrix: Matrix, state: bytes | tuple[Any, ...]) -> Decomposition:
        if matrix.name not in self._done or self._done[matrix.name][0] != state:
            if isinstance(state, bytes):
                weighted = "" if self.activations is None else f" {self.activations.digest}"
                key = f"svd {solvers.VERSION} {matrix.name} {state.hex()} {self.rank} {self.fold_layernorm}{weighted}"
                stored = self.cache.get(key, lambda: self._decomposed(lens, matrix).tensors())
                made = Decomposition.from_tensors(matrix, stored)
            else:
                made = self._decomposed(lens, matrix)
            self._done[matrix.name] = (state, made)
        return self._done[matrix.name][1]

    def _decomposed(self, lens: Snapshot, matrix: Matrix) -> Decomposition:
        factors = MatrixFactors.of(lens, matrix, self.fold_layernorm)
        if self.activations is None:
            return decompose_matrix(factors, self.rank)
        return decompose_weighted(factors, self.activations, self.rank)

    def like(self, model: Any) -> Self:
        """The same settings for another model of the same shape."""
        registry = self._named if self._registry is None else model.embeddings
        # Other weights, and the same inputs: not checked against the weights they were collected with.
        inputs = None if self.activations is None else replace(self.activations, made_of={})
        return type(self)(model, self.rank, registry, self.fold_layernorm, activations=inputs)

    def among(self, embeddings: EmbeddingRegistry) -> Self:
        """The same decompositions, those computed so far included, compared with other embeddings of this model."""
        other = self.like(self.model)
        other._registry, other._named = embeddings, None
        other._done, other._nulls, other.cache = self._done, self._nulls, self.cache
        return other

    def pairings(
        self, matrices: Names | None = None, embeddings: Names | None = None, tell: ProgressCallback = silent
    ) -> list[Pairing]:
        """Every matrix side on the residual stream with every embedding that it is compared with."""
        lens = Snapshot.of(self.model)
        named = self._named if embeddings is None else embeddings
        chosen = self.registry.select(named)
        made: dict[tuple[str, bool], SideLabels] = {}  # the same rows are compared with many matrices
        pairings: list[Pairing] = []
        wanted = select_matrices(lens, matrices)
        decomposed = self._decomposed_in_order(lens, wanted)
        for number, matrix in enumerate(wanted):
            tell(f"decomposing {matrix.name}", DECOMPOSING * number / len(wanted))
            decomposition = next(decomposed)
            for side in matrix.residual_sides:
                for embedding in chosen:
                    if named is None and not is_natural(embedding, side):
                        continue
                    key = (embedding.name, self._centred(matrix, side))
                    if key not in made:
                        made[key] = self.labels_of(embedding, matrix, side)
                    pairings.append(Pairing(decomposition, side, made[key]))
        return pairings

    def labels_of(self, embedding: Embedding, matrix: Matrix, side: SideName) -> SideLabels:
        """An embedding's labels as one side of a matrix is compared with them."""
        return SideLabels(embedding, self.fold_layernorm, self._centred(matrix, side))

    def _centred(self, matrix: Matrix, side: SideName) -> bool:
        return self.fold_layernorm and matrix.centred(matrix.side(side))

    def rotations(self, labels: SideLabels, span: int, seed: int, draws: int | None = None) -> HaarMaximum:
        """The null of a random rotation of one direction, or of a span, against these labels; cached."""
        kept = self.cache.folder is not None and not labels.whole
        key = (labels.digest if kept else labels.mark, labels.dimension, span, seed, draws)
        if key not in self._nulls:
            cache = self.cache if kept else ResultCache(None)
            made = cache.get(f"null {key}", lambda: labels.null(span, seed, draws).tensors())
            self._nulls[key] = HaarMaximum.from_tensors(made)
        return self._nulls[key]
