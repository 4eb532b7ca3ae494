"""A worker process, ``python -m dt_lens.behaviour.sweep.engines.worker``: reads blocks from one pipe, writes outcomes
to another.

It reads in a thread of its own, so that it notices in the middle of a block that the driver has ended, and exits at
once. It writes to nothing but its pipe.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import struct
import threading
from typing import IO, Any

__all__ = ["main", "read_frame", "write_frame"]

_LENGTH = struct.Struct("<Q")


def write_frame(pipe: IO[bytes], message: bytes) -> None:
    """Send one message."""
    pipe.write(_LENGTH.pack(len(message)) + message)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> bytes | None:
    """The next message; ``None`` if the other side has closed the pipe, even in the middle of a message."""
    try:
        head = pipe.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack(head)
        message = pipe.read(length)
    except (OSError, ValueError):  # closed
        return None
    return message if len(message) == length else None


def main() -> None:
    """Run blocks until the driver closes its end of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the driver, which ends the workers
    # What a task prints must not be mixed with the outcomes.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # A process that an environment forks closes its sys.stdin, which must not be the pipe on which the thread waits:
    # the fork would wait for ever for the thread's lock.
    orders = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        while (frame := read_frame(orders)) is not None:
            inbox.put(frame)
        os._exit(0)

    def answer(*message: Any) -> None:
        try:
            write_frame(answers, pickle.dumps(message))
        except OSError:
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    job = None
    try:
        import torch

        from dt_lens.behaviour.sweep.blocks import Work, run_together, run_work
        from dt_lens.errors import DtLensError, because

        torch.set_num_threads(1)
        job = pickle.loads(inbox.get())
    except BaseException as error:
        answer("broken", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return
    answer("ready")
    while True:
        first = Work(*pickle.loads(inbox.get()))
        works = [first._replace(beside=()), *(Work(*work) for work in first.beside)]
        for work in run_together(job, works, lambda work, rows: answer("done", work.number, rows)):
            try:
                answer("done", work.number, [tuple(row) for row in run_work(job, work)])
            except DtLensError as error:
                answer("refused", work.number, str(error))
            except Exception as error:  # a task, and the environment of one, may raise anything
                answer("refused", work.number, f"The task raised {type(error).__name__}: {because(error)}.")


if __name__ == "__main__":
    main()
