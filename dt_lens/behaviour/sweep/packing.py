"""What a worker needs to run an arm: what its edit changes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

from safetensors.torch import save

from dt_lens.behaviour.sweep.plan import Arm
from dt_lens.behaviour.task import Task
from dt_lens.edits.edit import Edit
from dt_lens.edits.singular import load_edit
from dt_lens.errors import DtLensError
from dt_lens.lens.activations import Activations
from dt_lens.lens.forward_mode import one_thread
from dt_lens.lens.weights import hash_of

__all__ = ["Packed", "Packer"]

KEPT = 2  # packed arms: the one whose blocks are being begun, and the next


class Packed(NamedTuple):
    """What an arm changes in the model."""

    change: bytes  # what ``Task.change`` gives, as safetensors; empty for the baseline
    energy: float  # 0 for the baseline
    output_energy: float | None  # of the change of the output on real inputs, if activations are known
    model_id: str
    note: str


class Packer:
    """Makes the edits of arms on the model, copies what they change, and undoes the edits bit for bit.

    On one thread: with another number of threads the decomposition might round differently, and a resumed sweep would
    get other bits.
    """

    def __init__(self, model: Any, task: Task, activations: Activations | None = None) -> None:
        self._model, self._task, self._activations = model, task, activations
        self._base = {name: hash_of(weight) for name, weight in task.weights(model).items()}
        self._kept: dict[int, Packed] = {}

    def pack(self, arm: Arm) -> Packed:
        """The changes of the arm's edit, which is put in force and undone.

        Raises:
            DtLensError: if it cannot be put in force.
        """
        if arm.number not in self._kept:
            with one_thread():
                packed = self._pack(arm)
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[arm.number] = packed
        return self._kept[arm.number]

    def _pack(self, arm: Arm) -> Packed:
        edit = None if arm.record is None else self._edit(arm.record)
        with edit or nullcontext():
            changed = dict(self._task.change(self._model, self._base))
            change, identity = save(changed) if changed else b"", self._task.identity(self._model)[1]
        if edit is None:
            return Packed(change, 0.0, None, identity, "")
        return Packed(change, edit.energy, self._output_energy(edit), identity, edit.note)

    def _edit(self, record: Mapping[str, Any]) -> Edit:
        return load_edit(self._model, record, self._activations)

    def _output_energy(self, edit: Edit) -> float | None:
        try:
            return None if self._activations is None else edit.output_energy(self._activations)
        except DtLensError:  # the activations cover only some matrices
            return None

    def output_energy(self, arm: Arm) -> float | None:
        """The output energy of an arm's edit on real inputs, if activations are known. The model is not changed."""
        if arm.record is None or self._activations is None:
            return None
        with one_thread():
            return self._output_energy(self._edit(arm.record))
