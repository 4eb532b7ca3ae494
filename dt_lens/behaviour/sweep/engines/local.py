"""Worker processes on this machine, each on one core. One that dies is replaced; its unit is reported dead.

``evaluate`` has a pool of its own (``dt_lens.behaviour.agents.workers``), loky's, which stays warm between evaluations.
It does not suit a sweep: when one of its workers dies the whole pool breaks, and what the other workers run is lost.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import cloudpickle

from dt_lens.behaviour.agents.rollouts import Outcome
from dt_lens.behaviour.agents.running import Job
from dt_lens.behaviour.sweep.engines.engine import Event, EventBuffer
from dt_lens.behaviour.sweep.engines.worker import read_frame, write_frame
from dt_lens.behaviour.sweep.units import Unit
from dt_lens.errors import DtLensError

__all__ = ["LocalEngine"]

DRAIN_SECONDS = 1.0  # for what a worker that has ended still said
STARTS = 3  # so many workers in a row that die before they are ready mean that none will be


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    listener: threading.Thread = field(init=False)  # reads what it says until its pipe ends
    ready: bool = False
    unit: int | None = None

    @property
    def name(self) -> str:
        return f"process {self.process.pid}"


class LocalEngine:
    """``workers`` processes of this Python.

    They are no children by fork, and no copies of the calling script: a script needs no ``if __name__ ==
    "__main__"``, and neither torch's threads nor an environment's state is inherited.
    """

    def __init__(self, workers: int) -> None:
        self.count = workers
        self._workers: list[_Worker] = []
        self._inbox: queue.SimpleQueue[tuple[_Worker, bytes | None]] = queue.SimpleQueue()
        self._failed_starts = 0
        self._ear = EventBuffer()

    def start(self, job: Job) -> None:
        # Environments that the user's script registers are classes that a worker cannot import.
        self._job = cloudpickle.dumps(job)
        for _ in range(self.count):
            self._spawn()

    def _spawn(self) -> None:
        path = os.pathsep.join(part or os.getcwd() for part in sys.path)  # noqa: PTH109
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dt_lens.behaviour.sweep.engines.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            start_new_session=True,  # a terminal's Ctrl-C goes to the driver alone
        )
        worker = _Worker(process)
        self._workers.append(worker)
        worker.listener = threading.Thread(target=self._listen, args=(worker,), daemon=True)
        worker.listener.start()
        self._send(worker, self._job)

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        with worker.process.stdout as said:
            while (frame := read_frame(said)) is not None:
                self._inbox.put((worker, frame))
        self._inbox.put((worker, None))

    def _send(self, worker: _Worker, message: bytes) -> None:
        assert worker.process.stdin is not None
        with contextlib.suppress(OSError):  # it has just died, which its end of the other pipe tells
            write_frame(worker.process.stdin, message)

    @property
    def free(self) -> int:
        return sum(worker.ready and worker.unit is None for worker in self._workers)

    def submit(self, unit: Unit) -> None:
        worker = next(w for w in self._workers if w.ready and w.unit is None)
        worker.unit = unit.number
        self._send(worker, pickle.dumps(tuple(unit)))

    def wait(self, seconds: float) -> list[Event]:
        self._look()
        return self._ear.hear(self._events(seconds))

    def _events(self, seconds: float) -> Iterator[Event]:
        with contextlib.suppress(queue.Empty):
            worker, frame = self._inbox.get(timeout=seconds)
            while True:
                yield from self._heard(worker, frame)
                worker, frame = self._inbox.get_nowait()

    def _look(self) -> None:
        """Hear of workers that have ended though their pipe has not: a process that one forked holds it open."""
        for worker in self._workers:
            if worker.process.poll() is not None:
                worker.listener.join(DRAIN_SECONDS)
                if worker.listener.is_alive():
                    self._inbox.put((worker, None))

    def _heard(self, worker: _Worker, frame: bytes | None) -> list[Event]:
        if worker not in self._workers:  # its end was heard of already
            return []
        if frame is None:
            return self._lost(worker)
        kind, *rest = pickle.loads(frame)
        if kind == "broken":
            raise DtLensError(f"A worker process cannot run this agent: {rest[0].rstrip('.')}.")
        if kind == "ready":
            worker.ready, self._failed_starts = True, 0
            return []
        unit, worker.unit = worker.unit, None
        assert unit is not None and unit == rest[0]
        if kind == "done":
            return [Event("done", unit, worker.name, [Outcome(*row) for row in rest[1]])]
        return [Event("refused", unit, worker.name, said=rest[1])]

    def _lost(self, worker: _Worker) -> list[Event]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=2)  # its pipe closes a little before it has ended
        status = _end(worker)
        self._workers.remove(worker)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= max(STARTS, self.count + 1):
                raise DtLensError(
                    f"Worker processes end before they are ready ({status}); see what they print above, and whether "
                    "memory suffices for so many workers."
                )
        self._spawn()
        return [] if worker.unit is None else [Event("died", worker.unit, worker.name, said=status)]

    def stop(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            _end(worker)
        self._workers.clear()


def _end(worker: _Worker) -> str:
    """End a process for good; how it ended."""
    process = worker.process
    process.kill()
    status = process.wait()
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()  # the other pipe is its listener's to close: it may still be reading
    return f"signal {-status}" if status < 0 else f"exit status {status}"
