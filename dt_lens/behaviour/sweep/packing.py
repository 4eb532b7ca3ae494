"""From an arm to what a worker needs of it: the weights that its edit changes, made one arm at a time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

from safetensors.torch import save

from dt_lens.behaviour.evaluate import acting_weights, model_id
from dt_lens.behaviour.sweep.plan import Arm
from dt_lens.behaviour.workers import one_thread
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.edits import load_edit
from dt_lens.matrices import hash_of

__all__ = ["Packed", "Packer"]

KEPT = 2  # arms: the one whose units are being begun, and the next


class Packed(NamedTuple):
    """What an arm makes of the model."""

    change: bytes  # the weights that differ, as safetensors
    energy: float  # 0 for the baseline
    output_energy: float | None  # of the change of the output on real inputs, where some are known
    model_id: str
    note: str


class Packer:
    """Makes arms' edits on the model, reads the changed weights off, and undoes them bit for bit.

    On one thread: with another number of them the decomposition might round differently, and an interrupted sweep would
    go on with other bits.
    """

    def __init__(self, model: HookedDecisionTransformer) -> None:
        self._model = model
        self._base = {name: hash_of(weight) for name, weight in acting_weights(model).items()}
        self._kept: dict[int, Packed] = {}

    def pack(self, arm: Arm) -> Packed:
        """The arm's edit, in force for a moment.

        Raises:
            DtLensError: when it cannot be put in force.
        """
        if arm.number not in self._kept:
            with one_thread():
                packed = self._pack(arm)
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[arm.number] = packed
        return self._kept[arm.number]

    def _pack(self, arm: Arm) -> Packed:
        edit = None if arm.record is None else load_edit(self._model, arm.record)
        with edit or nullcontext():
            weights = acting_weights(self._model)
            changed = {n: w.detach().contiguous() for n, w in weights.items() if hash_of(w) != self._base[n]}
            change, identity = save(changed) if changed else b"", model_id(self._model)
        return Packed(change, 0.0 if edit is None else edit.energy, None, identity, "" if edit is None else edit.note)
