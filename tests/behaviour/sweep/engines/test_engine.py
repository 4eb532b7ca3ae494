"""Events that engines report."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dt_lens.behaviour.sweep.engines.engine import Event, EventBuffer
from dt_lens.errors import DtLensError


def test_events_before_an_error_are_returned_first() -> None:
    def events(count: int) -> Iterator[Event]:
        for unit in range(count):
            yield Event("done", unit, "here")
        raise DtLensError("This is the end.")

    buffer = EventBuffer()
    assert buffer.collect([]) == []
    assert [event.block for event in buffer.collect(events(2))] == [0, 1]
    for _ in range(2):
        with pytest.raises(DtLensError, match="the end"):
            buffer.collect([Event("done", 5, "here")])
    with pytest.raises(DtLensError, match="the end"):
        EventBuffer().collect(events(0))
