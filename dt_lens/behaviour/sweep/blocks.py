"""The work of a sweep in blocks: one arm with a block of the task's units. Its outcomes depend on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from safetensors.torch import load

from dt_lens.behaviour.job import Job, JobOfMany, Part, Row

__all__ = ["Work", "run_together", "run_work"]


class Work(NamedTuple):
    """A block in the form that is sent to a worker: what the arm changes, and which units."""

    number: int  # of the block
    change: bytes  # what the arm changes in the base, as safetensors (see ``Task.change``); empty if nothing
    first: int  # number of the first unit
    size: int
    beside: tuple[tuple[Any, ...], ...] = ()  # the fields of other works, to be run in the same batch

    @property
    def units(self) -> range:
        """The numbers of the units."""
        return range(self.first, self.first + self.size)


def run_work(job: Job, work: Work) -> list[Row]:
    """Run a block; its rows by unit are the same bits in every process, whatever else runs.

    Raises:
        DtLensError: if a unit has no outcome.
    """
    return sorted(job.run(*_part(work)))


def run_together(job: Job, works: Sequence[Work], done: Callable[[Work, list[Row]], None]) -> list[Work]:
    """Run blocks of several arms in one batch, if the job can; returns those that are left, to be run alone.

    An error says nothing of which block it comes from, so the blocks that are not done yet are left too.
    """
    left = list(works)
    if len(works) > 1 and isinstance(job, JobOfMany):

        def finished(place: int, rows: list[Row]) -> None:
            left.remove(works[place])
            done(works[place], rows)

        with suppress(Exception):  # the block that raises it does so again
            job.run_together([_part(work) for work in works], finished)
    return left


def _part(work: Work) -> Part:
    return load(work.change) if work.change else {}, work.units
