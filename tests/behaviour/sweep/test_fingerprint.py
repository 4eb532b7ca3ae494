"""A sweep is resumed only where it comes to the same bits: the same environment behind the id, the same steps."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.envs.registration import EnvSpec

from dt_lens.behaviour.agents.fingerprint import registration
from dt_lens.behaviour.sweep.fingerprint import fingerprint
from dt_lens.errors import DtLensError

Make = Callable[..., Any]
NAME = "Other-v0"


class Drifting(PendulumEnv):
    """Pendulums, no two of them equal."""

    made = 0

    def __init__(self, **options: Any) -> None:
        type(self).made += 1
        super().__init__(g=10.0 + type(self).made, **options)


class Broken(PendulumEnv):
    def step(self, action: Any) -> Any:
        raise RuntimeError(f"no step at {id(self)}")


class Heavier(PendulumEnv):
    """Another pendulum, to be registered under the same id."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.m = 2.0


@pytest.fixture
def register() -> Iterator[Callable[..., str]]:
    """Registers an environment under one id, another one each time."""

    def register(entry_point: Any = PendulumEnv, **options: Any) -> str:
        gym.registry.pop(NAME, None)
        gym.register(NAME, entry_point, **{"max_episode_steps": 200, **options})
        return NAME

    yield register
    gym.registry.pop(NAME, None)


def forget(file: Any, *names: str) -> None:
    """Remove these options from the file."""
    with closing(sqlite3.connect(file)) as db, db:
        (text,) = db.execute("SELECT options FROM plan").fetchone()
        options = {name: value for name, value in json.loads(text).items() if name not in names}
        db.execute("UPDATE plan SET options = ?", (json.dumps(options),))


def test_another_environment_under_the_same_name(make_sweep: Make, inline: Make, register: Make) -> None:
    sweep = make_sweep(environment=register(kwargs={"g": 10.0}))
    sweep.run(engine=inline())
    for options, said in (
        ({"kwargs": {"g": 1.0}}, r'{"kwargs": {"g": 10.0}} and this one\'s {"kwargs": {"g": 1.0}};'),
        ({"kwargs": {"g": 10.0}, "max_episode_steps": 100}, r'{"max_episode_steps": 200} and this one\'s'),
        ({"entry_point": Heavier, "kwargs": {"g": 10.0}}, r"Heavier"),
    ):
        with pytest.raises(DtLensError, match=f"holds another sweep: its registration is .*{said}") as caught:
            make_sweep(environment=register(**options), controls=2).run(engine=inline())
        assert "\n" not in str(caught.value)
    make_sweep(environment=register(kwargs={"g": 10.0}), controls=2).run(engine=inline())


def test_other_steps_under_the_same_registration(
    make_sweep: Make, inline: Make, register: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another processor, or with changed code of the environment."""
    make_sweep(environment=register(Heavier)).run(engine=inline())
    init = Heavier.__init__

    def changed(self: Any, **options: Any) -> None:
        init(self, **options)
        self.m = 3.0

    monkeypatch.setattr(Heavier, "__init__", changed)
    sweep = make_sweep(environment=NAME, episodes=7)
    with pytest.raises(DtLensError, match=r"first episodes come to other bits here than where .* was begun .*; resume"):
        sweep.run(engine=inline())
    assert sweep.results.options["units"] == 6  # nothing was written


def test_options_that_a_file_lacks_are_added(make_sweep: Make, finished: Make, remembering: Make) -> None:
    whole = finished()
    table, options = whole.table(), whole.results.options
    forget(whole.file, "registration", "sample")
    again = make_sweep().run(engine=remembering())
    pd.testing.assert_frame_equal(again.table(), table, check_exact=True)
    assert again.results.options == options


def test_a_file_of_another_arithmetic_is_not_continued(make_sweep: Make, finished: Make, remembering: Make) -> None:
    """Files from before edits acted as low-rank changes do not say how they were computed."""
    forget(finished().file, "version of the policy's arithmetic")
    with pytest.raises(DtLensError, match="its version of the policy's arithmetic is null and this one's 3; give"):
        make_sweep(controls=2).run(engine=remembering())


def test_an_agent_whose_steps_never_repeat_can_resume(make_sweep: Make, inline: Make, register: Make) -> None:
    sweep = make_sweep(environment=register(Drifting)).run(engine=inline())
    assert sweep.results.options["sample"] is None
    make_sweep(environment=NAME, controls=2).run(engine=inline())


def test_an_environment_that_raises_has_a_fingerprint(make_sweep: Make, register: Make) -> None:
    job = make_sweep(environment=register(Broken))._job()
    assert job.sample() == job.sample() != make_sweep()._job().sample()
    assert fingerprint(job) == fingerprint(job)


def test_a_registration_is_plain_and_repeats() -> None:
    kwargs = {"size": np.int64(3), "where": np.arange(2), "made_by": PendulumEnv, "thing": object()}
    found = registration(EnvSpec("A-v0", entry_point="gymnasium.envs.classic_control:PendulumEnv", kwargs=kwargs))
    assert json.loads(json.dumps(found)) == found
    assert found["kwargs"]["size"] == 3 and found["kwargs"]["where"] == [0, 1]
    assert found["kwargs"]["made_by"].endswith(":PendulumEnv") and found["kwargs"]["thing"] == "builtins:object"
    assert found["package"] == f"gymnasium {gym.__version__}"
    assert registration(EnvSpec("A-v0", entry_point=Broken))["package"] is None
