"""Engines that run units in this process, and a small agent whose every edit shows in its returns."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from dt_lens.behaviour.sweep.engines.engine import Event
from dt_lens.behaviour.sweep.sweep import Sweep
from dt_lens.behaviour.sweep.units import Unit, run_unit


class Inline:
    """Runs units in this process; ``width`` are taken at a time and come back in an order of the seed's."""

    def __init__(self, width: int = 1, seed: int = 0) -> None:
        self.width, self.random, self.pending = width, random.Random(seed), list[Unit]()

    def start(self, job: Any) -> None:
        self.job, self.base = job, load(job.weights)

    @property
    def free(self) -> int:
        return self.width - len(self.pending)

    def submit(self, unit: Unit) -> None:
        self.pending.append(unit)

    def wait(self, seconds: float) -> list[Event]:
        self.random.shuffle(self.pending)
        count = self.random.randint(1, max(1, len(self.pending)))
        taken, self.pending = self.pending[:count], self.pending[count:]
        return [Event("done", unit.number, "here", run_unit(self.job, self.base, unit)) for unit in taken]

    def stop(self) -> None:
        self.pending.clear()


@pytest.fixture
def inline() -> type[Inline]:
    return Inline


@pytest.fixture(scope="session")
def agent(make_model: Callable[..., Any]) -> Any:
    return make_model("Pendulum-v1")


@pytest.fixture
def make_sweep(agent: Any, tmp_path: Path) -> Callable[..., Sweep]:
    """A sweep of seven arms and 14 units by default, in seconds."""

    def make(out: Path | None = None, model: Any = None, **options: Any) -> Sweep:
        chosen: dict[str, Any] = {"matrices": ["*.W_in", "*.0.mlp.W_out"], "sv": 0, "controls": 1, "episodes": 6}
        chosen |= {"block_size": 3, "max_steps": 9, "edits": "zero", "seed": 3, "workers": 1}
        return Sweep(model or agent, tmp_path if out is None else out, **{**chosen, **options})

    return make
