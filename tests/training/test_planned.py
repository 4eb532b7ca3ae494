"""A planner's recording repeats exactly, resumes after an interruption, is disturbed as asked, and refuses the rest."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from dt_lens.behaviour.evaluate import evaluate
from dt_lens.decision_transformer.environment_factors import environment_factors
from dt_lens.decision_transformer.environment_labels import environment_labels
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.errors import DtLensError
from dt_lens.training import planned as module
from dt_lens.training.agent import train
from dt_lens.training.dataset import Trajectories, read
from dt_lens.training.planned import record_planned
from dt_lens.training.planners import planner_for
from dt_lens.training.settings import AgentSettings

TINY: dict[str, Any] = {"episodes": 16, "seed": 3, "noises": (0.0, 0.3), "scattered": 0.5}
ONE_HOT: dict[str, Any] = {
    "max_steps": 40,
    "wrappers": [
        {"name": "minigrid.wrappers.OneHotPartialObsWrapper", "kwargs": {}},
        {"name": "gymnasium.wrappers.FilterObservation", "kwargs": {"filter_keys": ["direction", "image"]}},
    ],
}


@pytest.fixture(autouse=True)
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path


def same(a: Trajectories, b: Trajectories) -> bool:
    parts = ("states", "actions", "rewards", "lengths")
    return all(np.array_equal(getattr(a, part), getattr(b, part)) for part in parts)


def states(data: Trajectories) -> list[int]:
    """The first state of each episode."""
    return [int(state) for state in data.states[data.starts].argmax(1)]


def test_a_recording_repeats_and_resumes_with_the_same_bits(minari_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_planned("Taxi-v4", "test/whole-v0", **TINY, workers=1, folder=minari_root / "a")
    monkeypatch.setattr(module, "CHUNK", 5)

    def stop(phase: str, done: int, total: int, words: str) -> None:
        if phase == "episodes" and done == 13:
            raise KeyboardInterrupt

    again: dict[str, Any] = {**TINY, "workers": 1, "folder": minari_root / "b"}
    with pytest.raises(KeyboardInterrupt):
        record_planned("Taxi-v4", "test/again-v0", **again, report=stop)
    assert len(list((minari_root / "b").glob("planned-*.npz"))) == 2
    played: list[int] = []
    record_planned(
        "Taxi-v4", "test/again-v0", **again, report=lambda phase, done, *_: played.append(done * (phase == "episodes"))
    )
    assert min(done for done in played if done) == 11  # ten were read back
    whole = read("test/whole-v0")
    assert same(whole, read("test/again-v0")) and whole.environment == "Taxi-v4"
    record_planned("Taxi-v4", "test/other-v0", **{**TINY, "seed": 4}, workers=1, folder=minari_root / "b")
    assert not same(whole, read("test/other-v0"))
    with pytest.raises(DtLensError, match="has a data set 'test/other-v0' already"):
        record_planned("Taxi-v4", "test/other-v0", **TINY, workers=1)


def test_noise_and_scattered_starts_are_as_asked(minari_root: Path) -> None:
    """Taxi begins with a waiting passenger who wants to go elsewhere; an expert earns 3 or more from anywhere."""
    record_planned("Taxi-v4", "test/plain-v0", episodes=20, noises=(0.0,), workers=1, folder=minari_root / "a")
    record_planned(
        "Taxi-v4", "test/spread-v0", episodes=20, noises=(0.0, 0.6), scattered=1, workers=1, folder=minari_root / "b"
    )
    plain, spread = read("test/plain-v0"), read("test/spread-v0")
    assert plain.returns.min() >= 3 and all(state // 4 % 5 != 4 for state in states(plain))
    assert sum(state // 4 % 5 == 4 for state in states(spread)) >= 2
    assert spread.returns[::2].min() >= 3 > np.median(spread.returns[1::2])


def test_a_minigrids_episodes_begin_with_a_wait(minari_root: Path) -> None:
    pytest.importorskip("minigrid")
    name = "minigrid:MiniGrid-DoorKey-5x5-v0"
    how: dict[str, Any] = {"episodes": 8, "noises": (0.0,), "waiting": 1, "longest_wait": 0.5, "workers": 1}
    record_planned(name, "test/grid-v0", environment_kwargs=ONE_HOT, **how, folder=minari_root / "a")
    data = read("test/grid-v0")
    assert data.environment == name and data.environment_kwargs == ONE_HOT and not data.normalised
    taken = np.split(data.actions.argmax(1), data.starts[1:])
    waits = [int((actions != 6).argmax()) for actions in taken]
    assert (
        max(waits) <= 20 and len(set(waits)) > 4 and all((a[w:] != 6).all() for a, w in zip(taken, waits, strict=True))
    )
    assert np.allclose(data.returns, 1 - 0.9 * data.lengths / 40) and data.lengths.max() < 40
    # An agent of these data has the names and factors of its states, and runs in the environment that they name.
    settings = AgentSettings(steps=1, d_model=8, n_layers=1, context=2, targets=(0.9,), bf16=False)
    model = train("test/grid-v0", minari_root / "agent", settings, eval_every=0)
    facts, factors = RunFacts.load(minari_root / "agent"), environment_factors(name, ONE_HOT)
    assert facts is not None and facts.factors == {"state_in": factors}
    assert (facts.state_labels, facts.action_labels) == environment_labels(name, ONE_HOT)
    found = evaluate(model, episodes=2, workers=1)
    assert found.time_limit == 40 and found.environment == name


@pytest.mark.parametrize(
    ("name", "how", "sentence"),
    [
        ("Taxi-v4", {"waiting": 0.5}, "'Taxi-v4' has no action that does nothing; record with waiting=0"),
        ("Taxi-v4", {"noises": (1.5,)}, "noises is 1.5; it must be a share, from 0 to 1"),
        ("Taxi-v4", {"noises": ()}, "noises is empty"),
        ("Taxi-v4", {"scattered": -1}, "scattered is -1; it must be a share"),
        ("CartPole-v1", {}, "No planner knows 'CartPole-v1': planners know"),
        ("CliffWalking-v1", {}, "'CliffWalking-v1' has no time limit"),
        (
            "FrozenLake-v1",
            {"environment_kwargs": {"map_name": None}},
            "'FrozenLake-v1' has other dynamics each time it is made, .* map_name='4x4'",
        ),
        (
            "minigrid:MiniGrid-Unlock-v0",
            {"environment_kwargs": ONE_HOT},
            "The planner finds no way to a goal in 'MiniGrid-Unlock-v0': .* a cell 'goal'",
        ),
        ("NoSuch-v0", {}, "no Gymnasium environment 'NoSuch-v0'"),
        ("minigrid:MiniGrid-Empty-5x5-v0", {}, "Minari cannot store the observations .*FilterObservation"),
        (
            "minigrid:MiniGrid-Empty-5x5-v0",
            {"environment_kwargs": ONE_HOT, "scattered": 1},
            "MiniGrid's episodes start where the environment starts them; record with scattered=0",
        ),
    ],
)
def test_what_cannot_be_recorded_is_refused(name: str, how: dict[str, Any], sentence: str, minari_root: Path) -> None:
    if name.startswith("minigrid"):
        pytest.importorskip("minigrid")
    with pytest.raises(DtLensError, match=sentence):
        record_planned(name, "test/x-v0", **how, workers=1, folder=minari_root / "x")


def test_an_episode_without_a_way_to_a_goal_is_refused() -> None:
    pytest.importorskip("minigrid")
    spec = module._spec("minigrid:MiniGrid-Unlock-v0", ONE_HOT).to_json()
    for wait in (0.0, 0.5):
        with pytest.raises(DtLensError, match="The planner finds no way to a goal in 'MiniGrid-Unlock-v0'"):
            module._play(module._Job(spec, 1, 0.0, wait, False))


def test_numpys_numbers_are_taken_and_ids_that_are_none_refused(minari_root: Path) -> None:
    numbers: dict[str, Any] = {"episodes": np.int64(2), "seed": np.int64(2), "noises": (0.0,), "workers": 1}
    for name, how in (("test/a-v0", numbers), ("test/b-v0", {**numbers, "episodes": 2, "seed": 2})):
        record_planned("Taxi-v4", name, **how, folder=minari_root / "a")
    assert same(read("test/a-v0"), read("test/b-v0"))
    with pytest.raises(DtLensError, match="5 is not a Minari id"):
        record_planned("Taxi-v4", 5, episodes=2)  # type: ignore[arg-type]


def test_what_cannot_be_made_is_not_taken_for_continuous(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.acts_discretely("Taxi-v4", {"is_rainy": True}) and not module.acts_discretely("Pendulum-v1", {})
    with pytest.raises(DtLensError, match=r"Gymnasium cannot make the environment 'Taxi-v4': .*rainy"):
        module.acts_discretely("Taxi-v4", {"rainy": True})
    with pytest.raises(DtLensError, match="no Gymnasium environment 'NoSuch-v0'"):
        module.acts_discretely("NoSuch-v0", {})
    monkeypatch.setitem(sys.modules, "minigrid", None)
    with pytest.raises(DtLensError, match=r"needs the package minigrid, .* pip install 'dt-lens\[minigrid\]'"):
        module.acts_discretely("minigrid:MiniGrid-Empty-5x5-v0", {})


def test_a_grid_of_the_users_own_class_has_no_planner() -> None:
    class MiniGridEnv(gym.Env[Any, Any]):
        observation_space, action_space = gym.spaces.Box(0, 1, (2,)), gym.spaces.Discrete(2)

    assert planner_for(MiniGridEnv()) is None


def test_names_are_those_of_the_keywords_that_the_user_confirms(
    minari_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sure = {"is_slippery": False, "map_name": "4x4"}
    how: dict[str, Any] = {"episodes": 2, "noises": (0.0,), "workers": 1, "folder": minari_root / "a"}
    record_planned("FrozenLake-v1", "test/ice-v0", environment_kwargs={**sure, "success_rate": 0.5}, **how)
    data = read("test/ice-v0")
    settings = AgentSettings(steps=1, d_model=8, n_layers=1, context=2, targets=(1.0,), bf16=False)
    with pytest.warns(UserWarning, match="get neither labels nor factors, .* pass environment_kwargs="):
        model = train("test/ice-v0", minari_root / "one", settings, eval_every=0)
    assert model.facts.factors is None
    model = train(
        "test/ice-v0", minari_root / "two", settings, eval_every=0, environment_kwargs=data.environment_kwargs
    )
    assert model.facts.factors is not None and model.facts.state_labels is not None
    assert set(model.facts.factors["state_in"]) == {"row", "column", "tile"}
    # Where the data name no environment, the one that the user names.
    bare = replace(data, environment=None, environment_kwargs=None)
    monkeypatch.setattr("dt_lens.training.agent.read", lambda *_: bare)
    model = train("test/ice-v0", minari_root / "three", settings, eval_every=0, environment="FrozenLake-v1")
    assert model.facts.factors is not None and set(model.facts.factors["state_in"]) == {"row", "column", "tile"}
