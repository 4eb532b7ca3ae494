"""Sampled actions: from the softmax of the logits, by the episode's seed alone, and part of what a result is of."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from dt_lens.behaviour.agents.environment import make_environment
from dt_lens.behaviour.agents.evaluation import AgentEvaluation
from dt_lens.behaviour.agents.identity import model_id
from dt_lens.behaviour.agents.recording import record_actions
from dt_lens.behaviour.agents.rollouts import Conditions, run_episodes
from dt_lens.behaviour.agents.task import AgentTask
from dt_lens.behaviour.collect_activations import kept_activations
from dt_lens.behaviour.evaluate import evaluate
from dt_lens.behaviour.sweep.sweep import Sweep
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.edits.singular import SingularEdit
from dt_lens.errors import DtLensError

Make = Callable[..., Any]
LOGITS = [2.0, 0.0, 1.0, -1.0, 1.5]  # of two choices: one of 2, one of 3


class _Taken(gym.Env[Any, Any]):
    """Ends after 100 steps and keeps the actions that it was given."""

    observation_space = gym.spaces.Discrete(2)
    action_space = gym.spaces.MultiDiscrete([2, 3])
    taken: list[tuple[int, list[int]]] = []  # noqa: RUF012
    seed = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.seed = seed or 0
        return 0, {}

    def step(self, action: Any) -> Any:
        self.taken.append((self.seed, action.tolist()))
        return 1, 0.0, False, False, {}


class _Always:
    """A policy whose logits are always the same."""

    def __init__(self, width: int) -> None:
        self.width = width

    def restart(self, row: int, arm: int = 0) -> None: ...

    def keep(self, rows: Sequence[int]) -> None:
        self.width = len(rows)

    def act(self, *fed: Tensor) -> Tensor:
        return torch.tensor([LOGITS]).expand(self.width, 5)


def _taken(seeds: Sequence[int], width: int) -> dict[int, list[list[int]]]:
    cfg = HookedDecisionTransformerConfig(2, 5, discrete_actions=True)
    made = make_environment(_Taken, {"max_episode_steps": 100}, cfg)
    _Taken.taken.clear()
    conditions = Conditions(1.0, 1.0, np.zeros(2), np.ones(2), 99, deterministic=False)
    run_episodes(_Always(width), made, conditions, iter(seeds), least_width=1)
    return {seed: [action for of, action in _Taken.taken if of == seed] for seed in seeds}


def test_actions_follow_the_softmax_of_each_choice_and_the_seed_alone() -> None:
    taken = _taken(range(30), 8)
    drawn = np.array([action for actions in taken.values() for action in actions])
    assert drawn.shape == (3000, 2)
    for column, logits in ((0, LOGITS[:2]), (1, LOGITS[2:])):
        expected = np.exp(logits) / np.exp(logits).sum()
        share = np.bincount(drawn[:, column], minlength=len(logits)) / 3000
        assert (np.abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 3000)).all(), (share, expected)
    # The two choices are made apart, one step tells nothing of the next, and one seed nothing of another.
    for one, other in ((drawn[:, 0], drawn[:, 1]), (drawn[:-1, 0], drawn[1:, 0]), (drawn[:-100, 0], drawn[100:, 0])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(3000)
    again = _taken([7, 29, 3], 2)
    assert all(again[seed] == taken[seed] for seed in again)


def test_an_episode_repeats_beside_any_others_and_can_be_replayed(make_model: Make) -> None:
    model = make_model("CartPole-v1")
    options = {"workers": 1, "max_steps": 40, "deterministic": False}
    wide = evaluate(model, episodes=11, **options)
    narrow = evaluate(model, episodes=3, seed=4, lanes=9, **options)
    assert narrow.returns.tolist() == wide.returns[4:7].tolist() and len(set(wide.returns)) > 2
    assert wide.returns.tolist() != evaluate(model, episodes=11, workers=1, max_steps=40).returns.tolist()
    actions = record_actions(model, wide, 5)
    env = gym.make("CartPole-v1")
    env.reset(seed=5)
    assert sum(float(env.step(int(action))[1]) for action in actions) == wide.returns[5]
    assert len(set(actions.tolist())) == 2
    # An edit that hardly changes the logits hardly changes what is drawn: both arms draw with the same numbers.
    with SingularEdit(model, "blocks.0.mlp.W_in", sv=14, value=1.001):
        assert (record_actions(model, wide, 5)[:3] == actions[:3]).all()


def test_a_result_says_that_actions_were_sampled(make_model: Make, tmp_path: Path) -> None:
    model = make_model("CartPole-v1")
    plain, sampled = (evaluate(model, episodes=2, workers=1, max_steps=9, deterministic=d) for d in (True, False))
    assert "target return 200, actions sampled" in str(sampled) and "sampled" not in str(plain)
    assert "actions" not in plain.to_dict()["task"]["setting"]  # as files always were
    again = AgentEvaluation.from_dict(json.loads(json.dumps(sampled.to_dict())))
    assert not again.deterministic and plain.deterministic
    with pytest.raises(DtLensError, match=r"differ in their choice of actions \(sampled and None"):
        sampled.compare(plain)
    options = {"matrices": "blocks.0.mlp.W_in", "sv": "0", "episodes": 2, "max_steps": 9}
    plans = [Sweep(model, tmp_path, **options, deterministic=d).plan for d in (None, True, False)]
    assert plans[0].difference(plans[1].options) is None
    assert "actions" in str(plans[0].difference(plans[2].options))
    assert plans[0].options["sample"] != plans[2].options["sample"]
    file = tmp_path / "kept.safetensors"
    digests = [kept_activations(model, file, AgentTask.of(model, max_steps=9, deterministic=d)).digest
               for d in (False, True, False)]  # fmt: skip
    assert digests[0] == digests[2] != digests[1]


def test_the_agents_facts_may_say_so(make_model: Make) -> None:
    model = make_model("CartPole-v1")
    identity = model_id(model)
    assert "deterministic" not in model.facts.to_dict()
    model.facts = replace(model.facts, deterministic=False)
    assert RunFacts.from_dict(json.loads(model.facts.to_json())) == model.facts and model_id(model) != identity
    assert not evaluate(model, episodes=1, workers=1, max_steps=3).deterministic
    assert evaluate(model, episodes=1, workers=1, max_steps=3, deterministic=True).deterministic
    with pytest.raises(DtLensError, match="facts' deterministic is 'no'; it must be true or false"):
        RunFacts(3, deterministic="no")  # type: ignore[arg-type]
    with pytest.raises(DtLensError, match="deterministic is 'no'; it must be True or False"):
        evaluate(model, episodes=1, deterministic="no")
    with pytest.raises(DtLensError, match=r"predicts continuous actions, .* \(--stochastic\)"):
        evaluate(make_model("Pendulum-v1"), episodes=1, deterministic=False)
    continuous = make_model("Pendulum-v1")
    continuous.facts = replace(continuous.facts, deterministic=False)
    with pytest.raises(DtLensError, match=r"predicts continuous actions, .* pass deterministic=True"):
        evaluate(continuous, episodes=1)
