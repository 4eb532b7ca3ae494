"""Edit one singular direction of one matrix, and undo it bit for bit.

An edit replaces a singular vector: ``sigma u v^T`` becomes ``sigma u' v^T`` or ``sigma u v'^T``. That is a rank-one
change, which is added to the weight; the matrix is not rebuilt from its decomposition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dt_lens.arguments import require_activations, truth_value, whole_number, whole_numbers
from dt_lens.edits.control import Control
from dt_lens.edits.edit import Edit
from dt_lens.edits.low_rank import carry, remarks_on
from dt_lens.edits.replacements import Replacements, Value
from dt_lens.edits.state import state_of, unedited
from dt_lens.edits.written import SV, highest_sv, parse_value, resolve_sv
from dt_lens.errors import DtLensError, a_type
from dt_lens.lens.activations import Activations, LowRank
from dt_lens.lens.matrices import RESIDUAL, Matrix, MatrixFactors, SideName, Snapshot, find_matrix
from dt_lens.lens.protocol import Lens, require_running
from dt_lens.lens.weights import fingerprint
from dt_lens.svd.decomposition import Decomposition, decompose_matrix
from dt_lens.svd.weighted import decompose_weighted

__all__ = ["SingularEdit", "load_edit"]


class SingularEdit(Edit):
    """Replace singular vectors of a matrix inside ``with``, and restore the weights bit for bit on exit.

    With ``fold_layernorm`` the directions are those of the matrix with the LayerNorm in front of it folded in, as in a
    ``WeightSVD``, and the change is carried back to the raw weight by ``diag(1/w)``. As with any edit of the raw
    weight, what the LayerNorm's bias sends along an edited direction changes too.

    Args:
        model: a wrapped model.
        matrix: a catalogued name, such as ``"blocks.0.mlp.W_in"`` or ``"blocks.2.attn.OV.0"``.
        sv: which singular directions, largest sigma first: an index, a list, a slice, or text such as ``"0-3"`` (both
            ends included) or ``"0,2,-1"``; negative ones count from the smallest. They are those of the unedited
            matrix, also inside another edit.
        side: the side whose vector is replaced; by default the matrix's only side on the residual stream (OV and QK
            have two, so it must be given).
        value: what the unit vector becomes: ``"constant"`` (every entry 1/d, the edit this project grew from),
            ``"zero"`` (the direction is removed), ``"flip"``, ``"random"`` (a random unit vector; ``seed=``), a float
            (scales sigma), or a vector ``[d]``. On a folded side the vector's mean is dropped: the LayerNorm would
            remove it, and the constant edit is a removal there. On a side that faces the residual stream it can also
            be a direction of one of the model's embeddings: ``("action_out", "thigh")`` or ``{"replace":
            ["action_out", "thigh"]}`` puts that unit vector in its place; ``("action_out", "thigh", 30)`` or
            ``{"towards": ["action_out", "thigh"], "angle": 30}`` turns the vector by 30 degrees in the plane of the
            two, towards the direction and past it, or away from it with a negative angle. A label may be a row's
            number. All of them may be text, as on the command line: ``"0.5"``, ``"replace:action_out:thigh"``,
            ``"towards:action_out:thigh:30"``, or the JSON of a mapping. The embedding's nearer pole is used, at most 90
            degrees away; its effective direction with ``fold_layernorm``, as in a ``WeightSVD``, else the raw one.
        head: one head's own ``W_Q``, ``W_K``, ``W_V`` or ``W_O``, or which head's ``OV`` or ``QK``.
        seed: of ``value="random"``.
        fold_layernorm: whether directions are those of the folded matrix.
        decomposition: the matrix's ``Decomposition``, to save computing it again.
        activations: edit the directions along which the output varies most on these real inputs, as in a ``WeightSVD``
            with the same activations: ``M`` is the sum of ``(M v_i) v_i^T`` over the output's principal axes ``v_i``,
            and removing a direction leaves ``M - (M v_i) v_i^T``. See ``dt_lens.svd.weighted``.

    Attributes:
        matrix, sv, side, value, seed: the arguments, with ``sv`` as a list of indices and the matrix as catalogued.
        sigma: the sigmas of the edited directions; with ``activations`` the output's standard deviations along them.
        activations: the digest of the activations by which directions are weighted, or an empty string.
        folded: whether a LayerNorm is folded in.
        note: what a reader of the result should know, or an empty string.

    Raises:
        DtLensError: for an unknown matrix, a direction or side that does not exist, a value that is none of the above,
            a decomposition of something else, or a change that cannot be carried back through the LayerNorm.
    """

    def __init__(
        self,
        model: Lens,
        matrix: str,
        sv: SV | slice = 0,
        *,
        side: SideName | None = None,
        value: Value | str | float | Tensor | Sequence[Any] | Mapping[str, Any] = "constant",
        head: int | None = None,
        seed: int = 0,
        fold_layernorm: bool = True,
        decomposition: Decomposition | None = None,
        activations: Activations | None = None,
    ) -> None:
        require_running(model, "SingularEdit")
        fold_layernorm = truth_value(fold_layernorm, "fold_layernorm")
        with state_of(model).lock:  # another thread may be writing these weights
            self._make(model, matrix, sv, side, value, head, seed, fold_layernorm, decomposition, activations)

    def _make(
        self,
        model: Lens,
        matrix: str,
        sv: SV | slice,
        side: SideName | None,
        value: Any,
        head: int | None,
        seed: int,
        fold_layernorm: bool,
        decomposition: Decomposition | None,
        activations: Activations | None,
    ) -> None:
        bare = unedited(model)
        found = find_matrix(bare, matrix, head)
        where = found.side(side)
        side = found.left if where == "left" else found.right
        factors = MatrixFactors.of(bare, found, fold_layernorm)
        self.folded = factors.folded
        if activations is not None:
            require_activations(activations)
        self.seed = whole_number(seed, "seed", -(2**63), 2**63 - 1)
        self.activations = "" if activations is None else activations.digest
        if isinstance(value, str):
            value = parse_value(value, model.embeddings)[1]
        rank = _rank_for(highest_sv(sv) if isinstance(sv, str) else sv)
        if decomposition is None:
            decomposition = _decomposed(model, factors, rank, activations)
        else:
            _require_fit(decomposition, factors, self.activations, whole=rank is None)
        k = len(decomposition.sigma)
        chosen = _indices(resolve_sv(sv, k, found.name) if isinstance(sv, str) and k else sv, k, found.name)
        rows = torch.tensor(chosen, device=decomposition.sigma.device)
        sigma, strength = decomposition.sigma[rows], decomposition.strength[rows]
        left, right = decomposition.left[rows], decomposition.right[rows]
        old = left if where == "left" else right
        made = Replacements(
            model.embeddings,
            folded=fold_layernorm,
            centred=self.folded and found.centred(where),
            residual=side in RESIDUAL,
            seed=self.seed,
        )
        self.value: Value | float | list[float] | dict[str, Any]
        new, self.value = made.of(value, old)
        # An embedding's raw and effective directions differ also where there is no LayerNorm to fold.
        self._fold_layernorm = fold_layernorm if isinstance(self.value, dict) else self.folded or not found.foldable
        step = (new - old) * strength[:, None]
        change: LowRank = (step.T, right) if where == "left" else (left.T, step)
        super().__init__(model, found, side, chosen, *carry(factors, where, change))
        self.sigma: list[float] = sigma.tolist()
        self.blocks = sorted({decomposition.block_of(i) for i in self.sv})
        sizes = {i: (block := decomposition.block_of(i))[1] - block[0] for i in self.sv}
        self._outside = {i: decomposition.indistinct(i, side) - size for i, size in sizes.items()}
        self.note = " ".join(self._remarks(bare, where))

    def _remarks(self, bare: Snapshot, where: Literal["left", "right"]) -> list[str]:
        remarks = []
        if self.value == "constant" and self.matrix.centred(where):
            how = "is a removal" if self.folded else "is nearly a removal"
            remarks.append(
                f"The LayerNorm before {self.matrix.name} removes constants from what it reads, so on the {self.side} "
                f"side the constant edit {how}."
            )
        elif self.value == "constant" and self.side == "write" and _constants_are_unseen(bare, self.matrix):
            remarks.append(
                f"Whatever reads what {self.matrix.name} writes does so through a LayerNorm, which removes constants, "
                "so the constant edit acts as a removal here too."
            )
        cut = [block for block in self.blocks if block[1] - block[0] > 1 and not set(range(*block)) <= set(self.sv)]
        if cut:
            remarks.append(
                f"Directions {cut[0][0]} to {cut[0][1] - 1} cannot be distinguished at the weights' precision; only "
                "editing all of them means anything."
            )
        loose = [sv for sv in self.sv if self._outside[sv]]
        if loose:
            remarks.append(
                f"Rounding of the weights may turn direction {loose[0]} on the {self.side} side out of all directions "
                "that the matrix has, so what is edited there may be none of them."
            )
        return remarks + remarks_on(bare, self.matrix, self._placed)

    @property
    def _counted(self) -> tuple[Matrix, bool, str]:
        """What ``sv`` is an index into: the directions of this matrix, folded or not, weighted or not."""
        return self.matrix, self.folded, self.activations

    def _refuse_overlap(self, edits: Sequence[Edit]) -> None:
        for other in edits:
            # The raw matrix, the folded one and each weighting have directions of their own.
            if not isinstance(other, SingularEdit) or other._counted != self._counted:
                continue
            if set(other.sv) & set(self.sv):
                shared = min(set(other.sv) & set(self.sv))
                raise DtLensError(
                    f"Direction {shared} of {self.matrix.name} is already being edited; end that edit first."
                )

    def control(self, seed: int = 0, activations: Activations | None = None) -> Control:
        """A random edit of the same energy and rank at the same place: same singular values, random vectors.

        With ``activations`` it has the same output energy on real inputs too; see ``Control``.
        """
        return Control(self, seed, activations)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "singular",
            "matrix": self.matrix.name,
            "sv": self.sv,
            "side": self.side,
            "value": self.value,
            "seed": self.seed,
            "fold_layernorm": self._fold_layernorm,
            **({"activations": self.activations} if self.activations else {}),
        }

    @classmethod
    def from_dict(cls, model: Lens, record: Mapping[str, Any], activations: Activations | None = None) -> Edit:
        """The edit that a ``to_dict`` record describes, on ``model``; a control's record gives the control.

        Raises:
            DtLensError: for a record that is malformed, does not fit the model, or was made with other activations.
        """
        return load_edit(model, record, activations)

    def __repr__(self) -> str:
        value = self.value if isinstance(self.value, (str, float, dict)) else "vector"
        weighted = f"activations={self.activations}, " if self.activations else ""
        return (
            f"SingularEdit({self.matrix.name}, sv={self.sv}, side={self.side!r}, value={value!r}, {weighted}"
            f"energy={self.energy:.4g})"
        )


def load_edit(model: Lens, record: Mapping[str, Any], activations: Activations | None = None) -> Edit:
    """The edit or control that a ``to_dict`` record describes, on ``model``.

    Args:
        model: a wrapped model.
        record: the record.
        activations: those that the record was made with, if any; it names them by their digest.

    Raises:
        DtLensError: for a record that is malformed, does not fit the model, or was made with other activations.
    """
    try:
        kind = record["kind"]
        if kind == "control":
            of = _singular(model, record["of"], activations)
            return Control(of, record["seed"], _activations_of(record, activations))
        if kind == "singular":
            return _singular(model, record, activations)
    except (KeyError, TypeError, IndexError) as error:
        raise DtLensError(f"Not an edit record: {error} is missing or wrong; records come from to_dict().") from error
    raise DtLensError(f"Unknown kind of edit {kind!r}; known are singular and control.")


def _activations_of(record: Mapping[str, Any], activations: Activations | None) -> Activations | None:
    """The activations that a record was made with, if any; ``activations`` must be those."""
    digest = record.get("activations")
    if digest is None:
        return None
    if activations is None or activations.digest != digest:
        have = "none were given" if activations is None else f"these are {activations.digest}"
        raise DtLensError(
            f"The record is of an edit made with the activations {digest}, and {have}; load them with Activations.load."
        )
    return activations


def _singular(model: Lens, record: Mapping[str, Any], activations: Activations | None) -> SingularEdit:
    names = ("side", "value", "seed", "fold_layernorm")
    options = {name: record[name] for name in names} | {"activations": _activations_of(record, activations)}
    return SingularEdit(model, record["matrix"], record["sv"], **options)


def _rank_for(sv: Any) -> int | None:
    """How many directions to compute in order to edit ``sv`` and to know its neighbours; ``None`` for all."""
    chosen = list(sv) if isinstance(sv, Sequence) and not isinstance(sv, str) else [sv]
    if all(isinstance(i, int) and i >= 0 for i in chosen):
        # A power of two, so that edits in a series share one decomposition.
        return 1 << (max(chosen, default=0) + 8).bit_length()
    return None


def _decomposed(
    model: Lens, factors: MatrixFactors, rank: int | None, activations: Activations | None
) -> Decomposition:
    state, matrix = state_of(model), factors.matrix
    key = (matrix, rank, factors.folded, fingerprint(factors.lens, matrix), activations and activations.digest)
    if state.decomposed is None or state.decomposed[0] != key:
        if activations is None:
            made = decompose_matrix(factors, rank)
        else:
            made = decompose_weighted(factors, activations, rank)
        state.decomposed = (key, made)
    return state.decomposed[1]


def _require_fit(given: Decomposition, made_of: MatrixFactors, activations: str, whole: bool) -> None:
    """Check that a decomposition given by the user is that of these weights; of all directions if ``whole``."""
    if not isinstance(given, Decomposition):
        raise DtLensError(f"decomposition is {a_type(given)}; it must be what WeightSVD gives for a matrix.")
    matrix, folded = made_of.matrix, made_of.folded
    if given.activations != activations:
        have = f"weighted by the activations {given.activations}" if given.activations else "plain"
        want = f"the activations {activations}" if activations else "none"
        raise DtLensError(f"The decomposition of {matrix.name} is {have}, and the edit was given {want}.")
    if given.matrix != matrix or given.folded != folded:
        have = f"{given.matrix.name} ({'folded' if given.folded else 'raw'})"
        raise DtLensError(
            f"The decomposition is of {have}; the edit is of {matrix.name} ({'folded' if folded else 'raw'})."
        )
    factors = made_of.effective()
    image, strength = given.right.T, given.strength
    for factor in reversed(factors):
        image = factor.to(image) @ image
    size = float(strength.max()) if len(strength) else 0.0
    # The directions of a large matrix in low precision are only as exact as their own error says.
    fits = max(1e-7, 2 * given.error)
    if not bool(torch.allclose(image, given.left.T * strength, rtol=0, atol=fits * size)):
        raise DtLensError(f"The decomposition of {matrix.name} is of other weights; leave it out.")
    if whole and not activations:
        M = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
        if float((M - image @ given.right.to(M)).norm()) > 1e-7 * size:
            raise DtLensError(
                f"The decomposition holds only the first {len(given.sigma)} directions of {matrix.name}, so sv cannot "
                "count from the last; leave it out."
            )


def _indices(sv: Any, k: int, name: str) -> list[int]:
    if k == 0:
        raise DtLensError(f"{name} is zero: it has no singular direction to edit.")
    try:
        chosen = list(range(k))[sv] if isinstance(sv, slice) else whole_numbers(sv, "sv")
    except (DtLensError, TypeError, ValueError):
        raise DtLensError(f"sv is {sv!r}; it must be an index, a list of indices or a slice.") from None
    if not chosen:
        raise DtLensError(f"sv={sv!r} chooses no direction of {name}; it has {k}, 0 to {k - 1}.")
    for i in chosen:
        if not -k <= i < k:
            raise DtLensError(f"sv={i} is out of range: {name} has {k} directions, 0 to {k - 1}.")
    chosen = [i % k for i in chosen]
    if len(set(chosen)) != len(chosen):
        raise DtLensError(f"sv={sv!r} names a direction twice; give each once.")
    return chosen


def _constants_are_unseen(bare: Snapshot, matrix: Matrix) -> bool:
    """Whether nothing reads a constant vector that the matrix writes: everything later centres its input."""
    structure, weights, layer = bare.structure, bare.weights, matrix.layer
    own = structure.mlp_norm[layer] if matrix.kind == "W_out" else structure.attn_norm[layer]
    if own is None:
        # No LayerNorm in front of the sublayer: if there is one, it comes after the sum.
        return f"blocks.{layer}.{'ln2' if matrix.kind == 'W_out' else 'ln1'}.w" in weights
    if structure.rms:
        return False
    later = [*structure.attn_norm[layer + 1 :], *structure.mlp_norm[layer + (matrix.kind == "W_out") :]]
    return None not in later and "ln_final.w" in weights
