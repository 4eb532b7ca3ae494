"""The rollout loop: an episode is a function of its seed, and how it is run changes no bit of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from dt_lens.behaviour.agents.environment import Environment, make_environment
from dt_lens.behaviour.agents.lanes import arrange
from dt_lens.behaviour.agents.rollouts import Conditions, Outcome, run_episodes
from dt_lens.behaviour.agents.windows import SlidingPolicy
from dt_lens.decision_transformer.policy import ActingModel
from dt_lens.errors import DtLensError
from dt_lens.lens.forward_mode import one_thread

Make = Callable[..., Any]


def _conditions(model: Any) -> Conditions:
    facts = model.facts
    return Conditions(
        facts.target_returns[0],
        facts.return_scale,
        np.array(facts.state_mean),
        np.array(facts.state_std),
        model.cfg.max_ep_len - 1,
    )


def _run(model: Any, seeds: Sequence[int], lanes: int, max_steps: int | None = None) -> dict[int, Outcome]:
    task = make_environment(model.facts.environment, {}, model.cfg, max_steps)
    acting = ActingModel(model.weights, model.cfg)
    with one_thread():
        width, least, alone = arrange(acting, model.facts.context, lanes)
        policy = SlidingPolicy(acting, model.facts.context, width, alone=alone)
        outcomes = run_episodes(policy, task, _conditions(model), iter(seeds), least_width=least)
    assert sorted(o.seed for o in outcomes) == sorted(seeds)
    return {o.seed: o for o in outcomes}


def _textbook(model: Any, seed: int, max_steps: int) -> tuple[float, int]:
    """The evaluation loop as Chen et al. published it, one environment, through the whole model."""
    facts = model.facts
    env = gym.make(facts.environment)
    mean, std = np.array(facts.state_mean), np.array(facts.state_std)
    observation, _ = env.reset(seed=seed)
    states, actions, returns, times = [], [], [facts.target_returns[0] / facts.return_scale], [0]
    total, length = 0.0, 0
    while True:
        states.append((observation - mean) / std)
        actions.append(np.zeros(model.cfg.act_dim))
        n = min(len(states), facts.context)
        with torch.no_grad():
            prediction = (
                model(
                    states=torch.tensor(np.array(states[-n:]), dtype=torch.float32)[None],
                    actions=torch.tensor(np.array(actions[-n:]), dtype=torch.float32)[None],
                    returns_to_go=torch.tensor(returns[-n:], dtype=torch.float32)[None, :, None],
                    timesteps=torch.tensor(times[-n:])[None].clamp(max=model.cfg.max_ep_len - 1),
                )
                .action_preds[0, -1]
                .numpy()
            )
        if isinstance(env.action_space, gym.spaces.Discrete):
            action: Any = int(prediction.argmax())
            actions[-1] = np.eye(model.cfg.act_dim)[action]
        else:
            action = np.clip(prediction, env.action_space.low, env.action_space.high)
            actions[-1] = action
        observation, reward, terminated, truncated, _ = env.step(action)
        total, length = total + float(reward), length + 1
        returns.append(returns[-1] - float(reward) / facts.return_scale)
        times.append(length)
        if terminated or truncated or length == max_steps:
            env.close()
            return total, length


@pytest.mark.parametrize(("environment", "cfg"), [("CartPole-v1", {}), ("Pendulum-v1", {"position": "constant"})])
def test_it_is_the_published_loop(make_model: Make, environment: str, cfg: dict[str, Any]) -> None:
    """Also beyond the timestep table (30 rows) and after an early end."""
    model = make_model(environment, **cfg)
    outcomes = _run(model, range(12), 8, max_steps=40)
    for seed in (0, 5, 11):
        total, length = _textbook(model, seed, 40)
        assert outcomes[seed].length == length
        assert outcomes[seed].total == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize(
    ("environment", "cfg"),
    [
        ("CartPole-v1", {}),
        ("Hopper-v5", {}),
        ("Hopper-v5", {"d_model": 128, "d_mlp": 512, "n_heads": 1}),
        ("Pendulum-v1", {"position": "learned", "n_position": 12}),
        ("Pendulum-v1", {"d_model": 7, "d_mlp": 11, "n_heads": 1}),  # odd sizes: rows are not rounded alike here
    ],
)
def test_an_episode_does_not_depend_on_its_neighbours(make_model: Make, environment: str, cfg: dict[str, Any]) -> None:
    model = make_model(environment, **cfg)
    everything = _run(model, range(30), 8, max_steps=40)
    for seeds, lanes in (
        (range(5), 8),
        (range(13), 13),
        (list(range(30))[::-1], 11),
        ([7, 29, 3, 8, 21, 0, 1, 2, 4], 9),
    ):
        for seed, outcome in _run(model, seeds, lanes, max_steps=40).items():
            assert outcome == everything[seed]


class _CartPusher:
    """A policy that pushes the cart right and records how its batch was used."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.widths: list[int] = []
        self.restarts: list[int] = []

    def restart(self, row: int, arm: int = 0) -> None:
        self.restarts.append(row)

    def keep(self, rows: Sequence[int]) -> None:
        assert len(set(rows)) == len(rows)
        self.width = len(rows)

    def act(self, states: Tensor, returns_to_go: Tensor, timesteps: Tensor, previous_actions: Tensor) -> Tensor:
        assert len(states) == len(returns_to_go) == len(timesteps) == len(previous_actions) == self.width
        self.widths.append(self.width)
        return torch.tensor([[0.0, 1.0]]).expand(self.width, 2)


