"""Worker processes whose environment starts processes of its own."""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from dt_lens.behaviour.sweep.engines.engine import Event
from dt_lens.behaviour.sweep.engines.local import LocalEngine
from dt_lens.errors import DtLensError

Make = Callable[..., Any]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")

# A Pendulum that asks a forked process at every step, as environments with a simulator of their own do.
HELPED = """
import multiprocessing, os, pathlib, signal, time
from gymnasium.envs.classic_control import PendulumEnv

fork = multiprocessing.get_context("fork")

def serve(pipe, worker, kill):
    end = time.monotonic() + 300  # it outlives a worker that is killed
    while time.monotonic() < end:
        if pipe.poll(1):
            if kill and not pathlib.Path(kill).exists():
                pathlib.Path(kill).write_text(str(os.getpid()))
                os.kill(worker, signal.SIGKILL)
            pipe.send(pipe.recv())

class Helped(PendulumEnv):
    def __init__(self, kill="", driver=0, **options):
        super().__init__(**options)
        kill = "" if os.getpid() == driver else kill
        self.pipe, other = fork.Pipe()
        self.helper = fork.Process(target=serve, args=(other, os.getpid(), kill), daemon=True)
        self.helper.start()

    def step(self, action):
        self.pipe.send(action)
        return super().step(self.pipe.recv())

    def close(self):
        self.helper.terminate()
        self.helper.join()
        super().close()
"""


@pytest.fixture
def helped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The id of such an environment."""
    (tmp_path / "a_helped_pendulum.py").write_text(HELPED)
    monkeypatch.syspath_prepend(tmp_path)
    gym.register("Helped-v0", "a_helped_pendulum:Helped", max_episode_steps=200)
    yield "Helped-v0"
    del gym.registry["Helped-v0"]
    sys.modules.pop("a_helped_pendulum", None)


class Hasty(LocalEngine):
    """Does not wait for ever: raises after a minute without an event."""

    def wait(self, seconds: float) -> list[Event]:
        self.silent = getattr(self, "silent", 0) + 1
        events = super().wait(seconds)
        if events:
            self.silent = 0
        if self.silent > 120:
            raise DtLensError("Nothing has happened for a minute.")
        return events


def test_a_process_that_the_environment_forks(make_sweep: Make, finished: Make, tmp_path: Path, helped: str) -> None:
    options = {"matrices": "*.0.mlp.W_in", "controls": 0}
    whole = finished(tmp_path / "plain", **options)
    sweep = make_sweep(tmp_path / "helped", environment=helped, **options).run(engine=Hasty(1))
    assert sweep.results.status() == {"todo": 0, "done": 4, "failed": 0, "void": 0}
    assert list(sweep.episodes()["return"]) == list(whole.episodes()["return"])


def test_a_worker_is_killed_and_what_it_forked_stays(make_sweep: Make, tmp_path: Path, helped: str) -> None:
    """The pipe of such a worker does not end with it."""
    killed = tmp_path / "killed"
    options = {"environment": helped, "environment_kwargs": {"kill": str(killed), "driver": os.getpid()}}
    sweep = make_sweep(**options, matrices="*.0.mlp.W_in", controls=0)
    try:
        sweep.run(engine=Hasty(1))
    finally:
        os.kill(int(killed.read_text()), signal.SIGKILL)  # raises if it has ended
    with closing(sqlite3.connect(sweep.file)) as db:
        results = [result for (result,) in db.execute("SELECT result FROM runs ORDER BY run")]
    assert results == ["died", "died", *["done"] * 4]  # the block that ran beside it died with it
