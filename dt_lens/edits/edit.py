"""Low-rank changes of weights, applied and undone bit for bit.

Several edits of one model add up, in whatever order they come and go: a weight is always the untouched one plus the
changes in force, summed in an order that does not depend on when they came, and rounded once to its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dt_lens.arguments import require_activations
from dt_lens.edits.files import save_records
from dt_lens.edits.low_rank import Placed, spectrum_of
from dt_lens.edits.reversible import Reversible, entering, leaving
from dt_lens.edits.saving import allow_saving, refuse_saving
from dt_lens.edits.state import State, state_of, unedited, unsuspended
from dt_lens.edits.writing import Written, add_changes, put_back, writable
from dt_lens.errors import DtLensError
from dt_lens.lens.activations import Activations, LowRank
from dt_lens.lens.forward_mode import evaluating
from dt_lens.lens.hooks import HookedModule
from dt_lens.lens.matrices import Matrix, SideName
from dt_lens.lens.printing import html_table
from dt_lens.lens.weights import checksum, same_bits

if TYPE_CHECKING:
    from dt_lens.lens.protocol import Lens

__all__ = ["Edit", "Suspension", "edited_weight", "suspended"]

# The hook straight after each weight in the forward pass, where its effect shows.
SHOWN_AT = {
    "W_Q": "attn.hook_q",
    "W_K": "attn.hook_k",
    "W_V": "attn.hook_v",
    "W_O": "hook_attn_out",
    "W_in": "mlp.hook_pre",
    "W_gate": "mlp.hook_pre",
    "W_out": "hook_mlp_out",
}


def suspended(model: Lens) -> Suspension:
    """Take a model's edits away inside ``with``, and put them back afterwards, bit for bit, whatever happened.

    Edits stay in ``model.active_edits`` meanwhile. An edit that is applied inside is in force without them. Ctrl-C
    waits while weights are being written.

    Raises:
        DtLensError: on entering, if another thread made the edits; on leaving, if a weight cannot be put back because
            it was cast or moved meanwhile.
    """
    return Suspension(model)


class Suspension(Reversible):
    """What ``suspended`` returns.

    Attributes:
        edits: those that were in force on entering, which are taken away.
    """

    def __init__(self, model: Lens) -> None:
        self.model = model
        self.edits: list[Edit] = []
        self._kept: dict[str, Tensor] = {}

    def _change(self) -> None:
        state = state_of(self.model)
        with state.lock:
            state.require_own_thread()
            self.edits = list(state.edits)
            self._kept = {name: self.model.weights[name].detach().clone() for name in state.untouched}
            self._writer = state.thread
            state.suspensions.append(self)
            for name, untouched in state.untouched.items():
                put_back(self.model.weights[name], untouched)

    def _restore(self) -> None:
        state, edits = state_of(self.model), self.edits
        with state.lock:
            state.suspensions[:] = [one for one in state.suspensions if one is not self]
            if len(edits) != len(state.edits) or any(a is not b for a, b in zip(edits, state.edits, strict=True)):
                _write(self.model)  # an edit was applied or undone meanwhile, so the kept weights are out of date
                return
            for name, weight in self._kept.items():
                if not put_back(self.model.weights[name], weight):
                    raise DtLensError(f"The edited weight {name!r} could not be put back bit for bit; load the model.")


class _Seen(Exception):
    """Ends a forward pass with the activation that it was run for."""


class Edit(Reversible):
    """A low-rank change of one matrix, in force inside ``with``: the base of ``SingularEdit`` and ``Control``.

    Attributes:
        matrix: the catalogued matrix.
        side: the side of the matrix on which singular vectors are replaced.
        sv: the indices of the singular directions that are edited; for a control, those of the edit it belongs to.
        note: what a reader of the result should know about this edit, or an empty string.
    """

    matrix: Matrix
    side: SideName
    sv: list[int]
    note: str = ""

    def __init__(
        self, model: Lens, matrix: Matrix, side: SideName, sv: Sequence[int], delta: LowRank, placed: Placed
    ) -> None:
        self.model = model
        self.matrix, self.side, self.sv = matrix, side, list(sv)
        self._delta = delta
        self._placed = placed
        self._weight = placed.factor.weight
        bare = unedited(model)
        self._made_of = checksum(bare, matrix)
        left, right = matrix.fold_change(bare, *delta)
        self._folded_delta = left, right

    def _repr_html_(self) -> str:
        active = any(edit is self for edit in getattr(self.model, "active_edits", ()))
        rows = [
            ("matrix", f"{self.matrix.name}, {self.side} side"),
            ("directions", f"sv {', '.join(map(str, self.sv))}"),
            ("energy", f"{self.energy:.4g}"),
            ("in force", "yes" if active else "no: with edit: ..."),
        ]
        return html_table(repr(self), [*rows, *([("note", self.note)] if self.note else [])])

    @property
    def delta(self) -> LowRank:
        """The change of the matrix, ``M_edited = M + left @ right``: ``[d_left, r]`` and ``[r, d_right]``, float64.

        ``M`` is the raw matrix (for OV and QK the product of the raw factors), also when the edited directions are
        those of the folded matrix.
        """
        return self._delta

    @property
    def energy(self) -> float:
        """The Frobenius norm of the change of the matrix."""
        return float(spectrum_of(self._delta).norm())

    @property
    def effective_energy(self) -> float:
        """The Frobenius norm of the change of the folded matrix: the part that the norms before and behind let through.

        Equal to ``energy`` where there is no norm.
        """
        return float(spectrum_of(self._folded_delta).norm())

    @property
    def active(self) -> bool:
        """Whether the edit is in force now."""
        return any(edit is self for edit in state_of(self.model).edits)

    def output_energy(self, activations: Activations) -> float:
        """``sqrt(E ||x @ delta||^2)`` over the real inputs ``x`` of the raw matrix: how much its output changes.

        An edit of a circuit's ``write`` or ``key`` side changes the second factor, ``W_O`` or ``W_K``, which also
        reads the bias of the first: the expectation then includes that bias.

        Raises:
            DtLensError: if ``activations`` do not cover the matrix's inputs, or belong to another model.
        """
        require_activations(activations)
        bare = unedited(self.model)
        if self._placed.is_second_in(self.matrix):
            return activations.between(self.matrix, bare).energy((self._placed.left, self._placed.right))
        return activations.of(self.matrix, bare).energy(self._delta)

    def control(self, seed: int = 0, activations: Activations | None = None) -> Edit:
        """A random edit of the same energy and rank at the same place; with ``activations``, of the same output energy.

        Raises:
            DtLensError: as ``output_energy`` does.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """A portable record from which ``SingularEdit.from_dict`` makes the same edit; plain JSON values."""
        raise NotImplementedError

    def save(self, file: str | Path) -> Path:
        """Write the edit to a JSON file, from which ``load_edits`` and ``--edits-from`` make it again.

        Raises:
            DtLensError: if the file cannot be written.
        """
        return save_records(file, [self.to_dict()])

    @entering
    def apply(self) -> None:
        """Put the edit in force until ``undo``.

        Raises:
            DtLensError: if the edit is already in force, edits a direction that another edit in force edits, was made
                from other weights than the model has now, is larger than the weights' dtype can hold, changes no bit
                of the weights or of what they compute, or does not reach the model's forward pass; or if edits that
                another thread made are in force. The model is then unchanged.
        """
        super().apply()

    @leaving
    def undo(self) -> None:
        """Take the edit back; after the last one the weights are as they were, bit for bit.

        Anything else that was written into the edited weights meanwhile is lost too. An edit that is not in force is
        left alone.

        Raises:
            DtLensError: if a weight cannot be restored because it was cast meanwhile.
        """
        super().undo()

    def _change(self) -> None:
        state = state_of(self.model)
        with state.lock:
            state.require_own_thread()
            self._refuse_overlap(state.edits)
            self._require_same_weights(state)
            short = self._activation(tokens=1)
            live = self.model.weights[self._weight]
            if self._weight not in state.untouched:
                state.untouched[self._weight] = live.clone()
            self._writer = state.thread
            state.edits.append(self)
            written = _write_one(self.model, self._weight)
            if written.overflowed:
                raise DtLensError(
                    f"The edit of {self.matrix.name} makes weights that {str(live.dtype).removeprefix('torch.')} "
                    f"cannot hold (energy {self.energy:.2g}); choose a smaller value."
                )
            if not written.changed:
                raise DtLensError(
                    f"The edit of {self.matrix.name} changes no bit of the weights (energy {self.energy:.2g}); "
                    "it would measure nothing."
                )
            if same_bits(short, self._activation(tokens=1)):
                self._require_seen(state)
            refuse_saving(self.model)

    def _restore(self) -> None:
        state = state_of(self.model)
        with state.lock:
            if not self.active:
                return
            state.edits[:] = [edit for edit in state.edits if edit is not self]
            if not state.edits:
                allow_saving(self.model)
            name = self._weight
            if any(edit._weight == name for edit in state.edits):
                _write_one(self.model, name)
                return
            if not put_back(self.model.weights[name], state.untouched.pop(name)):
                raise DtLensError(f"The weight {name!r} could not be restored bit for bit; load the model again.")

    def _refuse_overlap(self, edits: Sequence[Edit]) -> None:
        pass

    def _require_same_weights(self, state: State) -> None:
        """Check that the weights are those the edit was made from, and are shared with the user's own model.

        Two names of one weight cannot both be edited: each would keep the other's change as untouched.
        """
        if checksum(unedited(self.model), self.matrix) != self._made_of:
            raise DtLensError(
                f"The weights of {self.matrix.name} have changed since this edit was made from them; make it again."
            )
        weights, name = self.model.weights, self._weight
        for other in state.untouched:
            if other != name and weights[other].data_ptr() == weights[name].data_ptr():
                raise DtLensError(
                    f"{name!r} and {other!r} share their memory, and an edit of it is already in force; end it first."
                )
        check = getattr(self.model, "require_shared", None)
        if check is not None:
            check([name])

    def _require_seen(self, state: State) -> None:
        """Check that the change, which a short probe does not show, is shown by a whole sequence."""
        after = self._activation()
        state.edits.remove(self)
        try:
            _write_one(self.model, self._weight)
            before = self._activation()
        finally:  # an edit that is not listed is not taken back
            state.edits.append(self)
        _write_one(self.model, self._weight)
        if same_bits(before, after):
            raise DtLensError(self._why_unseen(before))

    def _activation(self, tokens: int | None = None) -> Tensor:
        """The activation straight after the edited weight, for a probe of one sequence, or the first tokens of it.

        Only a text is cut short: a product with one token reads a large weight once, where more of them pack it first.
        """
        kind = self._weight.rpartition(".")[2]
        gated = kind == "W_in" and f"blocks.{self.matrix.layer}.mlp.W_gate" in self.model.weights
        name = f"blocks.{self.matrix.layer}.{'mlp.hook_pre_linear' if gated else SHOWN_AT[kind]}"
        probe = {key: value[:1] for key, value in self.model.probe().items()}  # one sequence shows it
        if list(probe) == ["tokens"]:
            probe["tokens"] = probe["tokens"][:, :tokens]
        shown = None

        def see(x: Tensor, hook: Any) -> None:
            raise _Seen(x)

        with evaluating(self.model), torch.no_grad():
            if not isinstance(self.model, HookedModule):
                shown = self.model.run_with_cache(**probe, names_filter=name)[1][name]
            else:
                try:  # the rest of the pass, which may be most of it, would show nothing more
                    self.model.run_with_hooks(**probe, fwd_hooks=[(name, see)])
                except _Seen as seen:
                    shown = seen.args[0]
        assert isinstance(shown, Tensor)
        return torch.nan_to_num(shown.detach().clone())

    def _why_unseen(self, before: Tensor) -> str:
        """Why the edit moved no bit of the activation: it is too small, or the weight is not the one in use."""
        live = self.model.weights[self._weight]
        with writable(live):
            live.zero_()
        reached = not same_bits(before, self._activation())
        _write(self.model)
        if reached:
            return (
                f"The edit of {self.matrix.name} moves no activation by a bit at the model's precision (energy "
                f"{self.energy:.2g}); it would measure nothing."
            )
        return (
            f"The edit of {self.matrix.name} does not reach the model's forward pass: the weight that was written is "
            "not the one in use (wrap the model again), or a hook puts something else in its place."
        )


def _write(model: Lens) -> None:
    """Set every edited weight to the untouched one plus its changes that are not suspended, rounded once."""
    for name in state_of(model).untouched:
        _write_one(model, name)


def _write_one(model: Lens, name: str) -> Written:
    """``_write`` for one weight, and what that did to it."""
    state, weights = state_of(model), model.weights
    return add_changes(weights[name], state.untouched[name], _changes_of(model, name), weights)


def _changes_of(model: Lens, name: str) -> list[Placed]:
    return [edit._placed for edit in unsuspended(model) if edit._weight == name]


def edited_weight(model: Lens, name: str) -> Tensor:
    """What the edits in force make of the weight ``name``, one of those that they change, in its own dtype."""
    state, weights = state_of(model), model.weights
    changes = _changes_of(model, name)
    if not changes:
        return state.untouched[name]
    made = torch.empty_like(weights[name])
    add_changes(made, state.untouched[name], changes, weights)
    return made
