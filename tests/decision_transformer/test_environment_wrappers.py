"""An environment's time limit and wrappers as plain JSON values: the same environment comes back, step by step."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import wrappers as w

from dt_lens.decision_transformer.environment_wrappers import describe_environment, specify
from dt_lens.decision_transformer.facts import RunFacts, given_facts
from dt_lens.errors import DtLensError
from dt_lens.lens.environment_names import FileKeywords, specification


def _steps(env: Any) -> tuple[list[Any], list[float], int]:
    """What an episode of random actions gives; at most 12 steps."""
    space, rng = env.action_space, np.random.default_rng(3)
    space.seed(3)
    seen, rewards = [env.reset(seed=5)[0]], []
    for _ in range(12):
        action = rng.uniform(-1, 1, space.shape).astype(np.float32) if isinstance(space, gym.spaces.Box) else None
        observation, reward, terminated, truncated, _ = env.step(space.sample() if action is None else action)
        seen.append(observation)
        rewards.append(float(reward))
        if terminated or truncated:
            break
    env.close()
    return seen, rewards, len(rewards)


def _pendulum(**options: Any) -> Any:
    return gym.make("Pendulum-v1", disable_env_checker=True, **options)


WRAPPED: dict[str, Any] = {
    "rescaled actions": lambda: w.RescaleAction(_pendulum(), np.array([-4.0]), 4.0),
    "rescaled observations": lambda: w.RescaleObservation(_pendulum(), np.array([-3, -2, -1]), np.array([1, 2, 3])),
    "the time as an observation": lambda: w.TimeAwareObservation(_pendulum(max_episode_steps=9)),
    "a stack of frames": lambda: w.FrameStackObservation(_pendulum(), 3, padding_type="zero"),
    "several": lambda: w.TimeLimit(w.FlattenObservation(w.FrameStackObservation(w.ClipReward(_pendulum(), -1), 2)), 7),
    "another shape": lambda: w.ReshapeObservation(_pendulum(), (3, 1)),
    "another type": lambda: w.DtypeObservation(w.RescaleObservation(_pendulum(), -2.0, 2.0), np.float16),
    "keywords": lambda: _pendulum(g=5.0, render_mode="rgb_array"),
    "no limit": lambda: _pendulum(max_episode_steps=-1),
    "only watched": lambda: w.RecordEpisodeStatistics(_pendulum()),
    "as it is registered": _pendulum,
}


@pytest.mark.parametrize("case", WRAPPED)
def test_the_same_environment_comes_back(case: str) -> None:
    spec = WRAPPED[case]().spec
    name, kwargs = describe_environment(spec)
    stored = json.loads(json.dumps(kwargs, allow_nan=False))
    assert name == "Pendulum-v1" and "render_mode" not in stored
    assert bool(stored) == (case not in ("only watched", "as it is registered"))
    back, own = specify(gym.spec(name), stored)
    assert back.max_episode_steps == spec.max_episode_steps
    again, before = _steps(gym.make(back, disable_env_checker=True, **own)), _steps(WRAPPED[case]())
    assert again[1:] == before[1:]
    np.testing.assert_array_equal(again[0], before[0])
    if case not in ("no limit", "only watched", "as it is registered"):
        bare = _steps(_pendulum())
        assert again[1:] != bare[1:] or np.shape(again[0]) != np.shape(bare[0]) or not np.array_equal(again[0], bare[0])
    assert gym.spec(name).max_episode_steps == 200 and not gym.spec(name).additional_wrappers  # left as it was


class Halved(gym.RewardWrapper[Any, Any], gym.utils.RecordConstructorArgs):
    def __init__(self, env: Any, by: float = 2.0) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, by=by)
        gym.RewardWrapper.__init__(self, env)
        self.by = by

    def reward(self, reward: Any) -> float:
        return float(reward) / self.by


def _halved_from_inside() -> Any:
    from gymnasium.envs.classic_control import PendulumEnv

    return Halved(PendulumEnv(), 4.0)


@pytest.fixture
def own() -> Iterator[list[str]]:
    """Ids that are registered with a wrapper of ours: one by Gymnasium's means, one in the function that makes it."""
    names = ["dt-lens-test/Halved-v0", "dt-lens-test/Inside-v0"]
    entry = "gymnasium.envs.classic_control:PendulumEnv"
    gym.register(names[0], entry, max_episode_steps=5, additional_wrappers=(Halved.wrapper_spec(by=3.0),))
    gym.register(names[1], _halved_from_inside, max_episode_steps=5)
    yield names
    for name in names:
        del gym.registry[name]


