"""A small agent, and engines for its sweeps: one with scripted outcomes, one that runs blocks in this process."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dt_lens
from dt_lens.behaviour.sweep.blocks import Work, run_work
from dt_lens.behaviour.sweep.engines.engine import Event
from dt_lens.behaviour.sweep.packing import Packed, Packer
from dt_lens.behaviour.sweep.plan import Arm
from dt_lens.behaviour.sweep.sweep import Sweep
from dt_lens.decision_transformer.checkpoint import save_pretrained
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.decision_transformer.model import HookedDecisionTransformer

UNEDITED = 1000.0


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    cfg = HookedDecisionTransformerConfig(
        3, 1, d_model=16, n_layers=2, n_heads=2, d_mlp=32, n_ctx=4, max_ep_len=30, discrete_actions=False
    )
    model = HookedDecisionTransformer(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.facts = RunFacts(
        context=4,
        environment="Pendulum-v1",
        state_mean=(0.0,) * 3,
        state_std=(1.0,) * 3,
        return_scale=100.0,
        target_returns=(200.0,),
    )
    return save_pretrained(model.eval(), tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="session")
def agent(folder: Path) -> Any:
    return dt_lens.load(folder, check=False)


def without_weights(packer: Any, arm: Arm) -> Packed:
    """What a sweep keeps of an arm, without the weights, which nobody runs here; they were most of a sweep's time."""
    if arm.record is None:
        return Packed(b"", 0.0, None, "unedited", "")
    edit = packer._edit(arm.record)
    return Packed(b"", edit.energy, packer._output_energy(edit), f"arm {arm.number}", edit.note)


class ScriptedEngine:
    """An engine that runs no episodes: returns are what each arm costs by the test's script, with a little noise."""

    free = 1

    def __init__(
        self, sweep: Sweep, lost: Callable[[Arm], float], stops: int | None = None, unedited: float = UNEDITED
    ) -> None:
        self.sweep, self.lost, self.stops, self.unedited = sweep, lost, stops, unedited
        self.events = list[Event]()
        self.patch = pytest.MonkeyPatch()

    def start(self, job: Any) -> None:
        self.patch.setattr(Packer, "_pack", without_weights)

    def submit(self, work: Work) -> None:
        with closing(sqlite3.connect(self.sweep.file)) as db:
            names = ("matrix", "sv", "directions", "control", "match")
            query = f"SELECT arm, kind, {', '.join(names)} FROM blocks JOIN arms USING (arm) WHERE block = ?"
            number, kind, *rest = db.execute(query, (work.number,)).fetchone()
        arm = Arm(number, kind, **dict(zip(names, rest, strict=True)))
        rng = np.random.default_rng(work.number)
        rows = [(seed, self.unedited - self.lost(arm) + rng.normal(), 30, False, True) for seed in work.units]
        self.events.append(Event("done", work.number, "nobody", rows))

    def wait(self, seconds: float) -> list[Event]:
        events, self.events = self.events, []
        if self.stops is not None and events and events[0].block >= self.stops:
            raise KeyboardInterrupt  # as Ctrl-C does
        return events

    def stop(self) -> None:
        self.patch.undo()


@pytest.fixture(scope="session")
def scripted() -> type[ScriptedEngine]:
    """The engine class: ``scripted(sweep, what an arm costs)``."""
    return ScriptedEngine


class InProcessEngine:
    """An engine that runs blocks in this process, one at a time: starting worker processes would take longer."""

    def __init__(self, workers: int) -> None:
        self.events = list[Event]()

    @property
    def free(self) -> int:
        return 1 - len(self.events)

    def start(self, job: Any) -> None:
        self.job = job

    def submit(self, work: Work) -> None:
        self.events.append(Event("done", work.number, "here", run_work(self.job, work)))

    def wait(self, seconds: float) -> list[Event]:
        events, self.events = self.events, []
        return events

    def stop(self) -> None:
        self.events.clear()


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Iterator[None]:
    """Sweeps run in this process; ``tests/behaviour/sweep`` is about worker processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dt_lens.behaviour.sweep.sweep.LocalEngine", InProcessEngine)
        yield
