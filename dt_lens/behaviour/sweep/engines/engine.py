"""The protocol between a sweep's driver and whatever runs its units: local processes, or a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

from dt_lens.behaviour.agents.rollouts import Outcome
from dt_lens.behaviour.agents.running import Job
from dt_lens.behaviour.sweep.units import Unit
from dt_lens.errors import DtLensError

__all__ = ["EventBuffer", "Engine", "Event"]


class Event(NamedTuple):
    """What happened to a unit.

    ``"done"``: it ran. ``"refused"``: it raised an error, and would again. ``"died"``: the process that ran it is gone;
    it can be submitted again.
    """

    kind: Literal["done", "refused", "died"]
    unit: int
    worker: str  # which process ran it, for the log
    outcomes: Sequence[Outcome] = ()
    message: str = ""  # the error's sentence, or how the process died


class Engine(Protocol):
    """Runs units; knows nothing of the store. Every submitted unit comes back as exactly one event."""

    def start(self, job: Job) -> None:
        """Prepare to run units of ``job``."""
        ...

    @property
    def free(self) -> int:
        """How many more units can be submitted now."""
        ...

    def submit(self, unit: Unit) -> None:
        """Start a unit. Not to be called when ``free`` is 0."""
        ...

    def wait(self, seconds: float) -> list[Event]:
        """The events since the last call; waits for the first one, but no longer than ``seconds``.

        Raises:
            DtLensError: if no unit can be run at all.
        """
        ...

    def stop(self) -> None:
        """Stop everything that still runs."""
        ...


class EventBuffer:
    """Keeps an error from hiding the events before it: they are returned first, and the next call raises the error."""

    def __init__(self) -> None:
        self._error: DtLensError | None = None

    def collect(self, events: Iterable[Event]) -> list[Event]:
        """All events, or those before a ``DtLensError``; raises the error if there are none before it."""
        if self._error is not None:
            raise self._error
        collected: list[Event] = []
        try:
            for event in events:
                collected.append(event)
        except DtLensError as error:
            if not collected:
                raise
            self._error = error
        return collected
