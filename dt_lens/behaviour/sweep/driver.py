"""``Sweep``: plans the arms, hands their units to workers, and writes what comes back."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pandas as pd

from dt_lens.behaviour.evaluate import (
    _check_count,
    _check_model,
    _cores,
    model_id,
    portable_job,
    setting_of,
)
from dt_lens.behaviour.lanes import LEAST_LANES
from dt_lens.behaviour.outcomes import Evaluation, FailureRule
from dt_lens.behaviour.sweep.engine import Engine, Event
from dt_lens.behaviour.sweep.local import LocalEngine
from dt_lens.behaviour.sweep.packing import Packer
from dt_lens.behaviour.sweep.plan import FORMAT, SV, Block, Plan, block_size_of, make_arms, software
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.store import FILE, Store
from dt_lens.behaviour.sweep.units import Unit
from dt_lens.behaviour.workers import one_thread
from dt_lens.errors import DtLensError
from dt_lens.progress import Tell, reporting

__all__ = ["Sweep"]

TRIES = 3  # a unit whose workers die so often is given up in this run
WAIT_SECONDS = 0.5
TELL_SECONDS = 1.0


class Sweep:
    """Many edits of one agent, each with its controls, all over the same seeds as the unedited agent.

    Everything is kept in ``out/sweep.sqlite``. Stopped in whatever way, killed outright included, and run again with
    the same arguments, a sweep goes on where it was, and its table is the same to the bit as if it had never stopped:
    what a unit (one arm with one block of seeds) gives depends on nothing but itself, and is written whole or not at
    all.

    Args:
        model: a ``HookedDecisionTransformer`` on the CPU, without hooks.
        out: the folder of the file.
        matrices: names or shell patterns, such as ``"*.W_in"``; all matrices by default.
        sv: which singular directions of each, one edit for each: an index, ``"0-9"``, ``"all"``, or a sequence of
            these; negative ones count from the smallest sigma.
        sides: which sides are edited, such as ``["write"]``; by default every side on the residual stream, and one of
            them where the edit only scales sigma and is the same on each.
        edits: what the singular vector becomes: values of ``SingularEdit``, numbers or ``"scale:0.5"``.
        controls: random edits of the same energy per edit: ``edit.control(seed)``, ``edit.control(seed + 1)``, ...
        episodes: of every arm.
        seed: of the first episode, of the controls, and of ``"random"`` edits.
        environment, environment_kwargs, target_return, max_steps: as for ``evaluate``.
        block_size: episodes of a unit; about 16 by default.
        baseline: run the unedited agent too, which differences need.
        fold_layernorm: as for ``SingularEdit``.
        workers: processes, each on one core; one a core by default. Changes nothing but the time.

    Raises:
        DtLensError: for arguments that do not fit the model, and for a model that cannot run in other processes.
    """

    def __init__(
        self,
        model: Any,
        out: str | Path,
        *,
        matrices: Sequence[str] | str | None = None,
        sv: SV = 0,
        sides: Sequence[str] | str | None = None,
        edits: Sequence[Any] | str | float = ("constant",),
        controls: int = 0,
        episodes: int = 20,
        seed: int = 0,
        environment: str | None = None,
        environment_kwargs: Mapping[str, Any] | None = None,
        target_return: float | None = None,
        max_steps: int | None = None,
        block_size: int | None = None,
        baseline: bool = True,
        fold_layernorm: bool = True,
        workers: int | None = None,
    ) -> None:
        if hasattr(model, "tokenizer"):
            raise DtLensError("This is a language model, and a sweep runs agents; use evaluate for its texts.")
        _check_model(model)
        for name, value, least in (("controls", controls, 0), ("episodes", episodes, 1), ("seed", seed, 0)):
            _check_count(name, value, least)
        for name, size in (("max_steps", max_steps), ("block_size", block_size), ("workers", workers)):
            if size is not None:
                _check_count(name, size, 1)
        if getattr(model, "active_edits", ()):
            raise DtLensError("The model has an edit in force; end it first: a sweep makes its own.")
        self.model = model
        self.file = Path(out) / FILE
        self.workers = workers
        setting = setting_of(model, environment, environment_kwargs, target_return, max_steps, "the sweep")
        job = portable_job(model, setting.task, setting.conditions, range(0), LEAST_LANES)
        if job is None:
            raise DtLensError(
                "This agent cannot run in other processes, because it is not on the CPU, has hooks or a state encoder "
                "of its own; move it, take its hooks off, or use evaluate."
            )
        self._job = job
        values = edits.split(",") if isinstance(edits, str) else [edits] if isinstance(edits, float | int) else edits
        with one_thread():
            arms = make_arms(
                model,
                matrices,
                sv,
                [sides] if isinstance(sides, str) else sides,
                list(values),
                int(controls),
                int(seed),
                baseline,
                fold_layernorm,
            )
        directions: dict[str, list[int]] = {}
        for arm in arms:
            if arm.kind == "edit" and arm.matrix is not None and arm.sv is not None:
                directions.setdefault(arm.matrix, [])
                if arm.sv not in directions[arm.matrix]:
                    directions[arm.matrix].append(arm.sv)
        options: dict[str, Any] = {
            "format": FORMAT,
            "model": model_id(model),
            "matrices": list(directions),
            "sv": directions,
            "sides": sorted({arm.side for arm in arms if arm.side is not None}),
            "edits": list(dict.fromkeys(arm.value for arm in arms if arm.value is not None)),
            "controls": int(controls),
            "episodes": int(episodes),
            "seed": int(seed),
            "environment": setting.environment,
            "environment_kwargs": setting.environment_kwargs,
            "target_return": setting.target_return,
            "time_limit": setting.task.time_limit,
            "block_size": block_size_of(int(episodes), block_size),
            "baseline": baseline,
            "fold_layernorm": fold_layernorm,
            **software(),
        }
        self.plan = Plan(options, arms)

    def run(self, progress: bool | Tell = False, engine: Engine | None = None) -> Self:
        """Run what is not done yet.

        Args:
            progress: ``True`` for a bar on standard error, or a function of (what is being done, share done).
            engine: what runs the units; worker processes of this machine by default.

        Raises:
            DtLensError: when the file holds another sweep, is damaged, cannot be written or is another driver's, when
                the model has changed since the plan was made, or when no worker can run.
            KeyboardInterrupt: on Ctrl-C, with a sentence; what was finished is kept.
        """
        if model_id(self.model) != self.plan.options["model"]:
            raise DtLensError("The model's weights have changed since this sweep was planned; make the Sweep again.")
        with reporting(progress) as tell, Store.open(self.file, self.plan) as store:
            todo = store.todo()
            if todo:
                _Drive(self, store, todo, tell).run(engine or LocalEngine(min(self.workers or _cores(), len(todo))))
        return self

    @property
    def results(self) -> SweepResults:
        """What the file holds so far."""
        return SweepResults(self.file)

    def table(self, *, failure: FailureRule | None = None, confidence: float = 0.95) -> pd.DataFrame:
        """A row per edit and control; see ``SweepResults.table``."""
        return self.results.table(failure=failure, confidence=confidence)

    def episodes(self) -> pd.DataFrame:
        """A row per episode; see ``SweepResults.episodes``."""
        return self.results.episodes()

    def evaluations(self) -> dict[int, Evaluation]:
        """An ``Evaluation`` for every arm that has episodes, by its number in the table."""
        return self.results.evaluations()


class _Drive:
    """One run of the driver."""

    def __init__(self, sweep: Sweep, store: Store, todo: Sequence[Block], tell: Tell) -> None:
        self.sweep, self.store, self.tell = sweep, store, tell
        self.todo = deque(todo)
        self.packer = Packer(sweep.model)
        self.running: dict[int, tuple[Block, int]] = {}  # by unit: what, and the number of its run
        self.tries: Counter[int] = Counter()
        self.all = sum(1 for _ in sweep.plan.blocks())
        self.episodes = self.before = sweep.plan.options["episodes"] * len(sweep.plan.arms) - sum(
            block.episodes for block in todo
        )
        self.began = self.told = time.monotonic()

    def run(self, engine: Engine) -> None:
        self._report(force=True)
        try:
            engine.start(self.sweep._job)
            while self.todo or self.running:
                for unit in self._begun(engine.free):
                    engine.submit(unit)
                self._look_ahead()
                self._report()
                events = engine.wait(WAIT_SECONDS)
                if events:
                    with self.store.writing():
                        for event in events:
                            self._keep(event)
        except KeyboardInterrupt:
            left = len(self.todo) + len(self.running)
            raise KeyboardInterrupt(
                f"Stopped with {self.all - left} of {self.all} units done; the same command goes on from there."
            ) from None
        finally:
            engine.stop()
        self._report(force=True)

    def _begun(self, free: int) -> list[Unit]:
        """The next units, as many as can be begun, logged as begun."""
        began: list[Unit] = []
        if free and self.todo:
            with self.store.writing():
                while self.todo and len(began) < free:
                    block = self.todo.popleft()
                    unit = self._packed(block)
                    if unit is not None:
                        self.running[block.number] = (block, self.store.begin(block.number))
                        began.append(unit)
        return began

    def _keep(self, event: Event) -> None:
        block, run = self.running.pop(event.unit)
        if event.kind == "done":
            self.store.finish(run, event)
            self.episodes += block.episodes
            return
        self.store.end(run, event)
        self.tries[event.unit] += 1
        if event.kind == "refused":
            self.store.fail(event.unit, event.said)
        elif self.tries[event.unit] < TRIES:
            self.todo.appendleft(block)
        else:
            self.store.fail(event.unit, f"The workers that ran it died {TRIES} times, last by {event.said}.")

    def _packed(self, block: Block) -> Unit | None:
        """The unit as it travels; ``None`` where the arm's edit cannot be put in force, which is kept."""
        try:
            packed = self.packer.pack(self.sweep.plan.arms[block.arm])
        except DtLensError as error:
            self.store.void(block.arm, str(error))
            self.todo = deque(other for other in self.todo if other.arm != block.arm)
            return None
        known = self.store.model_id_of(block.arm)
        if known is None:
            self.store.describe(block.arm, packed.energy, packed.model_id, packed.note)
        elif known != packed.model_id:
            raise DtLensError(
                f"Arm {block.arm} of the sweep comes out with other bits here than where it was begun; "
                "go on with it on that machine, or begin anew in another folder."
            )
        return Unit(block.number, packed.change, block.seed, block.episodes)

    def _look_ahead(self) -> None:
        """Make the next edit while the workers are busy, so that none waits for it."""
        if self.todo:
            with suppress(DtLensError):  # said when its turn comes
                self.packer.pack(self.sweep.plan.arms[self.todo[0].arm])

    def _report(self, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now < self.told + TELL_SECONDS:
            return
        self.told = now
        left = len(self.todo) + len(self.running)
        total = self.sweep.plan.options["episodes"] * len(self.sweep.plan.arms)
        new, elapsed = self.episodes - self.before, now - self.began
        text = f"{self.all - left} of {self.all} units"
        if new and elapsed > 0:
            rate = new / elapsed
            text += f"  {rate:.2g} episodes/s, {_duration((total - self.episodes) / rate)} left"
        self.tell(text, (self.all - left) / self.all)


def _duration(seconds: float) -> str:
    """
    >>> _duration(42), _duration(600), _duration(8000)
    ('42 s', '10 min', '2.2 h')
    """
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
