"""The work of a sweep in blocks: one arm with a block of the task's units. Its outcomes depend on nothing else."""

from __future__ import annotations

from typing import NamedTuple

from safetensors.torch import load

from dt_lens.behaviour.job import Job, Row

__all__ = ["Work", "run_work"]


class Work(NamedTuple):
    """A block in the form that is sent to a worker: what the arm changes, and which units."""

    number: int  # of the block
    change: bytes  # what the arm changes in the base, as safetensors (see ``Task.change``); empty if nothing
    first: int  # number of the first unit
    size: int

    @property
    def units(self) -> range:
        """The numbers of the units."""
        return range(self.first, self.first + self.size)


def run_work(job: Job, work: Work) -> list[Row]:
    """Run a block; its rows by unit are the same bits in every process, whatever else runs.

    Raises:
        DtLensError: if a unit has no outcome.
    """
    return sorted(job.run(load(work.change) if work.change else {}, work.units))
