"""``SweepSettings``: everything that decides what a sweep runs, checked in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

from dt_lens.arguments import LAST_SEED, as_list, whole_number
from dt_lens.behaviour.sweep.halving import parse_halving
from dt_lens.edits.control import Control
from dt_lens.edits.edit import Edit
from dt_lens.edits.written import SV
from dt_lens.errors import DtLensError, a_type, as_written, nearest
from dt_lens.lens.activations import Activations

__all__ = ["SV", "SweepSettings"]

MATCHES = ("frobenius", "output")
DIRECTIONS = ("plain", "activation")


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What a sweep edits, what it compares each edit with, and over how many units. ``Sweep`` takes the same
    keywords, and those that say what is run, which ``evaluate`` takes too.

    Args:
        matrices: names or shell patterns, such as ``"*.W_in"``; all matrices by default, or none beside given
            ``edits``.
        sv: which singular directions of each matrix, one edit per direction: an index, ``"0-9"``, ``"all"``, or a
            sequence of these; negative ones count from the smallest sigma.
        side: which sides are edited, such as ``"write"``, or several; by default every side on the residual stream, and
            only one of them if the edit scales sigma, which is the same edit on each. ``sides`` is another name for it.
        value: what the singular vector becomes, ``"constant"`` by default: a value of ``SingularEdit`` or several, as
            objects or as text, ``[0.5, "replace:action_out:thigh_joint torque"]`` or ``"zero,flip"``. A tuple
            ``("action_out", "thigh_joint torque")`` is one value.
        edits: edits of your own, not in force, each an arm with controls: ``[SingularEdit(...)]``, or what
            ``load_edits`` gives. Values are taken here too, as before ``value`` was there.
        controls: random edits of the same size per edit: ``edit.control(seed)``, ``edit.control(seed + 1)``, ...
        control_match: what a control has in common with its edit: ``"frobenius"``, the norm of the change, or
            ``"output"``, that and the output energy on the model's own inputs.
        directions: ``"plain"``, or ``"activation"`` for those of ``SingularEdit(activations=...)``.
        activations: ``Activations`` or a file of them; by default they are collected if they are needed, before
            anything else, from the first units of the task, such as an agent's first ten episodes. They are kept next
            to the sweep's file, and every run that resumes it uses them.
        units: number of units of every arm; the task's own by default: 20 episodes of an agent, 32 windows of text.
            ``Sweep`` also takes it as ``episodes`` or ``windows``.
        seed: of the first unit, where units have seeds, of the controls, and of ``"random"`` edits.
        block_size: units that are run, written and resumed together; about 16 by default. Changes no result.
        halving: successive halving: the units of each rung before the last, such as ``[4, 8]``. Every edit runs 4
            units, the half with the larger differences 8 more, and half of those, with their controls, all ``units``,
            fresh ones. See ``SweepResults.table`` for what the numbers mean then.
        baseline: run the unedited model too; differences need it.
        fold_layernorm: as for ``SingularEdit``.

    Raises:
        DtLensError: if a setting is wrong whatever the model is. ``Sweep`` checks the rest against the model.
    """

    matrices: Sequence[str] | str | None = None
    sv: SV = 0
    side: Sequence[str] | str | None = None
    value: Any = None
    edits: Any = None
    controls: int = 0
    control_match: str = "frobenius"
    directions: str = "plain"
    activations: Activations | str | Path | None = None
    units: int | None = None
    seed: int = 0
    block_size: int | None = None
    halving: str | int | Sequence[int] | None = None
    baseline: bool = True
    fold_layernorm: bool = True
    sides: InitVar[Sequence[str] | str | None] = None

    def __post_init__(self, sides: Sequence[str] | str | None) -> None:
        for name in ("controls", "seed"):
            self._keep(name, whole_number(getattr(self, name), name, 0))
        for name in ("units", "block_size"):
            if getattr(self, name) is not None:
                self._keep(name, whole_number(getattr(self, name), name, 1))
        rungs = parse_halving(self.halving)
        self._keep("halving", rungs)
        if rungs is not None and not self.baseline:
            raise DtLensError("halving selects by the difference from the unedited model; it needs the baseline.")
        if self.seed + self.controls > LAST_SEED:
            raise DtLensError(f"seed is {self.seed}; the last control's must be below 2**63, so give a smaller one.")
        for name, words in (("control_match", MATCHES), ("directions", DIRECTIONS)):
            word = getattr(self, name)
            if not isinstance(word, str) or word not in words:
                raise DtLensError(
                    f"{name} is {as_written(word)}; it must be one of {', '.join(words)}." + nearest(str(word), words)
                    if isinstance(word, str)
                    else f"{name} is {a_type(word)}; it must be one of {', '.join(words)}."
                )
        if sides is not None:
            if self.side is not None:
                raise DtLensError("side was given twice, once as sides; give it once.")
            self._keep("side", sides)
        self._sort_edits()
        for name in ("matrices", "side"):
            if getattr(self, name) is not None:
                self._keep(name, as_list(getattr(self, name)))
        patterns = self.matrices
        if patterns is not None and not (patterns and all(isinstance(pattern, str) for pattern in patterns)):
            raise DtLensError(f"matrices is {patterns!r}; it must be names or patterns, such as '*.W_in'; None is all.")

    def _sort_edits(self) -> None:
        """Keep edits as a list, and values, which ``edits`` may be too, as ``value``."""
        if self.edits is None:
            return
        given = as_list(self.edits)
        edits = [edit for edit in given if isinstance(edit, Edit)]
        if not edits:
            if not given:
                raise DtLensError("edits is empty; give at least one edit, or leave it out.")
            if self.value is not None:
                raise DtLensError("edits holds values, and value was given too; give the values once, as value.")
            self._keep("value", self.edits if isinstance(self.edits, str) else given)
            self._keep("edits", None)
            return
        for edit in given:
            if not isinstance(edit, Edit) or isinstance(edit, Control):
                raise DtLensError(
                    f"edits holds {a_type(edit)}; it must be a list of edits, such as SingularEdit makes, and a sweep "
                    "makes their controls itself."
                )
        self._keep("edits", edits)

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def selection(self) -> int:
        """How many units the rungs before the last take."""
        return sum(parse_halving(self.halving) or ())

    @property
    def needs_activations(self) -> bool:
        """Whether the arms cannot be made without activations."""
        return self.directions == "activation" or (self.control_match == "output" and self.controls > 0)
