"""Edit one singular direction of one matrix, and undo it bit for bit.

An edit replaces a singular vector: ``sigma u v^T`` becomes ``sigma u' v^T`` or ``sigma u v'^T``. That is a change of
rank one, added to the weight; nothing is rebuilt from the full decomposition.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dt_lens.changes import Edit, LowRank, Placed, spectrum_of, state_of, unedited
from dt_lens.directions import Decomposition, decompose_matrix
from dt_lens.errors import DtLensError, nearest
from dt_lens.matrices import Matrix, SideName, Snapshot, find_matrix, fingerprint, unfold

if TYPE_CHECKING:
    from dt_lens.lens import Lens

__all__ = ["Control", "Edit", "SingularEdit", "load_edit"]

Value = Literal["constant", "zero", "flip", "random"]
VALUES: tuple[str, ...] = ("constant", "zero", "flip", "random")


class SingularEdit(Edit):
    """Replace singular vectors of a matrix inside ``with``, and restore the weights bit for bit on the way out.

    With ``fold_layernorm`` the directions are those of the matrix with the LayerNorm in front of it folded in, as in a
    ``WeightSVD``, and the change is carried back to the raw weight, ``diag(1/w)``. What the LayerNorm's bias sends
    along an edited direction changes with it, as in any edit of the raw weight.

    Args:
        model: a wrapped model.
        matrix: a catalogued name, ``"blocks.0.mlp.W_in"``, ``"blocks.2.attn.OV.0"``.
        sv: which singular directions, largest sigma first: an index, a list or a slice. The count is that of the
            unedited matrix, also inside another edit.
        side: the side whose vector is replaced; by default the matrix's only side on the residual stream (OV and QK
            need it said).
        value: what the unit vector becomes: ``"constant"`` (every entry 1/d, the edit this project grew from),
            ``"zero"`` (the direction is removed), ``"flip"``, ``"random"`` (a random unit vector; ``seed=``), a float
            (scales sigma), or a vector ``[d]``. On a folded side the vector's mean is dropped: the LayerNorm would
            remove it, and the constant edit is a removal there.
        head: one head's own ``W_Q``, ``W_K``, ``W_V`` or ``W_O``, or which head's ``OV`` or ``QK``.
        seed: of ``value="random"``.
        fold_layernorm: whether directions are those of the folded matrix.
        decomposition: the matrix's ``Decomposition``, to save computing it again.

    Attributes:
        matrix, sv, side, value, seed: what was asked for, ``sv`` as a list of indices, the matrix as catalogued.
        sigma: the sigmas of the edited directions.
        folded: whether a LayerNorm is folded in.
        note: what a reader of the result has to know, or an empty string.

    Raises:
        DtLensError: for an unknown matrix, a direction or side that it has not, a value that is none of the above, a
            decomposition of something else, or a change that cannot be carried back through the LayerNorm.
    """

    def __init__(
        self,
        model: Lens,
        matrix: str,
        sv: int | Sequence[int] | slice = 0,
        *,
        side: SideName | None = None,
        value: Value | float | Tensor | Sequence[float] = "constant",
        head: int | None = None,
        seed: int = 0,
        fold_layernorm: bool = True,
        decomposition: Decomposition | None = None,
    ) -> None:
        if not hasattr(model, "structure") or not hasattr(model, "weights"):
            raise DtLensError(
                f"SingularEdit takes a wrapped model, not a {type(model).__name__}; call dt_lens.wrap or dt_lens.load "
                "first."
            )
        if getattr(model, "weights_only", False):
            raise DtLensError(
                "This model was opened for its weights only and cannot run; use dt_lens.load for one to edit."
            )
        bare = unedited(model)
        found = find_matrix(bare, matrix, head)
        where = found.side(side)
        self.side: SideName = found.left if where == "left" else found.right
        self.folded = fold_layernorm and found.foldable
        self.seed = _whole(seed, "seed")
        if decomposition is None:
            decomposition = _decomposed(model, bare, found, _rank_for(sv), fold_layernorm)
        else:
            _require_fit(decomposition, bare, found, self.folded)
        self.sv = _indices(sv, len(decomposition.sigma), found.name)
        rows = torch.tensor(self.sv, device=decomposition.sigma.device)
        sigma, left, right = (part[rows] for part in (decomposition.sigma, decomposition.left, decomposition.right))
        old = left if where == "left" else right
        self.value: Value | float | list[float]
        new, self.value = _replacement(value, old, self.seed, self.folded and found.centred(where))
        step = (new - old) * sigma[:, None]
        change: LowRank = (step.T, right) if where == "left" else (left.T, step)
        super().__init__(model, found, *_carry(bare, found, where, change, self.folded))
        self.sigma: list[float] = sigma.tolist()
        self.blocks = sorted({decomposition.block_of(i) for i in self.sv})
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
                f"Directions {cut[0][0]} to {cut[0][1] - 1} cannot be told apart at the weights' precision; only "
                "editing all of them means anything."
            )
        placed, shared = self._placed.factor, bare.structure.queries_per_key
        if self.matrix.kind in ("OV", "QK") and shared > 1 and placed.weight.endswith(("W_K", "W_V")):
            first = (self.matrix.head or 0) // shared * shared
            remarks.append(
                f"Heads {first} to {first + shared - 1} share {placed.weight.rpartition('.')[2]}, so the edit changes "
                "what all of them do."
            )
        lost = _lost_to_rounding(bare, self._placed)
        if lost > 0.1:
            remarks.append(f"Rounding to the weights' precision alters the change by {lost:.0%} of its size.")
        return remarks

    def _refuse_overlap(self, edits: Sequence[Edit]) -> None:
        for other in edits:
            if isinstance(other, SingularEdit) and other.matrix == self.matrix and set(other.sv) & set(self.sv):
                shared = min(set(other.sv) & set(self.sv))
                raise DtLensError(
                    f"Direction {shared} of {self.matrix.name} is being edited already; end that edit first."
                )

    def control(self, seed: int = 0) -> Control:
        """A random edit of the same energy and rank at the same place: same singular values, random vectors."""
        return Control(self, seed)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "singular",
            "matrix": self.matrix.name,
            "sv": self.sv,
            "side": self.side,
            "value": self.value,
            "seed": self.seed,
            "fold_layernorm": self.folded or not self.matrix.foldable,
        }

    @classmethod
    def from_dict(cls, model: Lens, record: Mapping[str, Any]) -> Edit:
        """The edit that a ``to_dict`` record describes, on ``model``; a control's record gives the control.

        Raises:
            DtLensError: for a record that is none, or does not fit the model.
        """
        return load_edit(model, record)

    def __repr__(self) -> str:
        value = self.value if isinstance(self.value, (str, float)) else "vector"
        return (
            f"SingularEdit({self.matrix.name}, sv={self.sv}, side={self.side!r}, value={value!r}, "
            f"energy={self.energy:.4g})"
        )


class Control(Edit):
    """A random edit of the same energy and rank at the same place as ``edit``; a function of the edit and the seed.

    The change of the raw matrix keeps its singular values; its singular vectors are Haar-random in the space that the
    edited weight can reach: everything, or for a circuit, which is edited through one factor, what the other factor
    leaves open. It tells how much of an effect comes from changing anything at all by that much. Two edits of different
    directions get different draws from one seed.

    Attributes:
        of: the edit whose control this is.
        seed: which draw.
    """

    def __init__(self, edit: SingularEdit, seed: int = 0) -> None:
        self.of = edit
        self.seed = _whole(seed, "seed")
        bare = unedited(edit.model)
        matrix, where = edit.matrix, edit.matrix.side(edit.side)
        spectrum = spectrum_of(edit.delta)
        spectrum = spectrum[spectrum > spectrum[0] * 1e-12]
        factors = matrix.raw(bare)
        left_space = factors[0] if len(factors) == 2 and where == "right" else None
        right_space = factors[1].T if len(factors) == 2 and where == "left" else None
        place = f"{self.seed} {matrix.name} {edit.side} {edit.sv}"
        drawn = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=7).digest())
        generator = torch.Generator().manual_seed(drawn)
        left = _random_frame(len(edit.delta[0]), len(spectrum), left_space, generator).to(spectrum)
        right = _random_frame(len(edit.delta[1].T), len(spectrum), right_space, generator).to(spectrum)
        super().__init__(edit.model, matrix, *_carry(bare, matrix, where, (left * spectrum, right.T), folded=False))

    def control(self, seed: int = 0) -> Control:
        """Another control of the same edit."""
        return Control(self.of, seed)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "control", "seed": self.seed, "of": self.of.to_dict()}

    def __repr__(self) -> str:
        return f"Control(seed={self.seed}, energy={self.energy:.4g}, of={self.of!r})"


def load_edit(model: Lens, record: Mapping[str, Any]) -> Edit:
    """The edit that a record of ``to_dict`` describes, on ``model``.

    Raises:
        DtLensError: for a record that is none, or does not fit the model.
    """
    try:
        kind = record["kind"]
        if kind == "control":
            return Control(_singular(model, record["of"]), record["seed"])
        if kind == "singular":
            return _singular(model, record)
    except (KeyError, TypeError, IndexError) as error:
        raise DtLensError(
            f"This is no record of an edit: {error} is missing or wrong; records come from to_dict()."
        ) from error
    raise DtLensError(f"Unknown kind of edit {kind!r}; known are singular and control.")


def _singular(model: Lens, record: Mapping[str, Any]) -> SingularEdit:
    names = ("side", "value", "seed", "fold_layernorm")
    return SingularEdit(model, record["matrix"], record["sv"], **{name: record[name] for name in names})


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise DtLensError(f"{name} is {value!r}; it must be a whole number.")
    return operator.index(value)


def _rank_for(sv: Any) -> int | None:
    """How many directions have to be known to edit ``sv`` and to see who its neighbours are; ``None`` for all."""
    chosen = list(sv) if isinstance(sv, Sequence) and not isinstance(sv, str) else [sv]
    if all(isinstance(i, int) and i >= 0 for i in chosen):
        # In steps of powers of two, so that edits in a series share one decomposition.
        return 1 << (max(chosen, default=0) + 8).bit_length()
    return None


def _decomposed(model: Lens, bare: Snapshot, matrix: Matrix, rank: int | None, fold_layernorm: bool) -> Decomposition:
    state = state_of(model)
    key = (matrix, rank, fold_layernorm, fingerprint(bare, matrix))
    if state.decomposed is None or state.decomposed[0] != key:
        state.decomposed = (key, decompose_matrix(bare, matrix, rank, fold_layernorm))
    return state.decomposed[1]


def _require_fit(given: Decomposition, bare: Snapshot, matrix: Matrix, folded: bool) -> None:
    """A decomposition that the user hands over must be that of these weights."""
    if given.matrix != matrix or given.folded != folded:
        have = f"{given.matrix.name} ({'folded' if given.folded else 'raw'})"
        raise DtLensError(
            f"The decomposition is that of {have}; the edit is of {matrix.name} ({'folded' if folded else 'raw'})."
        )
    image = given.right.T
    for factor in reversed(matrix.folded(bare) if folded else matrix.raw(bare)):
        image = factor.to(image) @ image
    if not bool(torch.allclose(image, given.left.T * given.sigma, rtol=0, atol=1e-7 * float(given.sigma[:1].sum()))):
        raise DtLensError(f"The decomposition of {matrix.name} is that of other weights; leave it out.")


def _indices(sv: Any, k: int, name: str) -> list[int]:
    if k == 0:
        raise DtLensError(f"{name} is zero: it has no singular direction to edit.")
    if isinstance(sv, slice):
        chosen = list(range(k))[sv]
    else:
        many = not isinstance(sv, str) and np.ndim(sv) == 1
        try:
            chosen = [_whole(i, "sv") for i in (sv if many else [sv])]
        except DtLensError:
            raise DtLensError(f"sv is {sv!r}; it must be an index, a list of indices or a slice.") from None
    if not chosen:
        raise DtLensError(f"sv={sv!r} chooses no direction of {name}, which has {k}.")
    for i in chosen:
        if not -k <= i < k:
            raise DtLensError(f"sv={i} is out of range: {name} has {k} directions, 0 to {k - 1}.")
    chosen = [i % k for i in chosen]
    if len(set(chosen)) != len(chosen):
        raise DtLensError(f"sv={sv!r} names a direction twice; give each once.")
    return chosen


def _replacement(
    value: Any, old: Float[Tensor, "k d"], seed: int, centred: bool
) -> tuple[Float[Tensor, "k d"], Value | float | list[float]]:
    """The vectors that take the place of ``old``, without a mean where ``centred``; and the value for a record."""
    new, kept = _wanted(value, old, seed)
    if centred and kept == "constant":
        new = torch.zeros_like(old)  # to the last bit
    elif centred and (kept == "random" or isinstance(kept, list)):
        new = new - new.mean(1, keepdim=True)
    if kept == "random":
        new = new / new.norm(dim=1, keepdim=True)
    return new, kept


def _wanted(value: Any, old: Float[Tensor, "k d"], seed: int) -> tuple[Tensor, Any]:
    k, d = old.shape
    if isinstance(value, str):
        if value not in VALUES:
            raise DtLensError(
                f"value is {value!r}; it must be one of {', '.join(VALUES)}, a number, or a vector of {d} numbers."
                + nearest(value, VALUES)
            )
        if value == "random":
            return torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(old), value
        made = {"constant": torch.full_like(old, 1 / d), "zero": torch.zeros_like(old), "flip": -old}
        return made[value], value
    try:
        given = torch.as_tensor(value).detach()
        vector = torch.as_tensor(value, dtype=None if given.is_complex() else torch.float64).detach().to(old.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DtLensError(
            f"value is a {type(value).__name__}; it must be one of {', '.join(VALUES)}, a number, or a vector."
        ) from error
    if given.dtype == torch.bool or given.is_complex() or tuple(vector.shape) not in ((), (d,)):
        raise DtLensError(
            f"value holds {given.dtype} numbers of shape {list(vector.shape)}; it must be one of {', '.join(VALUES)}, "
            f"a real number, or a vector of {d} real numbers, the size of this side."
        )
    if not bool(torch.isfinite(vector).all()):
        raise DtLensError("value holds NaN or infinite numbers; all must be finite.")
    return (vector.expand(k, d) if vector.ndim else old * vector), vector.tolist()


def _carry(
    bare: Snapshot, matrix: Matrix, where: Literal["left", "right"], change: LowRank, folded: bool
) -> tuple[LowRank, Placed]:
    """A change of the (folded) matrix as a change of the raw matrix and of the one weight that makes it.

    A circuit ``A B`` is edited in one factor: ``B += pinv(A) delta`` for the right side, ``A += delta pinv(B)`` for the
    left one. Both are exact, because the side that stays lies in the span of the factor that stays.
    """

    def raw_left() -> Tensor:
        norm = matrix.left_norm if folded else None
        return change[0] if norm is None else unfold(change[0], bare.weights[f"{norm}.w"], norm)

    def raw_right() -> Tensor:
        norm = matrix.right_norm if folded else None
        return change[1] if norm is None else unfold(change[1].T, bare.weights[f"{norm}.w"], norm).T

    if len(matrix.factors) == 1:
        delta = raw_left(), raw_right()
        return delta, Placed(matrix.factors[0], *delta)
    # Through the factor that stays, as the stream meets it; the raw matrix changes by the raw factor times the same.
    raw, seen = matrix.raw(bare), matrix.folded(bare) if folded else matrix.raw(bare)
    if where == "right":
        placed = Placed(matrix.factors[1], torch.linalg.pinv(seen[0]) @ change[0], raw_right())
        return (raw[0] @ placed.left, placed.right), placed
    placed = Placed(matrix.factors[0], raw_left(), change[1] @ torch.linalg.pinv(seen[1]))
    return (placed.left, placed.right @ raw[1]), placed


def _random_frame(d: int, r: int, space: Tensor | None, generator: torch.Generator) -> Float[Tensor, "d r"]:
    """``r`` Haar-random orthonormal vectors of ``d`` dimensions, or of the column space of ``space``."""
    basis = torch.eye(d, dtype=torch.float64) if space is None else torch.linalg.qr(space)[0].cpu()
    drawn = torch.randn(basis.shape[1], r, generator=generator, dtype=torch.float64)
    inner, triangle = torch.linalg.qr(drawn)
    # QR's signs are LAPACK's choice; with a positive diagonal the frame is Haar (Mezzadri, 2007).
    frame: Tensor = basis @ (inner * triangle.diagonal().sign())
    return frame


def _constants_are_unseen(bare: Snapshot, matrix: Matrix) -> bool:
    """Whether a constant vector written to the stream reaches no reader: all that come later centre what they read."""
    structure, weights, layer = bare.structure, bare.weights, matrix.layer
    own = structure.mlp_norm[layer] if matrix.kind == "W_out" else structure.attn_norm[layer]
    if own is None:
        # No LayerNorm in front: where there is one all the same, it stands after the sum.
        return f"blocks.{layer}.{'ln2' if matrix.kind == 'W_out' else 'ln1'}.w" in weights
    if structure.rms:
        return False
    later = [*structure.attn_norm[layer + 1 :], *structure.mlp_norm[layer + (matrix.kind == "W_out") :]]
    return None not in later and "ln_final.w" in weights


def _lost_to_rounding(bare: Snapshot, placed: Placed) -> float:
    """How far the change that the weight's dtype can hold is from the one wanted, relative to its size."""
    before, change = bare.weights[placed.factor.weight], placed.dense(bare.weights)
    made = (before.double() + change).to(before.dtype).double() - before.double()
    return float((made - change).norm() / change.norm().clamp_min(1e-300))
