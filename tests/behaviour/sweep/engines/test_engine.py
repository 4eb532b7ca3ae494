"""What is heard from those who run units."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dt_lens.behaviour.sweep.engines.engine import Event, EventBuffer
from dt_lens.errors import DtLensError


def test_no_event_is_lost_to_an_error_after_it() -> None:
    def events(count: int) -> Iterator[Event]:
        for unit in range(count):
            yield Event("done", unit, "here")
        raise DtLensError("This is the end.")

    ear = EventBuffer()
    assert ear.hear([]) == []
    assert [event.unit for event in ear.hear(events(2))] == [0, 1]
    for _ in range(2):
        with pytest.raises(DtLensError, match="the end"):
            ear.hear([Event("done", 5, "here")])
    with pytest.raises(DtLensError, match="the end"):
        EventBuffer().hear(events(0))
