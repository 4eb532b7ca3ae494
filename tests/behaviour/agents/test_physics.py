"""Stepping lanes without wrappers gives the bits of ``env.step``; what is not known runs as it stands."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv

from dt_lens.behaviour.agents import physics
from dt_lens.behaviour.agents.environment import Environment, make_environment
from dt_lens.behaviour.agents.physics import Physics, bare, physics_of
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig

MUJOCO = sorted(
    name for name, spec in gym.registry.items() if name.endswith("-v5") and "mujoco" in str(spec.entry_point)
)
RUNNERS = ["HalfCheetah-v5", "Hopper-v5", "Swimmer-v5", "Walker2d-v5"]


def _made(environment: Any, kwargs: dict[str, Any] | None = None, max_steps: int | None = None) -> Environment:
    env = gym.make(environment, **(kwargs or {}))
    discrete = isinstance(env.action_space, gym.spaces.Discrete)
    sizes = [int(gym.spaces.flatdim(space)) for space in (env.observation_space, env.action_space)]
    env.close()
    return make_environment(
        environment, kwargs or {}, HookedDecisionTransformerConfig(*sizes, discrete_actions=discrete), max_steps
    )


def _bits(*values: Any) -> bytes:
    return b"".join(np.asarray(value, dtype=np.float64).tobytes() for value in values)


def both_ways(environment: str, kwargs: dict[str, Any], steps: int, lanes: int, seed: int = 0) -> int:
    """Step ``lanes`` environments with random actions, as lanes and as Gymnasium does; returns how many ended."""
    made = _made(environment, kwargs)
    theirs = [gym.make(environment, **kwargs) for _ in range(lanes)]
    ours = physics_of(made, [made.make() for _ in range(lanes)])
    states, rng, ended = np.zeros((lanes, made.state_dim)), np.random.default_rng(seed), 0

    def begin(row: int, number: int) -> None:
        np.testing.assert_array_equal(ours.envs[row].reset(seed=number)[0], theirs[row].reset(seed=number)[0])
        ours.begun(row)

    for row in range(lanes):
        begin(row, row)
    for step in range(steps):
        # Half of the lanes take full torques, which throw a body about; the others small ones, which keep it up.
        size = np.where(np.arange(lanes) % 2, 1.5, 0.2)[:, None]
        actions, _ = made.actions((size * rng.normal(size=(lanes, made.act_dim))).astype(np.float32))
        rows = [row for row in range(lanes) if (row + step) % 5 or lanes == 1]  # some lanes wait
        rewards, terminated, truncated = ours.step(rows, actions, states)
        for place, row in enumerate(rows):
            observation, reward, over, cut, _ = theirs[row].step(actions[row])
            found = _bits(states[row], rewards[place], terminated[place])
            assert found == _bits(observation, reward, over), f"{environment} {kwargs}, step {step}, row {row}"
            if over or cut or truncated[place]:
                ended += 1
                begin(row, lanes + ended)
    for env in (*ours.envs, *theirs):
        env.close()
    return ended


@pytest.mark.parametrize("environment", MUJOCO)
def test_mujoco_steps_have_gymnasiums_bits(environment: str) -> None:
    steps = 20 if "Humanoid" in environment else 60
    ended = both_ways(environment, {}, steps, 4)
    assert ended or environment not in ("Hopper-v5", "Walker2d-v5")


@pytest.mark.acceptance
@pytest.mark.parametrize("environment", MUJOCO)
def test_ten_thousand_mujoco_steps_have_gymnasiums_bits(environment: str) -> None:
    both_ways(environment, {}, 12_500 // 16, 20, seed=1)


@pytest.mark.parametrize(
    ("environment", "kwargs"),
    [
        ("Hopper-v5", {"terminate_when_unhealthy": False, "healthy_reward": 2, "ctrl_cost_weight": 0.3}),
        ("Hopper-v5", {"exclude_current_positions_from_observation": False, "healthy_state_range": (-1.5, 1.5)}),
        ("Walker2d-v5", {"forward_reward_weight": 0.7, "healthy_angle_range": (-0.05, 0.05), "frame_skip": 5}),
        ("Swimmer-v5", {"exclude_current_positions_from_observation": False, "ctrl_cost_weight": 0.5}),
        ("HalfCheetah-v5", {"xml_file": "hopper.xml", "frame_skip": 4}),
    ],
)
def test_settings_of_the_environment_reach_the_arithmetic(environment: str, kwargs: dict[str, Any]) -> None:
    both_ways(environment, kwargs, 50, 3)


@pytest.mark.parametrize("lanes", [1, 2, 7, 16])
def test_any_number_of_lanes_has_the_same_bits(lanes: int) -> None:
    both_ways("HalfCheetah-v5", {}, 8, lanes)


def test_gymnasium_of_this_version_is_known() -> None:
    """After an update of Gymnasium: read what has changed in its steps, then put the new digest into physics.py."""
    for environment in RUNNERS:
        made = _made(environment)
        env = made.make()
        assert type(physics_of(made, [env])) is not Physics, physics._digest(type(env.unwrapped))
        env.close()


class _Subclass(HopperEnv):
    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        return observation, 2 * reward, *rest


class _Halved(gym.RewardWrapper[Any, Any]):
    def reward(self, reward: Any) -> Any:
        return reward / 2


def _patched(method: str) -> Callable[[], Any]:
    def make() -> Any:
        env = gym.make("Hopper-v5")
        before = getattr(env.unwrapped, method)
        setattr(env.unwrapped, method, functools.wraps(before)(lambda *args: before(*args)))
        return env

    return make


def _numpy_weight() -> Any:
    return gym.make("Hopper-v5", ctrl_cost_weight=np.float64(1e-3))


def _own_limit() -> Any:
    return gym.wrappers.TimeLimit(gym.make("CartPole-v1"), 3)


@pytest.mark.parametrize(
    "make",
    [
        _Subclass,
        lambda: _Halved(gym.make("Hopper-v5")),
        _patched("step"),
        _patched("_get_obs"),
        _numpy_weight,
        lambda: gym.make("Hopper-v5", render_mode="rgb_array"),
    ],
)
def test_what_is_not_known_runs_as_it_stands(make: Callable[[], Any]) -> None:
    spec = gym.envs.registration.EnvSpec("dt-lens-test/Own-v0", entry_point=lambda **kwargs: make())
    made = make_environment(spec, {}, HookedDecisionTransformerConfig(11, 3), 50)
    ours, theirs = physics_of(made, [made.make()]), make()
    assert type(ours) is Physics
    ours.envs[0].reset(seed=3)
    theirs.reset(seed=3)
    states, action = np.zeros((1, 11)), np.full(3, 0.3, np.float32)
    rewards, *_ = ours.step([0], [action], states)
    observation, reward, *_ = theirs.step(action)
    assert _bits(states[0], rewards[0]) == _bits(observation, reward)
    for env in (ours.envs[0], theirs):
        env.close()


def test_a_class_whose_method_was_replaced_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _made("Hopper-v5")
    before = HopperEnv.control_cost
    monkeypatch.setattr(HopperEnv, "control_cost", functools.wraps(before)(lambda *args: 2 * before(*args)))
    physics._digest.cache_clear()
    env = made.make()
    try:
        assert type(physics_of(made, [env])) is Physics
    finally:
        env.close()
        physics._digest.cache_clear()


def test_only_wrappers_that_change_nothing_are_left_out() -> None:
    env = gym.make("Hopper-v5")
    assert bare(env, 1000) is env.unwrapped
    halved = _Halved(env)
    assert bare(halved, 1000) is halved
    assert bare(gym.wrappers.TimeLimit(halved, 500), 400) is halved
    limited = _own_limit()
    assert bare(limited, 500) is limited  # it cuts earlier than the loop would
    replaced = gym.make("CartPole-v1")
    replaced.step = replaced.step
    assert bare(replaced, 500) is replaced


def test_who_measures_an_episode_sees_every_wrapper() -> None:
    from dataclasses import replace

    made = replace(_made("CartPole-v1"), measure=lambda env: dict)
    ours = physics_of(made, [made.make()])
    ours.envs[0].reset(seed=0)
    ours.step([0], [1], np.zeros((1, 4)))
    assert ours.envs[0].get_wrapper_attr("_elapsed_steps") == 1


def test_a_step_that_is_replaced_while_measuring_is_the_one_that_runs() -> None:
    from dataclasses import replace

    def measure(env: Any) -> Any:
        before = env.step
        env.step = lambda action: (lambda got: (got[0], 7.0, *got[2:]))(before(action))
        return dict

    made = replace(_made("CartPole-v1"), measure=measure)
    ours = physics_of(made, [made.make() for _ in range(2)])
    for row, env in enumerate(ours.envs):
        env.reset(seed=row)
        measure(env)
        ours.begun(row)
    assert list(ours.step([0, 1], [1, 1], np.zeros((2, 4)))[0]) == [7.0, 7.0]
    ours.keep([1])
    assert list(ours.step([0], [1], np.zeros((1, 4)))[0]) == [7.0]


def test_whole_episodes_have_the_same_bits_either_way(make_model: Callable[..., Any]) -> None:
    """``measure`` has each environment step as it stands; discrete actions are sampled."""
    from dataclasses import replace

    from dt_lens.behaviour.agents.running import known_setting, run

    for environment, sampled in (("Hopper-v5", False), ("CartPole-v1", True)):
        model = make_model(environment)
        setting = known_setting(model, environment, {}, 10.0, 40, deterministic=not sampled)
        measured = setting._replace(made=replace(setting.made, measure=lambda env: dict))
        ours, theirs = (run(model, which, range(10), workers=1) for which in (setting, measured))
        assert sorted(ours) == sorted(theirs)
