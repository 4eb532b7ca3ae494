"""Worker processes on this machine, each on one core. One that dies is replaced, and only its own block runs again.

``evaluate`` has another pool, loky's (``dt_lens.behaviour.agents.workers``), because the two need opposite things. When
one of loky's workers is killed its pool breaks, and what the other workers run is lost. A sweep runs for days and must
survive that, so this engine owns its processes and replaces them one by one. ``evaluate`` runs for seconds: its workers
stay warm between calls, and take seeds one at a time while they run, so that no lane idles at the end. The workers of a
sweep live as long as one run and take whole blocks, because a block is what is written, or run again.
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

from dt_lens.behaviour.job import Job
from dt_lens.behaviour.sweep.blocks import Work
from dt_lens.behaviour.sweep.engines.engine import Event, EventBuffer
from dt_lens.behaviour.sweep.engines.worker import read_frame, write_frame
from dt_lens.errors import DtLensError

__all__ = ["LocalEngine"]

DRAIN_SECONDS = 1.0  # for reading what is left in the pipe of a worker that has ended
STARTS = 3  # if so many workers in a row die before they are ready, none will be


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    reader: threading.Thread = field(init=False)  # reads its messages until its pipe ends
    ready: bool = False
    blocks: list[int] = field(default_factory=list)  # that it runs

    @property
    def name(self) -> str:
        return f"process {self.process.pid}"


class LocalEngine:
    """Runs blocks in ``workers`` processes of this Python.

    The processes are started anew, not forked, and do not import the calling script: it needs no ``if __name__ ==
    "__main__"``, and neither torch's threads nor the state of other code is inherited.
    """

    together = 4  # blocks that a worker runs side by side at most

    def __init__(self, workers: int) -> None:
        self.count = workers
        self._workers: list[_Worker] = []
        self._inbox: queue.SimpleQueue[tuple[_Worker, bytes | None]] = queue.SimpleQueue()
        self._failed_starts = 0
        self._buffer = EventBuffer()

    def start(self, job: Job) -> None:
        # Environments and tasks of the user's script are classes that a worker cannot import.
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
            start_new_session=True,  # Ctrl-C in a terminal reaches only the driver
        )
        worker = _Worker(process)
        self._workers.append(worker)
        worker.reader = threading.Thread(target=self._read, args=(worker,), daemon=True)
        worker.reader.start()
        self._send(worker, self._job)

    def _read(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        with worker.process.stdout as answers:
            while (frame := read_frame(answers)) is not None:
                self._inbox.put((worker, frame))
        self._inbox.put((worker, None))

    def _send(self, worker: _Worker, message: bytes) -> None:
        assert worker.process.stdin is not None
        with contextlib.suppress(OSError):  # it has just died, which the end of its other pipe shows
            write_frame(worker.process.stdin, message)

    @property
    def free(self) -> int:
        return sum(worker.ready and not worker.blocks for worker in self._workers)

    def submit(self, work: Work) -> None:
        worker = next(w for w in self._workers if w.ready and not w.blocks)
        worker.blocks = [work.number, *(number for number, *_ in work.beside)]
        self._send(worker, pickle.dumps(tuple(work)))

    def wait(self, seconds: float) -> list[Event]:
        self._find_ended()
        return self._buffer.collect(self._events(seconds))

    def _events(self, seconds: float) -> Iterator[Event]:
        with contextlib.suppress(queue.Empty):
            worker, frame = self._inbox.get(timeout=seconds)
            while True:
                yield from self._handle(worker, frame)
                worker, frame = self._inbox.get_nowait()

    def _find_ended(self) -> None:
        """Find workers that have ended though their pipe has not: a process that they forked holds it open."""
        for worker in self._workers:
            if worker.process.poll() is not None:
                worker.reader.join(DRAIN_SECONDS)
                if worker.reader.is_alive():
                    self._inbox.put((worker, None))

    def _handle(self, worker: _Worker, frame: bytes | None) -> list[Event]:
        if worker not in self._workers:  # it has been replaced already
            return []
        if frame is None:
            return self._replace(worker)
        kind, *rest = pickle.loads(frame)
        if kind == "broken":
            raise DtLensError(f"A worker process cannot run this model: {rest[0].rstrip('.')}.")
        if kind == "ready":
            worker.ready, self._failed_starts = True, 0
            return []
        block = rest[0]
        worker.blocks.remove(block)
        if kind == "done":
            return [Event("done", block, worker.name, rest[1])]
        return [Event("refused", block, worker.name, message=rest[1])]

    def _replace(self, worker: _Worker) -> list[Event]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=2)  # its pipe closes a little before it has ended
        status = _end(worker)
        self._workers.remove(worker)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= max(STARTS, self.count + 1):
                raise DtLensError(
                    f"Worker processes end before they are ready ({status}); see what they print above, and whether "
                    "there is enough memory for so many workers."
                )
        self._spawn()
        return [Event("died", block, worker.name, message=status) for block in worker.blocks]

    def stop(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            _end(worker)
        self._workers.clear()


def _end(worker: _Worker) -> str:
    """Kill a process if it still runs, and say how it ended."""
    process = worker.process
    process.kill()
    status = process.wait()
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()  # the other pipe is closed by its reader, which may still be reading
    return f"signal {-status}" if status < 0 else f"exit status {status}"
