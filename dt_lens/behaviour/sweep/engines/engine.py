"""What the driver asks of whatever runs its units: local processes, or machines elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

from dt_lens.behaviour.agents.rollouts import Outcome
from dt_lens.behaviour.agents.running import Job
from dt_lens.behaviour.sweep.units import Unit
from dt_lens.errors import DtLensError

__all__ = ["EventBuffer", "Engine", "Event"]


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


class EventBuffer:
    """Loses no event to an error after it: what was heard is told first, and the error raised the next time."""

    def __init__(self) -> None:
        self._error: DtLensError | None = None

    def hear(self, events: Iterable[Event]) -> list[Event]:
        """The events, up to where they end or raise ``DtLensError``; raises it where there are none before it."""
        if self._error is not None:
            raise self._error
        heard: list[Event] = []
        try:
            for event in events:
                heard.append(event)
        except DtLensError as error:
            if not heard:
                raise
            self._error = error
        return heard
