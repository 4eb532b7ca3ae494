"""Engines that run blocks in this process, and a small agent whose every edit shows in its returns."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dt_lens.behaviour.job import Row
from dt_lens.behaviour.sweep.blocks import Work, run_work
from dt_lens.behaviour.sweep.engines.engine import Event
from dt_lens.behaviour.sweep.sweep import Sweep


class Inline:
    """Runs blocks in this process; ``width`` are taken at a time and come back in an order that the seed decides."""

    def __init__(self, width: int = 1, seed: int = 0) -> None:
        self.width, self.random, self.pending = width, random.Random(seed), list[Work]()

    def start(self, job: Any) -> None:
        self.job = job

    @property
    def free(self) -> int:
        return self.width - len(self.pending)

    def submit(self, work: Work) -> None:
        self.pending.append(work)

    def wait(self, seconds: float) -> list[Event]:
        self.random.shuffle(self.pending)
        count = self.random.randint(1, max(1, len(self.pending)))
        taken, self.pending = self.pending[:count], self.pending[count:]
        return [Event("done", work.number, "here", self.rows(work)) for work in taken]

    def rows(self, work: Work) -> list[Row]:
        return run_work(self.job, work)

    def stop(self) -> None:
        self.pending.clear()


def key_of(job: Any) -> tuple[Any, ...]:
    """What an outcome depends on besides the edit and the seed."""
    job = job.job
    task, settings = job.made, (repr(job.cfg), job.context, job.padding, repr(job.conditions))
    return (job.weights, repr(task.spec), repr(task.kwargs), task.time_limit, *settings)


class Remembering(Inline):
    """Runs every episode once in a test session, for tests of what is done with outcomes.

    An outcome depends only on job, edit and seed; that this is so is checked with engines that remember nothing.
    """

    known: ClassVar[dict[tuple[Any, ...], Row]] = {}

    def rows(self, work: Work) -> list[Row]:
        keys = [(*key_of(self.job), work.change, seed) for seed in work.units]
        if any(key not in self.known for key in keys):
            self.known.update(zip(keys, super().rows(work), strict=True))
        return [self.known[key] for key in keys]


class Interrupted(Remembering):
    """Is interrupted, as by Ctrl-C, when it waits for the ``at``-th time."""

    def __init__(self, at: int, width: int = 1) -> None:
        super().__init__(width)
        self.left = at

    def wait(self, seconds: float) -> list[Event]:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().wait(seconds)


@pytest.fixture(scope="session")
def inline() -> type[Inline]:
    return Inline


@pytest.fixture(scope="session")
def remembering() -> type[Remembering]:
    return Remembering


@pytest.fixture(scope="session")
def interrupted() -> type[Interrupted]:
    return Interrupted


@pytest.fixture(scope="session")
def agent(make_model: Callable[..., Any]) -> Any:
    return make_model("Pendulum-v1")


@pytest.fixture(scope="session")
def known_steps() -> dict[tuple[Any, ...], str | None]:
    return {}


@pytest.fixture
def make_sweep(agent: Any, tmp_path: Path, known_steps: dict[tuple[Any, ...], str | None]) -> Callable[..., Sweep]:
    """A sweep of seven arms and 14 blocks by default."""

    def make(out: Path | None = None, model: Any = None, **options: Any) -> Sweep:
        chosen: dict[str, Any] = {"matrices": ["*.W_in", "*.0.mlp.W_out"], "sv": 0, "controls": 1, "episodes": 6}
        chosen |= {"block_size": 3, "max_steps": 9, "edits": "zero", "seed": 3, "workers": 1}
        sweep = Sweep(model or agent, tmp_path if out is None else out, **{**chosen, **options})
        if "environment" not in options:  # an agent's first steps are run once in a session
            key = key_of(sweep._job())
            if key not in known_steps:
                known_steps[key] = sweep._sample
            sweep._sample = known_steps[key]
        return sweep

    return make


@pytest.fixture(scope="session")
def finished_folders() -> dict[str, Path]:
    return {}


@pytest.fixture
def finished(
    make_sweep: Callable[..., Sweep], finished_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Sweep]:
    """A finished sweep: run once in a session with the same options, and a copy of its files from then on."""

    def make(out: Path | None = None, **options: Any) -> Sweep:
        key = repr(sorted(options.items()))
        if key not in finished_folders:
            whole = make_sweep(tmp_path_factory.mktemp("finished"), **options).run(engine=Remembering(2))
            finished_folders[key] = whole.file.parent
        sweep = make_sweep(out, **options)
        shutil.copytree(finished_folders[key], sweep.file.parent, dirs_exist_ok=True)
        return sweep

    return make
