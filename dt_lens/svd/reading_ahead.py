"""Read the weights of the next matrices from their files while one matrix is computed with."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

from dt_lens.lens.matrices import Matrix, Snapshot
from dt_lens.lens.shards import LazyTensors

__all__ = ["ReadingAhead"]

Made = TypeVar("Made")
WEIGHTS = 4  # different weights at most that are read before their turn: then they lie in the system's file cache


class ReadingAhead(Generic[Made]):
    """What ``read`` returns for each of some matrices, to be taken in their order, or nearly so.

    Where weights are read from files at every access, ``read`` runs in a thread of its own, ahead of the matrix that is
    taken, so that the disk works while the processor does. One weight is mapped at a time, so that this takes little
    memory. Weights that are in memory are read when they are taken. Leaving ``with`` ends the thread.

    Args:
        lens: the weights that ``read`` reads.
        matrices: in the order in which they will be taken.
        read: reads a matrix's weights, and returns something small, such as their hash. What it raises is raised when
            the matrix is taken.
    """

    def __init__(self, lens: Snapshot, matrices: Sequence[Matrix], read: Callable[[Matrix], Made]) -> None:
        self._read, self._lock = read, threading.Lock()
        self._following: deque[Matrix] = deque()
        self._waiting: dict[str, tuple[Matrix, Future[Made]]] = {}
        self._pool: ThreadPoolExecutor | None = None
        if isinstance(lens.weights, LazyTensors) and matrices:
            self._following.extend(matrices)
            self._pool = ThreadPoolExecutor(1, "dt_lens_reading_ahead")
            self._submit()

    def take(self, matrix: Matrix) -> Made:
        """What ``read`` returns for this matrix. Any thread may call it."""
        with self._lock:
            while matrix.name not in self._waiting and self._following:
                self._submit_next()
            _, made = self._waiting.pop(matrix.name, (None, None))
        found = self._read(matrix) if made is None else made.result()
        with self._lock:
            self._submit()
        return found

    def _submit(self) -> None:
        while self._following:
            ahead = {factor.weight for matrix, _ in self._waiting.values() for factor in matrix.factors}
            if self._waiting and len(ahead | {factor.weight for factor in self._following[0].factors}) > WEIGHTS:
                return
            self._submit_next()

    def _submit_next(self) -> None:
        assert self._pool is not None
        matrix = self._following.popleft()
        self._waiting[matrix.name] = matrix, self._pool.submit(self._read, matrix)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._following.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
