"""Edit one singular direction of one matrix, and undo it bit for bit.

An edit replaces a singular vector: ``sigma u v^T`` becomes ``sigma u' v^T`` or ``sigma u v'^T``. That is a change of
rank one, added to the weight; nothing is rebuilt from the full decomposition. Several edits of a model add up, whatever
the order in which they come and go: the weight is always the untouched one plus the changes of all edits that are in
force.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dt_lens.directions import Decomposition, decompose_matrix
from dt_lens.errors import DtLensError
from dt_lens.matrices import Matrix, SideName, find_matrix, fold, unfold

if TYPE_CHECKING:
    from dt_lens.lens import Lens

__all__ = ["Control", "Edit", "SingularEdit", "load_edit"]

Value = Literal["constant", "zero", "flip", "random"]
VALUES: tuple[str, ...] = ("constant", "zero", "flip", "random")
LowRank = tuple[Float[Tensor, "d_left r"], Float[Tensor, "r d_right"]]


@dataclass
class _State:
    """What is in force on one model: its edits, and the untouched weights that they change."""

    edits: list[Edit]
    untouched: dict[str, Tensor]


def _state(model: Lens) -> _State:
    state: _State | None = model.__dict__.get("_edit_state")
    if state is None:
        state = _State([], {})
        object.__setattr__(model, "_edit_state", state)
        object.__setattr__(model, "active_edits", state.edits)
    return state


class _Unedited:
    """A model without the edits in force: what is decomposed for an edit, so that ``sv`` always counts alike."""

    def __init__(self, model: Lens) -> None:
        self.structure = model.structure
        self.weights: Mapping[str, Tensor] = {**model.weights, **_state(model).untouched}


class Edit:
    """A low-rank change of one matrix, in force inside ``with``. The common part of ``SingularEdit`` and ``Control``.

    Attributes:
        matrix: the catalogued matrix.
        note: what a reader of the result has to know about this edit, or an empty string.
    """

    matrix: Matrix
    note: str = ""

    def __init__(self, model: Lens, matrix: Matrix, delta: LowRank, changes: dict[str, Tensor]) -> None:
        self.model = model
        self.matrix = matrix
        self._delta = delta
        self._changes = changes  # by weight name, float64

    @property
    def delta(self) -> LowRank:
        """The change of the matrix, ``M_edited = M + left @ right``: ``[d_left, r]`` and ``[r, d_right]``, float64.

        ``M`` is the raw matrix (for OV and QK the product of the raw factors), also when the LayerNorm is folded for
        choosing directions.
        """
        return self._delta

    @property
    def energy(self) -> float:
        """The Frobenius norm of the change of the matrix."""
        return float(_spectrum(self._delta).norm())

    @property
    def active(self) -> bool:
        """Whether the edit is in force now."""
        return any(edit is self for edit in _state(self.model).edits)

    def control(self, seed: int = 0) -> Control:
        """A random edit of the same energy and rank at the same place: same singular values, random vectors."""
        return Control(self, seed)

    def to_dict(self) -> dict[str, Any]:
        """A portable record from which ``from_dict`` makes the same edit; plain JSON values."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.apply()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def apply(self) -> None:
        """Put the edit in force until ``undo``.

        Raises:
            DtLensError: when it is in force already, edits a direction that another edit in force edits, changes no bit
                of the weights, or does not reach the model's forward pass; the model is then as it was.
        """
        state = _state(self.model)
        if self.active:
            raise DtLensError("This edit is in force already; make a second SingularEdit for a second one.")
        self._refuse_overlap(state.edits)
        self._require_live()
        before = self._activation()
        with _uninterrupted() as pending:
            weights = self.model.weights
            for name in self._changes:
                if name not in state.untouched:
                    state.untouched[name] = weights[name].clone()
            earlier = {name: weights[name].clone() for name in self._changes}
            state.edits.append(self)
            try:
                _write(self.model)
                if all(_same_bits(weights[name], earlier[name]) for name in self._changes):
                    raise DtLensError(
                        f"The edit of {self.matrix.name} changes no bit of the weights (energy {self.energy:.2g}); it "
                        "would measure nothing."
                    )
                if _same_bits(before, self._activation()):
                    raise DtLensError(
                        f"The edit of {self.matrix.name} does not reach the model's forward pass: the weight that was "
                        "written is not the one in use; wrap the model again."
                    )
                if pending:
                    raise KeyboardInterrupt
            except BaseException:
                self._withdraw()
                raise

    def undo(self) -> None:
        """Take the edit out of force; the last one leaves the weights as they were, bit for bit.

        Nothing happens when it is not in force.
        """
        if not self.active:
            return
        with _uninterrupted() as pending:
            self._withdraw()
        if pending:
            raise KeyboardInterrupt

    def _withdraw(self) -> None:
        state = _state(self.model)
        state.edits[:] = [edit for edit in state.edits if edit is not self]
        _write(self.model)
        needed = {name for edit in state.edits for name in edit._changes}
        for name in [name for name in state.untouched if name not in needed]:
            if not _same_bits(self.model.weights[name], state.untouched[name]):
                raise DtLensError(f"The weight {name!r} could not be restored bit for bit; load the model again.")
            del state.untouched[name]

    def _refuse_overlap(self, edits: Sequence[Edit]) -> None:
        pass

    def _require_live(self) -> None:
        """A user's own model must still share its storage with the lens."""
        check = getattr(self.model, "require_shared", None)
        if check is not None:
            check(list(self._changes))

    def _activation(self) -> Tensor:
        """What the matrix does to a probe batch, straight after it in the forward pass."""
        hook = {
            "W_Q": "attn.hook_q",
            "W_K": "attn.hook_k",
            "W_V": "attn.hook_v",
            "W_O": "hook_attn_out",
            "OV": "hook_attn_out",
            "QK": "attn.hook_attn_scores",
            "W_in": "mlp.hook_pre",
            "W_gate": "mlp.hook_post",
            "W_out": "hook_mlp_out",
        }[self.matrix.kind]
        name = f"blocks.{self.matrix.layer}.{hook}"
        module: Any = self.model
        training = module.training
        module.eval()
        try:
            with torch.no_grad():
                _, cache = self.model.run_with_cache(**self.model.probe(), names_filter=name, reset_hooks_end=False)
        finally:
            module.train(training)
        return torch.nan_to_num(cache[name].detach().clone())


