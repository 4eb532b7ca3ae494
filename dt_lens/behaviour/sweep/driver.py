"""One run of a sweep: sends blocks to an engine and writes their outcomes to the store."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress

from dt_lens.behaviour.job import Job
from dt_lens.behaviour.sweep.blocks import Work
from dt_lens.behaviour.sweep.engines.engine import Engine, Event
from dt_lens.behaviour.sweep.packing import Packer
from dt_lens.behaviour.sweep.plan import Block
from dt_lens.behaviour.sweep.store import Store
from dt_lens.errors import DtLensError
from dt_lens.progress import ProgressCallback

__all__ = ["Driver"]

TRIES = 3  # a block whose worker has died so many times is given up in this run
WAIT_SECONDS = 0.5
REPORT_SECONDS = 1.0


class Driver:
    """Runs the blocks of a store until none is left that can be run.

    Args:
        store: an open store.
        packer: makes the arms' edits.
        todo: the blocks to run, from ``store.advance()``.
        blocks: how many the plan has so far, finished ones included.
        tell: receives the progress.
    """

    def __init__(
        self, store: Store, packer: Packer, todo: Sequence[Block], blocks: int, tell: ProgressCallback
    ) -> None:
        self.store, self.packer, self.tell = store, packer, tell
        self.todo, self.blocks = deque(todo), blocks
        self.running: dict[int, tuple[Block, int]] = {}  # by number: the block, and the number of its run
        self.tries: Counter[int] = Counter()
        self.slots = 1  # how many blocks the engine has run at once, or groups of them
        self.units = 0  # of the task, finished in this run
        self.began = self.reported = time.monotonic()

    def run(self, engine: Engine, job: Job) -> None:
        """Run everything that can be run."""
        self._report(force=True)
        try:
            engine.start(job)
            while self.todo:
                while self.todo or self.running:
                    for work in self._begin(engine.free, getattr(engine, "together", 1)):
                        engine.submit(work)
                    self._pack_next()
                    self._report()
                    events = engine.wait(WAIT_SECONDS)
                    if events:
                        with self.store.writing():
                            for event in events:
                                self._record(event)
                blocks, self.blocks = self.store.advance()  # the next rung
                self.todo.extend(blocks)
        except KeyboardInterrupt:
            left = len(self.todo) + len(self.running)
            raise KeyboardInterrupt(
                f"Stopped with {self.blocks - left} of {self.blocks} blocks done; the same command resumes from there."
            ) from None
        finally:
            engine.stop()
        self._report(force=True)

    def _begin(self, free: int, together: int) -> list[Work]:
        """The next blocks, in at most ``free`` groups of at most ``together``; they are logged as begun."""
        began: list[Work] = []
        self.slots = max(self.slots, free)
        if free and self.todo:
            with self.store.writing():
                while self.todo and len(began) < free:
                    # Smaller groups towards the end, so that no worker waits for another's last one.
                    most = min(together, math.ceil(len(self.todo) / (2 * self.slots)))
                    group: list[Work] = []
                    while self.todo and len(group) < most:
                        if group and self.tries[self.todo[0].number]:
                            break  # a block whose worker died runs alone, so that the others do not die with it
                        block = self.todo.popleft()
                        work = self._packed(block)
                        if work is not None:
                            self.running[block.number] = (block, self.store.begin(block.number))
                            group.append(work)
                        if self.tries[block.number]:
                            break
                    if group:
                        began.append(group[0]._replace(beside=tuple(tuple(work) for work in group[1:])))
        return began

    def _record(self, event: Event) -> None:
        block, run = self.running.pop(event.block)
        if event.kind == "done":
            self.store.finish(run, event)
            self.units += block.size
            return
        self.store.end(run, event)
        self.tries[event.block] += 1
        if event.kind == "refused":
            self.store.fail(event.block, event.message)
        elif self.tries[event.block] < TRIES:
            self.todo.appendleft(block)
        else:
            self.store.fail(event.block, f"The workers that ran it died {TRIES} times, last by {event.message}.")

    def _packed(self, block: Block) -> Work | None:
        """The block with its weights; ``None`` if the arm's edit cannot be put in force, which is written down."""
        try:
            packed = self.packer.pack(self.store.arms[block.arm])
        except DtLensError as error:
            self.store.void(block.arm, str(error))
            self.todo = deque(other for other in self.todo if other.arm != block.arm)
            return None
        known = self.store.model_id_of(block.arm)
        if known is None:
            self.store.set_packed(block.arm, packed)
        elif known != packed.model_id:
            raise DtLensError(
                f"Arm {block.arm} of the sweep comes out with other bits here than where it was begun; "
                "resume it on that machine, or start again in another folder."
            )
        return Work(block.number, packed.change, block.first, block.size)

    def _pack_next(self) -> None:
        """Make the next edit while the workers are busy, so that none has to wait for it."""
        if self.todo:
            with suppress(DtLensError):  # reported when its turn comes
                self.packer.pack(self.store.arms[self.todo[0].arm])

    def _report(self, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now < self.reported + REPORT_SECONDS:
            return
        self.reported = now
        blocks = [*self.todo, *(block for block, _ in self.running.values())]
        left, later = sum(block.size for block in blocks), self.store.units_ahead()
        done = self.blocks - len(blocks)
        rungs = len(self.store.rungs)
        text = f"rung {self.store.halving_state().rung + 1} of {rungs}: " if rungs > 1 else ""
        text += f"{done} of {self.blocks} blocks of {self.store.terms.units}"
        elapsed = now - self.began
        if self.units and elapsed > 0:
            rate = self.units / elapsed
            text += f"  {rate:.2g} {self.store.terms.units}/s, {duration((left + later) / rate)} left"
        per_block = left / len(blocks) if blocks else 1.0
        ahead = later / per_block  # blocks of later rungs
        self.tell(text, done / (self.blocks + ahead))


def duration(seconds: float) -> str:
    """Seconds as a rough duration.

    >>> duration(42), duration(600), duration(8000)
    ('42 s', '10 min', '2.2 h')
    """
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
