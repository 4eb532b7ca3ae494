"""The edits in force on a model, and the untouched weights that they change."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dt_lens.errors import DtLensError
from dt_lens.lens.matrices import Snapshot
from dt_lens.lens.weights import memory_of

if TYPE_CHECKING:
    from dt_lens.lens.protocol import Lens
    from dt_lens.svd.decomposition import Decomposition

__all__ = ["State", "state_of", "unedited", "unsuspended"]

_FIRST_USE = threading.Lock()


@dataclass
class State:
    """The edits in force on one model, and the untouched weights that they change.

    Attributes:
        edits: each an ``Edit``, in the order in which they came.
        untouched: the weights that are edited, as they were, by name.
        decomposed: the last decomposition that an edit was made from: edits often come in series on one matrix.
        thread: which thread put the edits in force.
        lock: held while weights are read to make an edit, and while they are written.
        suspensions: each a ``Suspension`` that has taken the edits away which were in force when it began.
    """

    edits: list[Any] = field(default_factory=list)
    untouched: dict[str, Tensor] = field(default_factory=dict)
    decomposed: tuple[tuple[Any, ...], Decomposition] | None = None
    thread: int = 0
    lock: Any = field(default_factory=threading.RLock)
    suspensions: list[Any] = field(default_factory=list)

    def require_own_thread(self) -> None:
        """Raise ``DtLensError`` if another thread's edits are in force: all threads see the same weights."""
        if self.edits and self.thread != threading.get_ident():
            raise DtLensError(
                f"An edit of {self.edits[0].matrix.name} that another thread made is in force, and all threads see it; "
                "end it first, or give each thread its own copy.deepcopy of the model."
            )
        self.thread = threading.get_ident()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has the same edits in force, and knows them.
        return {"edits": self.edits, "untouched": self.untouched}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.edits, self.untouched = state["edits"], state["untouched"]
        self.decomposed, self.thread, self.lock = None, threading.get_ident(), threading.RLock()
        self.suspensions = []


def state_of(model: Lens) -> State:
    """The state kept with a model, created on first use; ``model.active_edits`` is its list of edits in force."""
    with _FIRST_USE:
        state: State | None = model.__dict__.get("_edit_state")
        if state is None:
            state = State()
            # Past nn.Module.__setattr__: these are not parts of the model.
            object.__setattr__(model, "_edit_state", state)
            object.__setattr__(model, "active_edits", state.edits)
    return state


def unsuspended(model: Lens) -> list[Any]:
    """The edits in force on a model without those that are suspended: what its weights hold now."""
    edits, state = getattr(model, "active_edits", ()), model.__dict__.get("_edit_state")
    away = [edit for suspension in state.suspensions for edit in suspension.edits] if state else []
    return [edit for edit in edits if not any(edit is one for one in away)]


def unedited(model: Lens) -> Snapshot:
    """A model's weights without the edits in force.

    Edits are made from these, so that ``sv`` counts the same directions inside another edit as outside.
    """
    weights = model.weights
    # Looked up by memory: layers may share a weight, and an edit under one name is then in force under the other too.
    untouched = {memory_of(weights[name]): kept for name, kept in state_of(model).untouched.items()}
    bare = {name: untouched.get(memory_of(weight), weight) for name, weight in weights.items()}
    return Snapshot(bare, model.structure)
