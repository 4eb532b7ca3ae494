"""Worker processes for ``evaluate``: each claims seeds one by one and runs their episodes on one torch thread.

The pool is loky's reusable one: it needs no ``if __name__ == "__main__"`` in the user's script, works from Jupyter and
from standard input, and stays warm, so that the next evaluation starts at once.

A sweep has worker processes of its own; ``dt_lens.behaviour.sweep.engines.local`` says why.
"""

from __future__ import annotations

import os
import shutil
import signal
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch

from dt_lens.behaviour.agents.rollouts import EpisodeCount, Outcome, Start
from dt_lens.errors import DtLensError

__all__ = ["Work", "interrupts_blocked", "run_in_workers"]

Starts = Sequence[int | Start]
Work = Callable[[Iterator[Any], EpisodeCount | None], list[Outcome]]  # runs the seeds that it draws
IDLE_SECONDS = 300  # how long a worker waits for more work before it leaves
REPORT_SECONDS = 0.2


def run_in_workers(work: Work, seeds: Starts, workers: int, report: EpisodeCount | None = None) -> list[Outcome]:
    """Run all ``seeds`` in ``workers`` processes; ``work`` runs in each of them, on the seeds that it claims.

    Raises:
        DtLensError: if ``work`` raises one, or if a worker dies.
    """
    from loky import get_reusable_executor

    with interrupts_blocked():
        executor = get_reusable_executor(
            max_workers=workers,
            timeout=IDLE_SECONDS,
            initializer=_start_worker,
            env={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
    with tempfile.TemporaryDirectory(prefix="dt-lens-") as folder:
        try:
            with interrupts_blocked():
                futures = [executor.submit(_work, work, seeds, folder, number) for number in range(workers)]
            pending = set(futures)
            while pending:
                # A timeout, so that Ctrl-C is noticed while waiting.
                done, pending = wait(pending, timeout=REPORT_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if report is not None:
                    report(*_read_reports(folder, workers))
            return [outcome for future in futures for outcome in future.result()]
        except BrokenProcessPool as error:
            executor.shutdown(wait=True, kill_workers=True)
            raise DtLensError(
                "A rollout worker died (killed, out of memory, or crashed inside the environment); "
                "run evaluate again with fewer workers, or workers=1 to see the crash in this process."
            ) from error
        except BaseException:
            executor.shutdown(wait=True, kill_workers=True)
            raise


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Hold Ctrl-C back while worker processes are started; it arrives afterwards.

    A terminal sends it to the whole group, and a new process would answer it with a traceback before it has come to the
    line that ignores it. It inherits the mask, which keeps the signal from it for good. Windows has no such masks.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Before Python 3.12 starting it unblocks the signal, and the first worker process would start it.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    torch.set_num_threads(1)


def _work(work: Work, seeds: Starts, folder: str, number: int) -> list[Outcome]:
    file, due, parent = Path(folder, f"report-{number}"), 0.0, os.getppid()

    def report(finished: int, running: float) -> None:
        nonlocal due
        if (now := time.monotonic()) >= due:
            if os.getppid() != parent:  # the parent was killed outright: it neither stopped its workers nor tidied up
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(1)
            file.write_bytes(struct.pack("<qd", finished, running))
            due = now + REPORT_SECONDS

    return work(_claim(seeds, folder), report)


def _claim(seeds: Starts, folder: str) -> Iterator[int | Start]:
    """The seeds that no other worker has taken: making a file of that number succeeds for one of them only.

    So no worker waits for a slower one's share.
    """
    for number, seed in enumerate(seeds):
        try:
            os.close(os.open(os.path.join(folder, str(number)), os.O_CREAT | os.O_EXCL))  # noqa: PTH118
        except FileExistsError:
            continue
        yield seed


def _read_reports(folder: str, workers: int) -> tuple[int, float]:
    finished, running = 0, 0.0
    for number in range(workers):
        try:
            finished_here, running_here = struct.unpack("<qd", Path(folder, f"report-{number}").read_bytes())
        except (FileNotFoundError, struct.error):  # not begun, or read in the middle of a write
            continue
        finished += finished_here
        running += running_here
    return finished, running
