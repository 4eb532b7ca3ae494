"""TODO docstring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from dt_lens.arguments import local_path
from dt_lens.study.steering.doses import Candidate
from dt_lens.study.tables import plain, write_tables

__all__ = [
    "SteeringResult",
    "Verdict",
]

Verdict = Literal[
    "found", "moves the return by failing", "no more than random", "none found", "undecided", "not applicable"
]


@dataclass(frozen=True)
class SteeringResult:
    """What became of the search.

    Attributes:
        verdict: see ``docs/steering.md``.
        sentence: the verdict with its numbers.
        best: the chosen direction; ``None`` where steering is not applicable.
        curve: a row per target: ``target mean mean_low mean_high failure_rate failure_rate_low failure_rate_high
            episodes``.
        choosing: a row per candidate: why it was tried, its slope, its rise in failures, and whether it was set aside.
        table: a row per dose of the chosen direction on the fresh seeds: mean return with its interval, failure rate
            with its interval.
        randoms: a row per random direction, as loud as the chosen one and in its place on one ``side`` (``"read"``, or
            the one that it puts something to): its ``seed``, its ``scale`` (how much larger its change's norm is), the
            least and the largest dose's ``lowest`` and ``highest`` mean returns, its ``reach``, and its
            ``failure_rise``. The first row of a side, with no seed, is the chosen direction's, dosed on that side, over
            the same doses and episodes.
        numbers: reach and rise in failures with their intervals, p, and what was run; how many random directions reach
            as far (``read_as_far``, ``put_as_far``), with p and the median of their reach.
    """

    verdict: Verdict
    sentence: str
    best: Candidate | None
    curve: pd.DataFrame
    choosing: pd.DataFrame
    table: pd.DataFrame
    randoms: pd.DataFrame
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        frames = {name: getattr(self, name).to_dict("records") for name in ("curve", "choosing", "table", "randoms")}
        best = None if self.best is None else self.best._asdict()
        told = {"verdict": self.verdict, "sentence": self.sentence, "best": best, **frames, **self.numbers}
        return dict(plain(told))

    def save(self, folder: str | Path) -> Path:
        """Write ``steering.csv``, ``steering.json`` and ``steering.html`` into ``folder``; returns the page.

        Raises:
            DtLensError: when they cannot be written.
        """
        from dt_lens.study.steering.page import write_steering

        folder = local_path(folder, "folder")
        write_tables(folder, "steering", self.table, self.to_dict())
        return write_steering(folder / "steering.html", self)