def test_wrappers_that_an_environment_is_registered_with_stay(own: list[str]) -> None:
    for name in own:
        env = w.RescaleAction(gym.make(name, disable_env_checker=True), -4, 4)
        place, kwargs = describe_environment(env.spec)  # type: ignore[arg-type]
        assert place == name and [wrapper["name"] for wrapper in kwargs["wrappers"]] == [
            f"{__name__}.Halved",
            "gymnasium.wrappers.RescaleAction",
        ]
        kwargs = json.loads(json.dumps(kwargs))
        back, rest = specify(gym.spec(name), kwargs)
        assert _steps(gym.make(back, disable_env_checker=True, **rest))[1:] == _steps(env)[1:]
        # What the user names goes around what is registered.
        back, rest = specify(gym.spec(name), {"wrappers": kwargs["wrappers"][1:]})
        env = w.RescaleAction(gym.make(name, disable_env_checker=True), -4, 4)
        assert _steps(gym.make(back, disable_env_checker=True, **rest))[1:] == _steps(env)[1:]


def test_an_id_that_is_not_registered_here_keeps_everything_and_names_its_package(own: list[str]) -> None:
    spec = gym.make(own[0], disable_env_checker=True).spec
    assert spec is not None
    gym.registry[own[0]].entry_point = spec.entry_point = "some_package.envs:Env"
    assert describe_environment(spec)[0] == own[0]  # registered, and not by that package, which is not imported
    spec.id = "Elsewhere-v0"
    place, kwargs = describe_environment(spec)
    assert place == "some_package:Elsewhere-v0"
    assert kwargs == {"max_episode_steps": 5, "wrappers": [{"name": f"{__name__}.Halved", "kwargs": {"by": 3.0}}]}


@pytest.mark.parametrize(
    ("package", "sentence"), [("mylab", "import it yourself"), ("__main__", "own class.*register")]
)
def test_another_class_under_a_registered_id_is_asked_for(package: str, sentence: str) -> None:
    spec = copy.deepcopy(gym.spec("Pendulum-v1"))
    spec.entry_point = "gymnasium.envs.elsewhere:PendulumEnv"  # another version of Gymnasium
    assert describe_environment(spec) == ("Pendulum-v1", {})
    spec.entry_point = f"{package}.envs:HeavyPendulum"
    assert describe_environment(spec) == (f"{package}:Pendulum-v1", {})
    with pytest.raises(DtLensError, match=sentence):
        specification(f"{package}:Pendulum-v1")


@pytest.mark.parametrize(
    ("name", "kwargs", "sentence"),
    [
        (
            "antigravity.Fly",
            {},
            "'antigravity.Fly' of 'Pendulum-v1' is in neither .* environment=",
        ),
        ("Fly", {}, "is in neither gymnasium.wrappers nor"),
        ("gymnasium.wrappers.vector.ClipAction", {}, "is in neither"),
        ("gymnasium.wrappers.RescaleActions", {}, "not a wrapper of gymnasium.wrappers.*mean 'RescaleAction'"),
        ("gymnasium.wrappers.vector", {}, "not a wrapper of gymnasium.wrappers"),
        ("gymnasium.wrappers.importlib", {}, "not a wrapper of gymnasium.wrappers"),
        ("gymnasium.wrappers.NormalizeObservation", {}, "running statistics.*environment="),
        ("gymnasium.wrappers.RecordVideo", {"video_folder": "x"}, "only records, draws or checks"),
        ("gymnasium.wrappers.OrderEnforcin", {}, "not a wrapper of gymnasium.wrappers(?!.*OrderEnforcing')"),
        ("gymnasium.wrappers.TransformReward", {"func": "<function f>"}, "takes a function as func.*environment="),
        ("gymnasium.wrappers.TransformObservation", {"func": "os.system", "observation_space": None}, "takes a funct"),
        ("gymnasium.wrappers.FrameStackObservation", {"stack_size": 10**9}, "stack_size=1000000000; .*most 10,000"),
        ("gymnasium.wrappers.ReshapeObservation", {"shape": [3, 10**9]}, "shape=1000000000; .*most 10,000"),
        ("gymnasium.wrappers.RescaleAction", None, r"does not record.*\(min_action, max_action\).*environment="),
    ],
)
def test_a_wrapper_that_cannot_be_looked_up_is_one_sentence(name: str, kwargs: Any, sentence: str) -> None:
    with pytest.raises(DtLensError, match=sentence) as caught:
        specify(gym.spec("Pendulum-v1"), {"wrappers": [{"name": name, "kwargs": kwargs}]})
    assert "\n" not in str(caught.value) and "antigravity" not in sys.modules