def _write(model: Lens) -> None:
    """Every touched weight becomes the untouched one plus the changes in force, rounded once to its dtype."""
    state, weights = _state(model), model.weights
    for name, untouched in state.untouched.items():
        live = weights[name]
        changes = [edit._changes[name] for edit in state.edits if name in edit._changes]
        # With no change left the bits are copied, not computed. Weights made in inference mode may only be written
        # there.
        with torch.inference_mode(live.is_inference()), torch.no_grad():
            if changes:
                # In order of content rather than of arrival, so that the sum is the same whichever edit came first.
                changes.sort(key=lambda change: (float(change.norm()), float(change.sum())))
                live.copy_(sum(changes, untouched.double()).to(live.dtype))
            else:
                live.copy_(untouched)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of every bit: tells -0.0 from 0.0, and a NaN equals itself."""
    return a.shape == b.shape and bool(np.array_equal(_bytes(a), _bytes(b)))


def _bytes(a: Tensor) -> np.ndarray[Any, Any]:
    return a.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


@contextmanager
def _uninterrupted() -> Iterator[list[int]]:
    """Hold Ctrl-C back while weights are being written; the list says whether it came."""
    pending: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return

    def note(number: int, frame: FrameType | None) -> None:
        pending.append(number)

    handler: Callable[[int, FrameType | None], Any] | int | None = signal.signal(signal.SIGINT, note)
    try:
        yield pending
    finally:
        signal.signal(signal.SIGINT, handler)


def _spectrum(delta: LowRank) -> Float[Tensor, " r"]:
    """The singular values of ``left @ right`` without forming it."""
    left, right = delta
    spectrum: Tensor = torch.linalg.svdvals(torch.linalg.qr(left)[1] @ torch.linalg.qr(right.T)[1].T)
    return spectrum


class SingularEdit(Edit):
    """Replace singular vectors of a matrix inside ``with``, and restore the weights bit for bit on the way out.

    Args:
        model: a wrapped model.
        matrix: a catalogued name, ``"blocks.0.mlp.W_in"``, ``"blocks.2.attn.OV.0"``.
        sv: which singular directions, largest sigma first: an index, a list or a slice. The count is that of the
            unedited matrix, also inside another edit.
        side: the side whose vector is replaced; by default the matrix's only side on the residual stream (OV and QK
            need it said).
        value: what the unit vector becomes: ``"constant"`` (every entry 1/d, the edit this project grew from),
            ``"zero"`` (the direction is removed), ``"flip"``, ``"random"`` (a random unit vector; ``seed=``), a float
            (scales sigma), or a vector ``[d]``.
        head: one head's own ``W_Q``, ``W_K``, ``W_V`` or ``W_O``, or which head's ``OV`` or ``QK``.
        fold_layernorm: take the directions of the matrix with its LayerNorm folded in, as ``WeightSVD`` does, and carry
            the change back to the raw weight.
        decomposition: the matrix's ``Decomposition``, to save computing it again.

    Raises:
        DtLensError: for an unknown matrix, a direction or side that it has not, a value that is none of the above, or a
            change that cannot be carried back through the LayerNorm.
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
        found = find_matrix(model, matrix, head)
        where = found.side(side)
        folded = fold_layernorm and found.foldable
        bare: Any = _Unedited(model)
        known = decomposition is not None and decomposition.matrix == found and decomposition.folded == folded
        directions = (
            decomposition
            if known and decomposition is not None
            else decompose_matrix(bare, found, None, fold_layernorm)
        )
        self.sv = _indices(sv, len(directions.sigma), found.name)
        self.side: SideName = found.left if where == "left" else found.right
        self.value: Value | float | list[float]
        self.seed = seed
        self.folded = folded
        rows = torch.tensor(self.sv, device=directions.sigma.device)
        sigma, left, right = directions.sigma[rows], directions.left[rows], directions.right[rows]
        old = left if where == "left" else right
        new, self.value = _replacement(value, old, seed)
        step = (new - old) * sigma[:, None]  # the change of the replaced side, scaled by sigma
        change: LowRank = (step.T, right) if where == "left" else (left.T, step)
        delta, changes = _carry(bare, found, where, change, folded)
        super().__init__(model, found, delta, changes)
        self.sigma = sigma.tolist()
        self.blocks = sorted({directions.block_of(i) for i in self.sv})
        self.effective_energy = float(_spectrum(_fold_change(bare, found, delta) if folded else delta).norm())
        self.note = self._remark()

    def _remark(self) -> str:
        norm = self.matrix.left_norm if self.side == self.matrix.left else self.matrix.right_norm
        remarks = []
        if self.value == "constant" and norm is not None:
            remarks.append(
                f"The LayerNorm before {self.matrix.name} removes constants from what it reads, so on the {self.side} "
                "side the constant edit is a removal."
            )
        cut = [block for block in self.blocks if block[1] - block[0] > 1 and not set(range(*block)) <= set(self.sv)]
        if cut:
            remarks.append(
                f"Directions {cut[0][0]} to {cut[0][1] - 1} cannot be told apart at the weights' precision; only "
                "editing all of them means anything."
            )
        return " ".join(remarks)

    def _refuse_overlap(self, edits: Sequence[Edit]) -> None:
        for other in edits:
            if isinstance(other, SingularEdit) and other.matrix == self.matrix and set(other.sv) & set(self.sv):
                shared = min(set(other.sv) & set(self.sv))
                raise DtLensError(
                    f"Direction {shared} of {self.matrix.name} is being edited already; end that edit first."
                )

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
        """The edit that a ``to_dict`` record describes, on ``model``; a control's record gives the control."""
        return load_edit(model, record)

    def __repr__(self) -> str:
        value = self.value if isinstance(self.value, (str, float)) else "vector"
        return (
            f"SingularEdit({self.matrix.name}, sv={self.sv}, side={self.side!r}, value={value!r}, "
            f"energy={self.energy:.4g})"
        )


