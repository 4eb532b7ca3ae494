"""The protocol between a sweep's driver and whatever runs its blocks: local processes, or a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

from dt_lens.behaviour.job import Job, Row
from dt_lens.behaviour.sweep.blocks import Work
from dt_lens.errors import DtLensError

__all__ = ["EventBuffer", "Engine", "Event"]


class Event(NamedTuple):
    """What happened to a block.

    ``"done"``: it ran. ``"refused"``: it raised an error, and would again. ``"died"``: the process that ran it is gone;
    it can be submitted again.
    """

    kind: Literal["done", "refused", "died"]
    block: int
    worker: str  # which process ran it, for the log
    rows: Sequence[Row] = ()  # by unit: its number, then its measures
    message: str = ""  # the error's sentence, or how the process died


class Engine(Protocol):
    """Runs blocks; knows nothing of the store. Every submitted block comes back as exactly one event.

    An engine with a number ``together`` above 1 also takes up to so many blocks as one: one with others ``beside`` it.
    """

    def start(self, job: Job) -> None:
        """Prepare to run blocks of ``job``."""
        ...

    @property
    def free(self) -> int:
        """How many more blocks can be submitted now."""
        ...

    def submit(self, work: Work) -> None:
        """Start a block. Not to be called when ``free`` is 0."""
        ...

    def wait(self, seconds: float) -> list[Event]:
        """The events since the last call; waits for the first one, but no longer than ``seconds``.

        Raises:
            DtLensError: if no block can be run at all.
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
