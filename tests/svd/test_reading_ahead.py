"""Reading ahead: what is handed out, in which thread it is read, and how far ahead."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dt_lens.lens.matrices import Snapshot
from dt_lens.lens.shards import LazyTensors
from dt_lens.svd import reading_ahead as module
from dt_lens.svd.reading_ahead import ReadingAhead


def matrices(count: int) -> Any:
    return [SimpleNamespace(name=f"{i}", factors=[SimpleNamespace(weight=f"{i // 2}")]) for i in range(count)]


def lens(lazy: bool) -> Any:
    weights: Any = LazyTensors({"a": lambda: torch.zeros(1)}) if lazy else {"a": torch.zeros(1)}
    return Snapshot(weights, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("lazy", [False, True])
def test_every_matrix_has_what_was_read_of_it(lazy: bool) -> None:
    wanted, threads = matrices(30), set()

    def read(matrix: Any) -> str:
        threads.add(threading.current_thread())
        return f"read {matrix.name}"

    order = [*wanted[:6], wanted[8], wanted[7], wanted[6], wanted[20], *wanted[9:20], *wanted[21:], wanted[0]]
    with ReadingAhead(lens(lazy), wanted, read) as ahead:
        assert [ahead.take(matrix) for matrix in order] == [f"read {matrix.name}" for matrix in order]
    assert len(threads - {threading.current_thread()}) == lazy
    assert not any(thread.is_alive() for thread in threads - {threading.current_thread()})
    with ReadingAhead(lens(lazy), [], read):
        pass


def test_a_few_weights_are_read_ahead_and_no_more() -> None:
    done: list[str] = []
    wanted = matrices(40)

    def settled(count: int) -> bool:
        for _ in range(200):
            if len(done) >= count:
                break
            threading.Event().wait(0.01)
        threading.Event().wait(0.05)
        return len(done) == count

    with ReadingAhead(lens(True), wanted, lambda matrix: done.append(matrix.name)) as ahead:
        assert settled(2 * module.WEIGHTS)
        ahead.take(wanted[0])
        assert settled(2 * module.WEIGHTS)  # the first weight is still wanted
        ahead.take(wanted[1])
        assert settled(2 * module.WEIGHTS + 2)
    assert done == [matrix.name for matrix in wanted[: 2 * module.WEIGHTS + 2]]


def test_what_is_raised_is_raised_when_the_matrix_is_taken() -> None:
    def read(matrix: Any) -> None:
        if matrix.name == "2":
            raise ValueError("the third")

    wanted = matrices(4)
    with ReadingAhead(lens(True), wanted, read) as ahead:
        ahead.take(wanted[0])
        ahead.take(wanted[1])
        with pytest.raises(ValueError, match="the third"):
            ahead.take(wanted[2])
        ahead.take(wanted[3])
