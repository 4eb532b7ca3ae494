"""``Readout``: what a dose of a direction is to move, over which units, and what it must not make worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dt_lens.arguments import whole_number
from dt_lens.behaviour.task import Task
from dt_lens.errors import DtLensError, a_type
from dt_lens.lens.matrices import SideName

__all__ = ["FRESH", "Matching", "Readout", "of_task"]

FRESH = 1000  # numbered units of the report begin this far after those of the choice
RISE = 0.1  # of the units: the largest rise of failures that is accepted


class Matching(NamedTuple):
    """Which directions are tried first: those whose ``side`` matches rows of an embedding best."""

    embedding: str
    rows: Sequence[int] | None  # all if ``None``
    side: SideName
    kinds: tuple[str, ...]  # of matrices
    why: str  # what such a direction does, in words


@dataclass(frozen=True)
class Readout:
    """What steering moves, and by which rules.

    Attributes:
        task: whose outcome is moved.
        choose: the units while directions are chosen, and of each point.
        report: other units, for the report.
        few: how many of them random directions are compared over.
        points: settings that move the outcome without an edit, such as an agent's target returns, with the task at
            each; empty if there are none.
        point: what such a setting is called.
        least: the smallest reach of interest: a share of the range over the points, or, without points, in the
            outcome's own units.
        guard: another task, whose outcome must not get worse; by default the failures of ``task`` must not rise.
        guarded: the guard's units.
        guard_name: what the guard measures, in words.
        rise: the largest rise that is accepted: of the guard's damage, or of the share of failing units.
        matching: which directions are tried first; all by their size if ``None``.
        kinds: the kinds of matrices whose directions are tried.
        across: whether the directions of large sigma are those of all these matrices together; by default the first of
            each matrix, block by block.
    """

    task: Task
    choose: range
    report: range
    few: int
    points: Mapping[float, Task] = field(default_factory=dict)
    point: str = "point"
    least: float = 0.1
    guard: Task | None = None
    guarded: range = range(0)
    guard_name: str = ""
    rise: float = RISE
    matching: Matching | None = None
    kinds: tuple[str, ...] = ("W_in", "OV")
    across: bool = False

    @property
    def harm(self) -> str:
        """What must not rise, in words; empty if nothing is watched."""
        return self.guard_name if self.guard is not None else "failures" if self.watches else ""

    @property
    def watches(self) -> bool:
        """Whether something must not rise: the guard's damage, or failures where failing has a meaning."""
        return self.guard is not None or self.task.terms.failure is not None


def of_task(task: Task, units: int | None, choosing: int | None, seed: int, **more: Any) -> Readout:
    """A readout of a task's own outcome, chosen on some of its units and reported on others.

    Args:
        task: the task.
        units, choosing: how many units of the report, and while choosing; the task's own numbers by default.
        seed: of the first unit while choosing, where units have seeds.
        more: other fields of ``Readout``.

    Raises:
        DtLensError: for what is no task, or if it has too few units for both.
    """
    if not isinstance(task, Task):
        raise DtLensError(f"task is {a_type(task)}; it must be a Task (docs/tasks.md).")
    choose = task.units(choosing, seed, "choose")
    report = task.units(units, seed + FRESH, "steer")
    for count in (len(choose), len(report)):
        whole_number(count, task.terms.units, 2)
    if choose.stop > report.start and choose.start < report.stop:  # units without seeds: one part each
        every = task.units(None, seed, "steer")
        middle = every.start + len(every) // 2
        choose, report = every[: len(every) // 2][: len(choose)], range(middle, every.stop)[: len(report)]
        if min(len(choose), len(report)) < 2:
            raise DtLensError(
                f"There are {len(every)} {task.terms.units}; steering chooses on some and reports on others, and needs "
                "at least 4."
            )
    return Readout(task, choose, report, min(len(choose), len(report)), **more)
