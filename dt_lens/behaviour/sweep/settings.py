"""``SweepSettings``: everything that decides what a sweep runs, checked in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dt_lens.arguments import LAST_SEED, as_list, whole_number
from dt_lens.behaviour.sweep.halving import parse_halving
from dt_lens.edits.written import SV, split_values
from dt_lens.errors import DtLensError, a_type, nearest
from dt_lens.lens.activations import Activations

__all__ = ["SV", "SweepSettings"]

MATCHES = ("frobenius", "output")
DIRECTIONS = ("plain", "activation")


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What a sweep edits, what it compares each edit with, and over how many units. ``Sweep`` takes the same
    keywords, and those that say what is run, which ``evaluate`` takes too.

    Args:
        matrices: names or shell patterns, such as ``"*.W_in"``; all matrices by default.
        sv: which singular directions of each matrix, one edit per direction: an index, ``"0-9"``, ``"all"``, or a
            sequence of these; negative ones count from the smallest sigma.
        sides: which sides are edited, such as ``["write"]``; by default every side on the residual stream, and only one
            of them if the edit scales sigma, which is the same edit on each.
        edits: what the singular vector becomes: values of ``SingularEdit``, numbers or ``"scale:0.5"``, and directions
            of embeddings, by a label or the number of its row: ``"replace:action_out:thigh_joint torque"`` and
            ``"towards:action_out:thigh_joint torque:30"``.
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
    sides: Sequence[str] | str | None = None
    edits: Sequence[Any] | str | float = ("constant",)
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

    def __post_init__(self) -> None:
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
                    f"{name} is {word!r:.40}; it must be one of {', '.join(words)}." + nearest(str(word), words)
                    if isinstance(word, str)
                    else f"{name} is {a_type(word)}; it must be one of {', '.join(words)}."
                )
        self._keep("edits", split_values(self.edits) if isinstance(self.edits, str) else as_list(self.edits))
        if not self.edits:
            raise DtLensError("edits is empty; give at least one value, such as constant.")
        for name in ("matrices", "sides"):
            if getattr(self, name) is not None:
                self._keep(name, as_list(getattr(self, name)))
        patterns = self.matrices
        if patterns is not None and not (patterns and all(isinstance(pattern, str) for pattern in patterns)):
            raise DtLensError(f"matrices is {patterns!r}; it must be names or patterns, such as '*.W_in'; None is all.")

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
