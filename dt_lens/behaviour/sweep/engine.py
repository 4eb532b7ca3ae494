"""What the driver asks of whatever runs its units: local processes, or machines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from dt_lens.behaviour.rollouts import Outcome
from dt_lens.behaviour.sweep.units import Unit
from dt_lens.behaviour.workers import Job

__all__ = ["Engine", "Event"]


class Event(NamedTuple):
    """What became of a unit.

    ``"done"``: it ran. ``"refused"``: it raised, and would again. ``"died"``: whoever ran it is gone; it can be sent
    again.
    """

    kind: Literal["done", "refused", "died"]
    unit: int
    worker: str  # who ran it, for the log
    outcomes: Sequence[Outcome] = ()
    said: str = ""  # the sentence of what was raised, or how it died


class Engine(Protocol):
    """Runs units; knows nothing of the store. A unit that it was given comes back as exactly one event."""

    def start(self, job: Job) -> None:
        """Get ready to run units of ``job``."""
        ...

    @property
    def free(self) -> int:
        """How many more units can be begun at once."""
        ...

    def submit(self, unit: Unit) -> None:
        """Begin a unit. Never called when ``free`` is 0."""
        ...

    def wait(self, seconds: float) -> list[Event]:
        """What has happened; after ``seconds`` at the latest, though it be nothing.

        Raises:
            DtLensError: when nothing can be run at all.
        """
        ...

    def stop(self) -> None:
        """End everything that still runs."""
        ...