class Control(Edit):
    """A random edit of the same energy and rank at the same place as ``edit``; a function of the edit and the seed.

    The change keeps its singular values; its singular vectors are Haar-random in the space that the edit's weight can
    reach. It tells how much of an effect comes from changing anything at all by that much.
    """

    def __init__(self, edit: Edit, seed: int = 0) -> None:
        self.of: Edit = edit.of if isinstance(edit, Control) else edit
        self.seed = seed
        bare: Any = _Unedited(edit.model)
        matrix, delta = self.of.matrix, self.of.delta
        spectrum = _spectrum(delta)
        keep = spectrum > spectrum[0] * 1e-12 if len(spectrum) else spectrum > 0
        spectrum = spectrum[keep]
        generator = torch.Generator().manual_seed(seed)
        where = self.of.matrix.side(self.of.side) if isinstance(self.of, SingularEdit) else "left"
        factors = matrix.raw(bare)
        # A circuit is edited through one factor, so the other factor's span bounds what its fixed side can be.
        left_space = factors[0] if len(factors) == 2 and where == "right" else None
        right_space = factors[1].T if len(factors) == 2 and where == "left" else None
        left = _random_frame(delta[0].shape[0], len(spectrum), left_space, generator).to(delta[0])
        right = _random_frame(delta[1].shape[1], len(spectrum), right_space, generator).to(delta[1])
        change: LowRank = (left * spectrum, right.T)
        delta, changes = _carry(bare, matrix, where, change, False)
        super().__init__(edit.model, matrix, delta, changes)

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
        if record["kind"] == "control":
            return load_edit(model, record["of"]).control(record["seed"])
        if record["kind"] == "singular":
            return SingularEdit(
                model,
                record["matrix"],
                record["sv"],
                side=record["side"],
                value=record["value"],
                seed=record["seed"],
                fold_layernorm=record["fold_layernorm"],
            )
    except (KeyError, TypeError) as error:
        raise DtLensError(
            f"This is no record of an edit: {error} is missing or wrong; records come from to_dict()."
        ) from error
    raise DtLensError(f"Unknown kind of edit {record['kind']!r}; known are singular and control.")