def _cart(max_steps: int = 200) -> Environment:
    from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig

    return make_environment("CartPole-v1", {}, HookedDecisionTransformerConfig(4, 2, discrete_actions=True), max_steps)


FREE = Conditions(100.0, 1.0, np.zeros(4), np.ones(4), 999)


def test_an_episode_that_ends_is_replaced_by_the_next_seed() -> None:
    policy = _CartPusher(8)
    seen: list[tuple[int, float]] = []
    outcomes = run_episodes(
        policy, _cart(), FREE, iter(range(50)), least_width=2, report=lambda done, running: seen.append((done, running))
    )
    assert [o.seed for o in sorted(outcomes)] == list(range(50))
    assert all(o.terminated and not o.truncated and 5 < o.length < 20 for o in outcomes)
    assert len(policy.restarts) == 50
    full = policy.widths.count(8)
    assert full >= sum(o.length for o in outcomes) // 8 - 20  # the batch is full until seeds run out ...
    assert policy.widths[-1] == 2  # ... and narrows then, not beyond the least width
    assert policy.widths == sorted(policy.widths, reverse=True)
    assert seen[-1] == (50, 0.0)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_without_a_least_width_every_episode_stays_in_its_row() -> None:
    policy = _CartPusher(8)
    run_episodes(policy, _cart(), FREE, iter(range(11)))
    assert set(policy.widths) == {8}


def test_fewer_seeds_than_rows() -> None:
    policy = _CartPusher(8)
    assert len(run_episodes(policy, _cart(), FREE, iter([3]), least_width=8)) == 1


def test_the_time_limit_truncates() -> None:
    outcomes = run_episodes(_CartPusher(8), _cart(max_steps=4), FREE, iter(range(8)))
    assert all(o.length == 4 and o.truncated and not o.terminated for o in outcomes)


