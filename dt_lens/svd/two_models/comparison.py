"""What changed in every matrix between two models of the same shape, such as before and after fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from dt_lens.arguments import finite_numbers, local_path, require_wrapped, whole_number
from dt_lens.errors import DtLensError, a_type, as_written
from dt_lens.lens.matrices import Matrix, MatrixFactors, SideName, Snapshot, catalogue, find_matrix, select_matrices
from dt_lens.lens.weights import fingerprint
from dt_lens.progress import ProgressCallback, reporting
from dt_lens.report.options import require_word, sized, titled
from dt_lens.svd import solvers
from dt_lens.svd.cache import ResultCache
from dt_lens.svd.decomposition import Decomposition, common_boundary, rounding_noise
from dt_lens.svd.pairings import is_natural
from dt_lens.svd.reading_ahead import ReadingAhead
from dt_lens.svd.side_by_side import in_order
from dt_lens.svd.solvers import decompose
from dt_lens.svd.two_models import matrix_change
from dt_lens.svd.two_models.direction_pairs import match_directions
from dt_lens.svd.two_models.label_changes import By, Owner, label_changes
from dt_lens.svd.two_models.matrix_change import Measured, change_factors, leading, measure, unchanged
from dt_lens.svd.two_models.same_weights import SameWeights
from dt_lens.svd.two_models.summary import most_changed, notebook_html

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["ModelChanges", "compare"]

Array = NDArray[np.float64]
MATCHED = 1024  # directions at most that are matched where a matrix has more
Names = Sequence[str] | str


def compare(
    a: Any,
    b: Any,
    matrices: Names | None = None,
    *,
    k: int = 10,
    fold_layernorm: bool = True,
    names: tuple[str, str] = ("A", "B"),
    progress: bool | ProgressCallback | None = None,
    resume: str | Path | None = None,
) -> ModelChanges:
    """What changed between two models of the same shape, matrix by matrix.

    Matrices whose weights are equal bit for bit are read once and not decomposed.

    Args:
        a, b: wrapped models, or weights alone: only weights, structure and embeddings are used, never a forward pass.
        matrices: names or shell patterns; every catalogued matrix when ``None``.
        k: of how many leading directions the subspaces are compared; moved to the nearest number that cuts no group of
            near-equal sigmas.
        fold_layernorm: compare what acts on the stream, each model's own LayerNorm folded in (``WeightSVD``'s default);
            ``False`` takes raw weights.
        names: what to call the two in tables and figures.
        progress: ``True`` for a bar, ``False`` for none, or a function of (what is being done, share done); by
            default a bar in a notebook and none elsewhere.
        resume: a folder in which the row of every matrix that differs is kept, so that an interrupted run resumes. It
            is found again by a hash of the weights of both models.

    Returns:
        a ``ModelChanges``. Its ``table`` has a row for each matrix:

        - ``relative_change``: ``||B - A||_F / ||A||_F``;
        - ``change_stable_rank``, ``change_effective_rank``, ``change_leading_share``: how many directions ``B - A`` has
          (``matrix_change.sizes``), zeros where nothing changed;
        - ``spectrum_change``, ``spectrum_change_max``: the L2 norm of the sigmas' differences over that of A's sigmas,
          and the largest difference over A's largest sigma; ``spectral_norm_change``: the largest sigma's, signed;
        - ``k``, and for the left (input) and the right (output) side of the matrix, named in ``left_side`` and
          ``right_side``: ``_angle`` and ``_angle_max``, the mean and the largest principal angle in degrees
          between the leading subspaces (Golub and Van Loan, "Matrix Computations", section 6.4.3), ``_overlap``, the
          mean squared cosine of the angles, and what two random (Haar) subspaces would have: ``_haar_overlap``,
          ``k / dimension``, and ``_haar_angle``. Of a matrix that did not change the angles are 0, whatever ``k``.

    Raises:
        DtLensError: for an object that is not a wrapped model, matrices that only one model has or that differ in shape
            or in the LayerNorm before them, a ``k`` below 1, or weights that are not finite.
    """
    for model in (a, b):
        if hasattr(model, "outcomes") and hasattr(model, "compare"):
            raise DtLensError(
                f"compare takes two wrapped models, not {a_type(model)}; two evaluations are compared by "
                "edited.compare(unedited)."
            )
        require_wrapped(model, "compare", "weights", "structure")
    k = whole_number(k, "k", 1)
    if not (isinstance(names, tuple | list) and len(names) == 2 and all(isinstance(name, str) for name in names)):
        raise DtLensError(f"names is {as_written(names)}; it must be two names, such as ('before', 'after').")
    before, after = Snapshot.of(a), Snapshot.of(b)
    chosen = _comparable(before, after, matrices, fold_layernorm)
    notes = _notes(_precisions(before, after, chosen), names)
    cache = ResultCache(None if resume is None else local_path(resume, "resume"))
    weights = SameWeights(before, after)
    rows, spectra, states = [], {}, {}

    def compared(matrix: Matrix) -> tuple[tuple[bytes, bytes], dict[str, Any] | Measured]:
        *hashes, same = read.take(matrix)
        one, two = (MatrixFactors.of(lens, matrix, fold_layernorm) for lens in (before, after))
        if same:
            return (hashes[0], hashes[1]), unchanged(one, k)
        state = f"{hashes[0].hex()} {hashes[1].hex()} {before.structure.unit_offset} {after.structure.unit_offset}"
        key = f"compare {matrix_change.VERSION} {solvers.VERSION} {state} {k} {one.folded} {matrix}"
        found = cache.get(key, lambda: measure(one, two, k).tensors())
        return (hashes[0], hashes[1]), Measured.from_tensors(found)

    def size(matrix: Matrix) -> int:
        return max(factor.view(before.weights).numel() for factor in matrix.factors)

    with (
        reporting(progress) as tell,
        ReadingAhead(before, chosen, weights.states) as read,
        # Circuits side by side; closed, so that Ctrl-C does not wait for those that have not begun.
        closing(in_order(compared, chosen, size)) as results,
    ):
        for done, matrix in enumerate(chosen):
            tell(f"comparing {matrix.name}", done / len(chosen))
            states[matrix.name], found = next(results)
            if not isinstance(found, Measured):
                rows.append(found)
                continue
            rows.append(found.row)
            spectra[matrix.name] = (found.sigma_a, found.sigma_b, found.sigma_change)
    table = pd.DataFrame(rows)
    table["head"] = table["head"].astype("Int64")
    table.attrs = {"fold_layernorm": fold_layernorm, "k": k, "names": list(names)}
    return ModelChanges(table, names, fold_layernorm, spectra, notes, a, b, k, states)


@dataclass(frozen=True, eq=False)
class ModelChanges:
    """What ``compare`` found. Table and spectra are computed once; directions and labels when they are asked for.

    ``dt_lens.svd.two_models.write_page`` writes it to a folder.

    Attributes:
        table: a row per matrix; ``compare`` describes the columns.
        names: of the two models.
        folded: whether each model's LayerNorms are folded in.
        spectra: for each matrix that differs the singular values of A, of B and of ``B - A``, largest first.
        notes: what a reader should know about the pair, such as weights stored in different precisions.
    """

    table: pd.DataFrame
    names: tuple[str, str]
    folded: bool
    spectra: dict[str, tuple[Array, Array, Array]]
    notes: tuple[str, ...]
    _a: Any = field(repr=False)
    _b: Any = field(repr=False)
    _k: int = field(repr=False)
    _states: dict[str, tuple[bytes, bytes]] = field(repr=False)

    def directions(self, matrix: str, least: float = 0.5, rank: int | None = None) -> pd.DataFrame:
        """Match A's directions with B's: blocks, by the overlap of their spans on both sides.

        Args:
            matrix: one of the compared matrices.
            least: pairs with a smaller overlap count as unmatched.
            rank: match only so many leading directions of each; at most 1024 of matrices larger than that.

        Returns:
            a DataFrame ``sv_a block_a sigma_a sv_b block_b sigma_b sigma_change overlap <side>_angle <side>_angle sign
            matched``. ``sv`` is the first of ``block`` directions that cannot be distinguished; sigmas are a block's
            root mean square; ``sigma_change`` is relative; angles are the spans' largest principal angle in degrees;
            ``sign`` is -1 where the pair does the opposite to the same input. Where ``matched`` is false, one of the
            two is missing.

        Raises:
            DtLensError: for a matrix that was not compared, or that has changed since.
        """
        found = self._matrix(matrix)
        (least,) = finite_numbers([least], "least")
        rank = None if rank is None else whole_number(rank, "rank", 1)
        one, two = (leading(factors, rank or MATCHED) for factors in self._both(found))
        rows = []
        for pair in match_directions(_cut(one, rank), _cut(two, rank), least):
            sigma_a, sigma_b = (_mean_sigma(d, members) for d, members in ((one, pair.a), (two, pair.b)))
            row = {
                "sv_a": pair.a[0] if pair.a else None,
                "block_a": len(pair.a),
                "sigma_a": sigma_a,
                "sv_b": pair.b[0] if pair.b else None,
                "block_b": len(pair.b),
                "sigma_b": sigma_b,
                "sigma_change": sigma_b / sigma_a - 1,
                "overlap": pair.overlap,
                f"{found.left}_angle": pair.left_angle,
                f"{found.right}_angle": pair.right_angle,
                "sign": pair.sign,
                "matched": bool(pair.a and pair.b),
            }
            rows.append(row)
        table = pd.DataFrame(rows)
        for name in ("sv_a", "sv_b"):
            table[name] = table[name].astype("Int64")
        return table

    def change(self, matrix: str, k: int | None = None) -> Decomposition:
        """The leading ``k`` singular directions of the change ``B - A``; none where nothing changed.

        Directions that the rounding of either model's weights could cause are left out.

        Raises:
            DtLensError: for a matrix that was not compared, or that has changed since.
        """
        found, k = self._matrix(matrix), None if k is None else whole_number(k, "k", 1)
        both = self._both(found)
        factors, floor = change_factors(*both)
        if not any(bool(factor.any()) for factor in factors):
            factors = [factor[:, :0] if i == 0 else factor[:0] for i, factor in enumerate(factors)]
            d_left, d_right = factors[0].shape[0], self._width(found)
            zero = torch.zeros(0, dtype=torch.float64)
            return Decomposition(found, zero, zero.new_zeros(0, d_left), zero.new_zeros(0, d_right), self.folded, (), 0)
        svd = decompose(factors, k or self._k, floor)
        noise = [rounding_noise(one, svd.left, svd.right) for one in both]
        # A matrix of independent errors has no singular value beyond this (Vershynin, "Introduction to the
        # non-asymptotic analysis of random matrices", 2012, theorem 5.31).
        most = torch.stack(noise).norm(dim=0) * (svd.left.shape[1] ** 0.5 + svd.right.shape[1] ** 0.5)
        kept = int((svd.sigma > most).sum())
        blocks = tuple((i, i + 1) for i in range(kept))
        return Decomposition(found, svd.sigma[:kept], svd.left[:kept], svd.right[:kept], self.folded, blocks, svd.error)

    def labels(
        self,
        matrix: str,
        embedding: str,
        side: SideName | None = None,
        *,
        by: By = "subspace",
        k: int | None = None,
        n: int | None = 50,
        embeddings: Owner = "own",
    ) -> pd.DataFrame:
        """The labels that moved most, largest change first.

        Args:
            matrix: one of the compared matrices.
            embedding: one that both models have.
            side: of the matrix; by default the one that the embedding is compared with in a scan.
            by: ``"subspace"``, the length of a label's projection on the leading ``k`` directions of A and of B;
                ``"directions"``, its cosine with each of the first ``k`` directions of A and with what that direction
                is in B; ``"change"``, its cosine with the leading ``k`` directions of ``B - A``.
            k: by default the comparison's.
            n: rows at most; all when ``None``.
            embeddings: ``"own"``, each model's own directions of the labels; ``"a"``, A's for both.

        Returns:
            a DataFrame with ``label index`` and the values ``a``, ``b`` and ``change`` (for ``"change"``: ``a`` and
            ``b`` by either's labels, the larger first), for directions also ``sv_a sv_b``, for the change ``sv sigma``;
            ``label_cosine`` is the cosine of the label's own direction in A with that in B. ``table.attrs`` says whose
            embeddings were used.

        Raises:
            DtLensError: for a matrix that was not compared, or that has changed since, or an embedding or side that
                does not exist.
        """
        found = self._matrix(matrix)
        count = k or self._k
        if by == "change":
            change = self.change(matrix, count)
            pair = (change, change)
        else:
            one, two = (leading(factors, count) for factors in self._both(found))
            pair = (one, two)
        together = count if by == "change" else common_boundary(*pair, count)
        return label_changes(
            (self._a, self._b), pair, embedding, side, by=by, k=together, n=n, folded=self.folded, owner=embeddings
        )

    def plot(
        self,
        what: Literal["change", "spectra", "angles"] = "change",
        *,
        value: str = "relative_change",
        n: int = 8,
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """A figure of what changed.

        Args:
            what: ``"change"``, how much each matrix changed, by layer and kind; ``"spectra"``, how the sigmas of the
                most changed matrices moved; ``"angles"``, how far the leading subspaces turned.
            value: of ``"change"``: the column of ``table`` that is shown.
            n: of ``"spectra"``: how many matrices at most.
            title: of the figure, in place of its own.
            width, height: of the figure in pixels, in place of its own; one without a width is as wide as the page.

        Returns:
            a plotly ``Figure``.

        Raises:
            DtLensError: for another ``what``, a column that the table lacks or that holds no numbers, or an option out
                of range.
        """
        from dt_lens.svd.two_models import figures

        require_word(what, "what", ("change", "spectra", "angles"))
        most = whole_number(n, "n", 1)
        if what == "spectra":
            title = titled(title, "How the singular values moved")
            made = figures.spectra_shift(self.spectra, names=self.names, most=most, title=title)
        elif what == "angles":
            made = figures.angle_heatmap(self.table, title=titled(title, "How far the leading subspaces turned"))
        else:
            numbers = [str(name) for name in self.table if pd.api.types.is_float_dtype(self.table[name])]
            require_word(value, "value", numbers)
            title = titled(title, "How much every matrix changed")
            made = figures.change_heatmap(self.table, value=value, title=title)
        return sized(made, width, height)

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.table.copy()

    def most_changed(self, count: int = 10) -> pd.DataFrame:
        """The rows of largest relative change."""
        return most_changed(self.table, whole_number(count, "count", 0))

    def embeddings_of_both(self, side: SideName) -> list[str]:
        """The embeddings that both models have and that are compared with a side by default."""
        try:
            one, two = self._a.embeddings, self._b.embeddings
        except AttributeError:
            return []
        return [name for name in one if name in two and is_natural(one[name], side)]

    def __repr__(self) -> str:
        changed = int((self.table["relative_change"] > 0).sum())
        lines = [
            f"ModelChanges of {self.names[0]} and {self.names[1]}: {changed} of {len(self.table)} matrices changed"
        ]
        shown = self.most_changed(5)
        lines += [f"  {name}  {size:.3g}" for name, size in zip(shown["matrix"], shown["relative_change"], strict=True)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return notebook_html(self.table, self.names, self.notes)

    def _lenses(self) -> tuple[Snapshot, Snapshot]:
        return Snapshot.of(self._a), Snapshot.of(self._b)

    def _matrix(self, name: str) -> Matrix:
        lenses = self._lenses()
        matrix = find_matrix(lenses[0], name)
        if name not in self._states:
            raise DtLensError(f"{name} was not compared; call compare with it among the matrices.")
        if tuple(fingerprint(lens, matrix) for lens in lenses) != self._states[name]:
            raise DtLensError(f"The weights of {name} have changed since they were compared; call compare again.")
        return matrix

    def _both(self, matrix: Matrix) -> tuple[MatrixFactors, MatrixFactors]:
        one, two = (MatrixFactors.of(lens, matrix, self.folded) for lens in self._lenses())
        return one, two

    def _width(self, matrix: Matrix) -> int:
        return int(matrix.factors[-1].view(self._lenses()[0].weights).shape[1])


def _comparable(a: Snapshot, b: Snapshot, patterns: Names | None, fold: bool) -> list[Matrix]:
    chosen, others = select_matrices(a, patterns), catalogue(b, per_head=True)
    known = catalogue(a, per_head=True)
    missing = [m.name for m in chosen if m.name not in others]
    missing_in = "second"
    if not missing and patterns is None:
        missing, missing_in = [name for name in others if name not in known], "first"
    if missing:
        raise DtLensError(
            f"The {missing_in} model has no matrix {missing[0]!r}; compare models of the same shape, or name matrices "
            "that both have."
        )
    for matrix in chosen:
        norms = [(m.left_norm is None, m.right_norm is None, m.rms) for m in (matrix, others[matrix.name])]
        if fold and norms[0] != norms[1]:
            raise DtLensError(
                f"{matrix.name} reads through different norms in the two models; compare with fold_layernorm=False."
            )
    return chosen


def _precisions(a: Snapshot, b: Snapshot, chosen: Sequence[Matrix]) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """The dtypes of the weights that are compared, in A and in B.

    Raises:
        DtLensError: for weights of different shapes.
    """
    kinds: tuple[set[torch.dtype], set[torch.dtype]] = (set(), set())
    for name in dict.fromkeys(factor.weight for matrix in chosen for factor in matrix.factors):
        one, two = a.weights[name], b.weights[name]
        if one.shape != two.shape:
            raise DtLensError(
                f"{name} is {list(one.shape)} in the first model and {list(two.shape)} in the second; only models of "
                "the same shape can be compared."
            )
        kinds[0].add(one.dtype)
        kinds[1].add(two.dtype)
    return kinds


def _notes(kinds: tuple[set[torch.dtype], set[torch.dtype]], names: tuple[str, str]) -> tuple[str, ...]:
    if kinds[0] == kinds[1]:
        return ()
    coarse = max(torch.finfo(kind).eps for kind in kinds[0] | kinds[1])
    said = [" and ".join(sorted(str(kind).removeprefix("torch.") for kind in some)) for some in kinds]
    # Rounding leaves an error of variance ulp^2 / 12: 0.2 eps, relative, over a logarithmically uniform mantissa.
    note = f"{names[0]} is stored as {said[0]} and {names[1]} as {said[1]}: rounding alone makes a relative change of "
    return (f"{note}about {0.2 * coarse:.0e}.",)


def _cut(found: Decomposition, rank: int | None) -> Decomposition:
    """The leading blocks that reach up to ``rank``."""
    if rank is None or rank >= len(found.sigma):
        return found
    stop = found.block_of(rank - 1)[1]
    blocks = tuple(block for block in found.blocks if block[1] <= stop)
    parts = found.sigma[:stop], found.left[:stop], found.right[:stop]
    outside = None if found.outside is None else found.outside[:stop]
    return Decomposition(found.matrix, *parts, found.folded, blocks, found.error, outside=outside)


def _mean_sigma(found: Decomposition, members: tuple[int, ...]) -> float:
    return float(found.sigma[list(members)].square().mean().sqrt()) if members else float("nan")