def test_a_function_of_the_users_is_called() -> None:
    gym.register("dt-lens-test/Typed-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=5,
                 additional_wrappers=(w.DtypeObservation.wrapper_spec(dtype=np.float32),))  # fmt: skip
    try:
        given = {"name": "gymnasium.wrappers.TransformReward", "kwargs": {"func": lambda reward: reward * 2}}
        spec, own = specify(gym.spec("dt-lens-test/Typed-v0"), {"wrappers": [given]})
        doubled, plain = gym.make(spec, **own), gym.make("dt-lens-test/Typed-v0")
        assert _steps(doubled)[1] == [2 * reward for reward in _steps(plain)[1]]
    finally:
        del gym.registry["dt-lens-test/Typed-v0"]


def test_a_minigrid_wrapper_without_arguments_needs_none_recorded() -> None:
    pytest.importorskip("minigrid")
    for name in ("ObservationWrapper", "Anny", "FullObsWrapper"):
        with pytest.raises(DtLensError, match=r"not a wrapper of minigrid\.wrappers\.") as caught:
            specify(gym.spec("Pendulum-v1"), {"wrappers": [{"name": f"minigrid.wrappers.{name}", "kwargs": {}}]})
        # Only what is a wrapper of that module is suggested, not what it imports.
        assert not str(caught.value).endswith(("'ObservationWrapper'?", "'Any'?"))
    assert str(caught.value).endswith("Did you mean 'FullyObsWrapper'?")
    from minigrid.wrappers import FlatObsWrapper, FullyObsWrapper, ImgObsWrapper

    env = ImgObsWrapper(FullyObsWrapper(gym.make("MiniGrid-Empty-5x5-v0", disable_env_checker=True)))
    name, kwargs = describe_environment(env.spec)
    assert name == "minigrid:MiniGrid-Empty-5x5-v0" and [x["kwargs"] for x in kwargs["wrappers"]] == [None, None]
    back, own = specify(gym.spec("MiniGrid-Empty-5x5-v0"), kwargs)
    again = gym.make(back, disable_env_checker=True, **own)
    assert again.observation_space == env.observation_space and _steps(again)[1:] == _steps(env)[1:]
    flat = describe_environment(FlatObsWrapper(gym.make("MiniGrid-Empty-5x5-v0")).spec)[1]
    with pytest.raises(DtLensError, match=r"does not record.*\(maxStrLen\)"):
        specify(gym.spec("MiniGrid-Empty-5x5-v0"), flat)


def test_a_files_keywords_are_not_confirmed_by_standing_beside_wrappers() -> None:
    limit = FileKeywords(max_episode_steps=7, render_mode="human")
    assert specify(gym.spec("Pendulum-v1"), limit)[1] == {}
    with pytest.raises(DtLensError, match="keyword g=5, which it is not registered with"):
        specify(gym.spec("Pendulum-v1"), FileKeywords(limit, g=5))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"environment_kwargs": {"max_episode_steps": 0}}, "max_episode_steps of .* is 0; it must be a whole number"),
        ({"environment_kwargs": {"max_episode_steps": "9"}}, "max_episode_steps of .* is '9'"),
        ({"environment_kwargs": {"wrappers": "RescaleAction"}}, "wrappers of .*; it must be a list such as"),
        (
            {"environment_kwargs": {"wrappers": [{"name": "x", "kwargs": {}, "entry_point": "x:y"}]}},
            "wrappers of",
        ),
        ({"environment_kwargs": {"wrappers": [{"kwargs": {}}]}}, "wrappers of"),
        ({"evaluation_environment": "Hopper-v5"}, "evaluation_environment is 'Hopper-v5'; it must be None, or an env"),
        ({"evaluation_environment": {"id": "Hopper-v5"}}, "evaluation_environment is"),
        ({"evaluation_environment": {"id": "A-v0", "kwargs": {"wrappers": [3]}}}, "wrappers of .*evaluation_env"),
    ],
)
def test_facts_refuse_what_is_no_environment(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DtLensError, match=sentence):
        RunFacts.from_dict({"context": 3, **values})


