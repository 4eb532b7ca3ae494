"""Episodes in worker processes: each owns its environments, one torch thread and a copy of the weights.

Nothing here imports the hooked model, so a worker starts in the time that torch and Gymnasium take. The pool is
loky's reusable one: it needs no ``if __name__ == "__main__"`` in the user's script, works from Jupyter and from
standard input, and stays warm between evaluations.
"""

from __future__ import annotations

import os
import shutil
import signal
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from dt_lens.behaviour.agents.environment import Task
from dt_lens.behaviour.agents.lanes import arrange
from dt_lens.behaviour.agents.rollouts import Conditions, Outcome, run_episodes
from dt_lens.behaviour.agents.windows import SlidingPolicy
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import Padding
from dt_lens.decision_transformer.policy import ActingModel
from dt_lens.errors import DtLensError
from dt_lens.lens.forward_mode import one_thread

__all__ = ["Job", "Report", "run_in_workers", "run_job"]

Report = Callable[[int, float], None]
IDLE_SECONDS = 300  # how long a worker waits for more work before it leaves
REPORT_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """Everything a process needs to run its share of an evaluation."""

    weights: bytes  # safetensors
    cfg: dict[str, Any]
    context: int
    task: Task
    conditions: Conditions
    seeds: range
    lanes: int
    padding: Padding = "mask"


def run_job(job: Job, seeds: Iterator[int], report: Report | None = None) -> list[Outcome]:
    """Run ``seeds`` of ``job`` in this process."""
    with one_thread():
        model = ActingModel(load(job.weights), HookedDecisionTransformerConfig.from_dict(job.cfg))
        width, least_width, alone = arrange(model, job.context, job.lanes)
        policy = SlidingPolicy(model, job.context, width, alone=alone, padding=job.padding)
        return run_episodes(policy, job.task, job.conditions, seeds, least_width=least_width, report=report)


def run_in_workers(job: Job, workers: int, report: Report | None = None) -> list[Outcome]:
    """Run all seeds of ``job`` in ``workers`` processes.

    Raises:
        DtLensError: what a worker raises of the kind, or that a worker died.
    """
    from loky import get_reusable_executor

    executor = get_reusable_executor(
        max_workers=workers,
        timeout=IDLE_SECONDS,
        initializer=_start_worker,
        env={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    with tempfile.TemporaryDirectory(prefix="dt-lens-") as folder:
        try:
            futures = [executor.submit(_work, job, folder, number) for number in range(workers)]
            pending = set(futures)
            while pending:
                # A timeout, so that Ctrl-C is heard while waiting.
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


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    torch.set_num_threads(1)


def _work(job: Job, folder: str, number: int) -> list[Outcome]:
    file, due, parent = Path(folder, f"report-{number}"), 0.0, os.getppid()

    def report(finished: int, running: float) -> None:
        nonlocal due
        if (now := time.monotonic()) >= due:
            if os.getppid() != parent:  # killed outright, it could neither stop its workers nor tidy up
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(1)
            file.write_bytes(struct.pack("<qd", finished, running))
            due = now + REPORT_SECONDS

    return run_job(job, _claim(job.seeds, folder), report)


def _claim(seeds: range, folder: str) -> Iterator[int]:
    """The seeds that no other worker has taken: making a file of that name succeeds for one of them only.

    So nobody waits for a slower worker's share.
    """
    for seed in seeds:
        try:
            os.close(os.open(os.path.join(folder, str(seed)), os.O_CREAT | os.O_EXCL))  # noqa: PTH118
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