class _Ends(gym.Env):  # type: ignore[type-arg]
    """Ends at step ``at`` with the given flags."""

    observation_space = gym.spaces.Box(-1, 1, (4,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, at: int, terminated: bool, truncated: bool) -> None:
        self.at, self.flags, self.steps = at, (terminated, truncated), 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.steps = 0
        return np.zeros(4, np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        terminated, truncated = self.flags if self.steps == self.at else (False, False)
        return np.zeros(4, np.float32), 1.0, terminated, truncated, {}


@pytest.mark.parametrize(
    ("at", "flags", "limit", "length", "terminated"),
    [
        (3, (True, False), 4, 3, True),
        (4, (True, False), 4, 4, True),  # ends at the time limit: the environment's word counts
        (4, (True, True), 9, 4, True),
        (4, (False, True), 9, 4, False),
        (9, (True, False), 4, 4, False),
    ],
)
def test_an_episode_is_terminated_or_truncated_and_never_both(
    at: int, flags: tuple[bool, bool], limit: int, length: int, terminated: bool
) -> None:
    from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig

    gym.register("dt-lens-test/Ends-v0", entry_point=_Ends)
    try:
        kwargs = {"at": at, "terminated": flags[0], "truncated": flags[1]}
        cfg = HookedDecisionTransformerConfig(4, 2, discrete_actions=True)
        task = make_environment("dt-lens-test/Ends-v0", kwargs, cfg, limit)
        outcomes = run_episodes(_CartPusher(8), task, FREE, iter(range(9)))
    finally:
        del gym.registry["dt-lens-test/Ends-v0"]
    assert {tuple(o)[1:5] for o in outcomes} == {(float(length), length, terminated, not terminated)}


class _Spoils(_Ends):
    """Ends at step 3, and gives ``value`` as reward or observation at step ``when``."""

    def __init__(self, what: str, value: Any, when: int) -> None:
        super().__init__(3, True, False)
        self.what, self.value, self.when = what, value, when

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        observation, info = super().reset()
        return (np.full(4, self.value) if (self.what, self.when) == ("observation", 0) else observation), info

    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        if self.steps == self.when:
            observation = np.full(4, self.value) if self.what == "observation" else observation
            reward = self.value if self.what == "reward" else reward
        return observation, reward, *rest


@pytest.mark.parametrize("when", [0, 2, 3])  # at the start (no reward yet), in the middle, on the last step
@pytest.mark.parametrize(
    ("what", "value", "words"),
    [
        ("reward", np.nan, "a reward that is not a finite number, or too large for the return (nan)"),
        ("reward", -np.inf, "a reward that is not a finite number, or too large for the return (-inf)"),
        ("reward", None, "a reward that is not a finite number, or too large for the return (None)"),
        ("observation", np.nan, "an observation that is not finite ([nan, nan, nan, nan])"),
        ("observation", 1e39, "an observation that is too large when normalised ([1e+39, 1e+39, 1e+39, 1e+39])"),
    ],
)
def test_a_number_that_is_not_finite_is_the_environments_fault(what: str, value: Any, words: str, when: int) -> None:
    from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig

    gym.register("dt-lens-test/Spoils-v0", entry_point=_Spoils)

    class Reads(_CartPusher):
        def act(self, states: Tensor, *rest: Tensor) -> Tensor:
            return super().act(states, *rest) + 0 * states.sum(1, keepdim=True)

    try:
        cfg = HookedDecisionTransformerConfig(4, 2, discrete_actions=True)
        task = make_environment("dt-lens-test/Spoils-v0", {"what": what, "value": value, "when": when}, cfg, 9)
        if (what, when) == ("reward", 0) or (value, when) == (1e39, 3):  # no action follows the last observation
            assert len(run_episodes(Reads(8), task, FREE, iter([7]))) == 1
            return
        with pytest.raises(DtLensError) as caught:
            run_episodes(Reads(8), task, FREE, iter([7]))
    finally:
        del gym.registry["dt-lens-test/Spoils-v0"]
    sentence = str(caught.value)
    assert sentence.startswith(
        f"The environment dt-lens-test/Spoils-v0 gave {words} at step {when} of the episode with"
    )
    assert "weights" not in sentence


def test_an_action_that_is_not_finite_is_refused() -> None:
    class Broken(_CartPusher):
        def act(self, *inputs: Tensor) -> Tensor:
            return torch.full((self.width, 2), float("nan"))

    with pytest.raises(DtLensError, match=r"not finite .* at step 0 of the episode with seed 7"):
        run_episodes(Broken(8), _cart(), FREE, iter([7]))