def test_which_environment_an_agent_runs_in() -> None:
    rescale = [{"name": "gymnasium.wrappers.RescaleAction", "kwargs": {"min_action": -1, "max_action": 1}}]
    trained = {"max_episode_steps": 40, "wrappers": rescale}
    alone = RunFacts(3, "a:A-v0", trained)
    assert alone.environment_for() == ("a:A-v0", trained, "")
    assert alone.environment_for("A-v0") == ("A-v0", trained, "")
    assert alone.environment_for("B-v0") == ("B-v0", {}, "") and alone.environment_for("B-v0", {"g": 1})[1] == {"g": 1}
    assert alone.environment_for(None, {"g": 1})[1] == {**trained, "g": 1}  # a keyword says nothing of the wrappers
    assert alone.environment_for(None, {"wrappers": []})[1] == {"max_episode_steps": 40, "wrappers": []}
    both = RunFacts(3, "A-v0", trained, evaluation_environment={"id": "A-v0", "kwargs": {}})
    assert both.environment_for() == both.environment_for("A-v0") == ("A-v0", {}, "evaluation")
    assert both.environment_for("A-v0", trained) == ("A-v0", trained, "training")
    other = RunFacts(3, "A-v0", trained, evaluation_environment={"id": "B-v0", "kwargs": {}})
    assert other.environment_for() == ("B-v0", {}, "evaluation") and other.environment_for("A-v0")[2] == "training"
    assert other.environment_for("C-v0") == ("C-v0", {}, "") and RunFacts(3).environment_for()[0] is None
    assert "evaluation_environment" not in alone.to_dict() and "evaluation_environment" in both.to_dict()


def test_keywords_of_the_users_change_what_the_agent_runs_in_and_not_what_it_was_trained_in() -> None:
    rescale = [{"name": "gymnasium.wrappers.RescaleAction", "kwargs": {"min_action": -1, "max_action": 1}}]
    trained = {"max_episode_steps": 40, "wrappers": rescale}
    kept = RunFacts(3, "A-v0", trained, evaluation_environment={"id": "B-v0", "kwargs": {"max_episode_steps": 60}})
    facts = given_facts(kept, {"environment_kwargs": {"g": 5.0}})
    assert (facts.environment, facts.environment_kwargs) == ("A-v0", trained)
    assert facts.evaluation_environment == {"id": "B-v0", "kwargs": {"max_episode_steps": 60, "g": 5.0}}
    same = replace(kept, evaluation_environment={"id": "A-v0", "kwargs": {}})
    facts = given_facts(same, {"environment_kwargs": trained})  # the training data's own: that is where it runs
    assert facts.environment_for() == ("A-v0", trained, "")
    # Whoever names an environment runs in that one alone; whoever names both has both.
    facts = given_facts(kept, {"environment": "A-v0", "environment_kwargs": {"g": 5.0}})
    assert facts.environment_for() == ("A-v0", {**trained, "g": 5.0}, "")
    other = {"id": "C-v0", "kwargs": {}}
    facts = given_facts(kept, {"environment_kwargs": {"g": 5.0}, "evaluation_environment": other})
    assert (facts.environment, facts.environment_kwargs) == ("A-v0", {**trained, "g": 5.0})
    assert facts.evaluation_environment == other
    assert given_facts(RunFacts(3, "A-v0", trained), {"environment_kwargs": {"g": 5.0}}).environment_for()[1] == {
        **trained,
        "g": 5.0,
    }