def _indices(sv: int | Sequence[int] | slice, k: int, name: str) -> list[int]:
    if isinstance(sv, slice):
        chosen = list(range(k))[sv]
    else:
        try:
            chosen = [int(i) for i in ([sv] if np.ndim(sv) == 0 else list(sv))]  # type: ignore[arg-type]
        except (TypeError, ValueError):
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


def _replacement(value: Any, old: Float[Tensor, "k d"], seed: int) -> tuple[Tensor, Any]:
    """The vectors that take the place of ``old``, and the value as a record keeps it."""
    k, d = old.shape
    if isinstance(value, str):
        if value not in VALUES:
            raise DtLensError(
                f"value is {value!r}; it must be one of {', '.join(VALUES)}, a number, or a vector of {d} numbers."
            )
        if value == "random":
            drawn = torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(old)
            return drawn / drawn.norm(dim=1, keepdim=True), value
        made = {"constant": torch.full_like(old, 1 / d), "zero": torch.zeros_like(old), "flip": -old}
        return made[value], value
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        if not np.isfinite(value):
            raise DtLensError(f"value is {value!r}; a scale must be finite.")
        return old * float(value), float(value)
    try:
        vector = torch.as_tensor(value, dtype=torch.float64).to(old)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DtLensError(
            f"value is a {type(value).__name__}; it must be one of {', '.join(VALUES)}, a number, or a vector."
        ) from error
    if tuple(vector.shape) != (d,):
        raise DtLensError(f"value is a vector of shape {list(vector.shape)}; this side has {d} entries.")
    if not bool(torch.isfinite(vector).all()):
        raise DtLensError("value holds NaN or infinite entries; every entry must be finite.")
    return vector.expand(k, d), vector.tolist()


def _carry(
    lens: Lens, matrix: Matrix, where: Literal["left", "right"], change: LowRank, folded: bool
) -> tuple[LowRank, dict[str, Tensor]]:
    """A change of the (folded) matrix as a change of the raw matrix and of the one weight that makes it.

    A circuit ``A B`` is edited in one factor: ``B += pinv(A) delta`` for the right side, ``A += delta pinv(B)`` for the
    left one. Both are exact, because the side that stays lies in the span of the factor that stays.
    """
    weights = lens.weights
    left, right = change

    def unfolded_left(x: Tensor) -> Tensor:
        return unfold(x, weights[f"{matrix.left_norm}.w"], str(matrix.left_norm)) if folded and matrix.left_norm else x

    def unfolded_right(x: Tensor) -> Tensor:
        return (
            unfold(x.T, weights[f"{matrix.right_norm}.w"], str(matrix.right_norm)).T
            if folded and matrix.right_norm
            else x
        )

    if len(matrix.factors) == 1:
        delta = (unfolded_left(left), right)
        (factor,) = matrix.factors
        return delta, {factor.weight: factor.scatter(delta[0] @ delta[1], weights)}
    seen = matrix.folded(lens) if folded else matrix.raw(lens)
    raw = matrix.raw(lens)
    if where == "right":
        # Through the factor that stays, as the stream meets it; the raw matrix changes by the raw factor times the
        # same.
        inner = torch.linalg.pinv(seen[0]) @ left
        outer = unfolded_right(right)
        factor = matrix.factors[1]
        return (raw[0] @ inner, outer), {factor.weight: factor.scatter(inner @ outer, weights)}
    inner = right @ torch.linalg.pinv(seen[1])
    outer = unfolded_left(left)
    factor = matrix.factors[0]
    return (outer, inner @ raw[1]), {factor.weight: factor.scatter(outer @ inner, weights)}


def _fold_change(lens: Lens, matrix: Matrix, delta: LowRank) -> LowRank:
    """A change of the raw matrix as the stream behind the LayerNorm meets it."""
    left, right = delta
    if matrix.left_norm:
        left = fold(left, lens.weights[f"{matrix.left_norm}.w"])
    if matrix.right_norm:
        right = fold(right.T, lens.weights[f"{matrix.right_norm}.w"]).T
    return left, right


def _random_frame(d: int, r: int, space: Tensor | None, generator: torch.Generator) -> Float[Tensor, "d r"]:
    """``r`` Haar-random orthonormal vectors of ``d`` dimensions, or of the column space of ``space``."""
    if space is None:
        frame: Tensor = torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64))[0]
        return frame
    basis: Tensor = torch.linalg.qr(space)[0].cpu()
    inner: Tensor = torch.linalg.qr(torch.randn(basis.shape[1], r, generator=generator, dtype=torch.float64))[0]
    return basis @ inner
