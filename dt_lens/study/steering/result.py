"""What a search for a steering direction found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from dt_lens.lens.printing import Printed, Rows, frame_html
from dt_lens.study.result_files import json_values
from dt_lens.study.steering.doses import Candidate

__all__ = ["SteeringResult"]


@dataclass(frozen=True, repr=False)
class SteeringResult(Printed):
    """The verdict on the best candidate, and the tables behind it; ``write_steering`` writes them.

    Attributes:
        verdict: ``"found"``, ``"no more than random"``, ``"none found"``, ``"undecided"``, ``"not applicable"``, or,
            where the outcome moves at a cost, in the task's words: ``"moves the return by failing"``, ``"moves the log
            probability at the cost of the loss on other text"``. See ``docs/steering_registered.md``.
        sentence: the verdict with its numbers.
        best: the chosen direction; ``None`` if steering is not applicable.
        curve: a row per point of the curve (an agent's ``target``), or one row where there is none: ``mean mean_low
            mean_high``, ``failure_rate`` (or ``guard``, what must not rise) with its interval, and the number of units.
            Where failing has no meaning and there is no guard, there are no such columns.
        choosing: a row per candidate: why it was tried, its slope, its ``failure_rise`` (or ``guard_rise``), and
            whether it was set aside.
        table: a row per dose of the chosen direction on fresh units, with the columns of ``curve``.
        randoms: a row per random direction that took the chosen one's place on one ``side`` (the one that faces what it
            reads, or the one that it puts out on), with the same output energy, or where it writes with the same
            downstream gain: its ``seed``, its ``scale`` (how much larger the norm of its change is), the mean outcomes
            at the least and the largest dose (``lowest`` and ``highest``), its ``reach``, and its rise of what must not
            rise. The first row of a side, without a seed, is the chosen direction's, dosed on that side, over the same
            doses and units.
        numbers: reach and rise in failures with their intervals, p, and what was run; how many random directions reach
            as far (``read_as_far``, ``put_as_far``), with p and the median of their reach.
    """

    verdict: str
    sentence: str
    best: Candidate | None
    curve: pd.DataFrame
    choosing: pd.DataFrame
    table: pd.DataFrame
    randoms: pd.DataFrame
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def _shown(self) -> tuple[str, Rows]:
        best = "none" if self.best is None else f"{self.best.name}, {self.best.why}"
        rows = [("verdict", self.sentence), ("direction", best)]
        return f"SteeringResult: {self.verdict}", [*rows, ("next", "table, choosing, randoms; write_steering(...)")]

    def _more_html(self) -> str:
        return frame_html(self.table) if len(self.table) else ""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        frames = {name: getattr(self, name).to_dict("records") for name in ("curve", "choosing", "table", "randoms")}
        best = None if self.best is None else self.best._asdict()
        record = {"verdict": self.verdict, "sentence": self.sentence, "best": best, **frames, **self.numbers}
        return dict(json_values(record))
