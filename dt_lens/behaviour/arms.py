"""``Arms``: the unedited model, some edits of it and a control for each, measured over the same units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.edits.edit import Edit

__all__ = ["Arms"]


@dataclass(frozen=True)
class Arms:
    """What a task draws of a study.

    Attributes:
        model: the model, without an edit in force.
        baseline: its evaluation.
        edits: the edits, not in force.
        names: what each is called.
        edited, controls: an evaluation under each edit, and one under its control.
    """

    model: Any
    baseline: Evaluation
    edits: Sequence[Edit]
    names: Sequence[str]
    edited: Sequence[Evaluation]
    controls: Sequence[Evaluation]

    def damage(self, arm: Evaluation) -> NDArray[np.float64]:
        """``[n]``, how much worse each unit is than the unedited model's."""
        return np.asarray(self.baseline.terms.sign * (self.baseline.outcomes - arm.outcomes))

    @property
    def worst(self) -> int | None:
        """Which edit does the largest mean damage; ``None`` if none does any."""
        means = [float(self.damage(arm).mean()) for arm in self.edited]
        return int(np.argmax(means)) if means and max(means) > 0 else None

    def typical(self, number: int) -> int:
        """The place of the unit whose damage is the median one under an edit: typical, not the most spectacular."""
        order = self.damage(self.edited[number]).argsort(kind="stable")
        return int(order[len(order) // 2])
