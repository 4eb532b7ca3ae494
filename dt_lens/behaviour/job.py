"""``Job``: a model in its task, packed for any process. What a worker imports first, so it imports little itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from dt_lens.errors import DtLensError

__all__ = ["Job", "JobOfMany", "Part", "Row", "repeated", "versions_of"]

Row = tuple[Any, ...]  # a unit's number, then its measures in the order of the terms
Part = tuple[Mapping[str, Tensor], Sequence[int]]  # what an arm changes, and the numbers of units


class Job(Protocol):
    """A model in its task, packed for any process: it can be pickled."""

    def provenance(self) -> dict[str, Any]:
        """What the bits of an outcome depend on besides model and setting, as JSON values: versions of packages."""
        ...

    def sample(self) -> str | None:
        """A hash of a little of what the unedited model does; ``None`` if that does not repeat even here.

        Sweeps compare it between machines.
        """
        ...

    def run(self, change: Mapping[str, Tensor], units: Sequence[int]) -> list[Row]:
        """Run ``units`` of the model with some of its weights changed; a row per unit, ascending.

        A unit's row is the same bits in every process, whatever ran before it.

        Args:
            change: what an arm changes, as ``Task.change`` gives it: by default the weights that differ from the packed
                model's, whole, by canonical name.
            units: the numbers of the units.

        Raises:
            DtLensError: if a unit has no outcome.
        """
        ...


@runtime_checkable
class JobOfMany(Job, Protocol):
    """A job that runs several arms faster together than one after another."""

    def run_together(self, parts: Sequence[Part], done: Callable[[int, list[Row]], None]) -> None:
        """Run the units of several arms; each gives the same bits as alone.

        Args:
            parts: what each arm changes, and its units.
            done: called with a part's place and its rows, ascending, when all its units have been run.

        Raises:
            DtLensError: if a unit has no outcome; parts that are not done may then be run alone.
        """
        ...


def repeated(run: Callable[[], Any]) -> str | None:
    """A hash of every bit of the rows that ``run`` gives; ``None`` if they are others the second time."""
    one, other = _hash_of(run), _hash_of(run)
    return one if one == other else None


def _hash_of(run: Callable[[], Any]) -> str:
    """A hash of every bit of what ``run`` gives, or of the error that it raises."""
    try:
        found = repr([tuple(value.hex() if isinstance(value, float) else value for value in row) for row in run()])
    except DtLensError as error:
        found = str(error)
    except Exception as error:  # a task may raise anything, with another message each time
        found = type(error).__name__
    return hashlib.sha256(found.encode()).hexdigest()


def versions_of(software: Iterable[str]) -> dict[str, str]:
    """The versions of packages, as a sweep's file keeps them."""
    return {f"version of {name}": version(name) for name in software}
