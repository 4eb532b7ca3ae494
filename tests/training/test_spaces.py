"""Observations and actions of any space are learned from, and acted on, as the same numbers in the same order."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari.data_collector.episode_buffer import EpisodeBuffer

import dt_lens
from dt_lens.behaviour.agents.recording import record_actions
from dt_lens.decision_transformer.state_vector import StateVector
from dt_lens.errors import DtLensError
from dt_lens.training.agent import action_loss, train
from dt_lens.training.dataset import read
from dt_lens.training.settings import AgentSettings

SMALL = AgentSettings(steps=1, d_model=8, n_layers=1, context=3, batch_size=4, targets=(1.0,), bf16=False)
MISSIONS = ("go left", "go right")
SPACE = spaces.Dict(
    OrderedDict(
        where=spaces.MultiDiscrete([3, 4], start=[0, 1]),  # Gymnasium leaves this order as it is, and Minari sorts it
        mission=spaces.Text(9),
        lamps=spaces.MultiBinary(2),
        view=spaces.Box(0, 255, (2, 2), np.uint8),
        speed=spaces.Box(-9, 9, (1,), np.float64),
    )
)
STEPS = 6


class Mixed(gym.Env[Any, Any]):
    """Random observations of every kind, and two choices at once; three points for (1, 7), none for another."""

    observation_space, action_space = SPACE, spaces.MultiDiscrete([2, 3], start=[0, 5])

    def _see(self) -> Any:
        rng = self.np_random
        return {
            "where": np.array([rng.integers(3), 1 + rng.integers(4)]),
            "mission": self.mission,
            "lamps": rng.integers(2, size=2).astype(np.int8),
            "view": rng.integers(2, size=(2, 2)).astype(np.uint8),  # an image that holds no other numbers
            "speed": rng.normal(5, 3, 1).clip(-9, 9),
        }

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.mission = MISSIONS[int(self.np_random.integers(2))]
        return self._see(), {}

    def step(self, action: Any) -> Any:
        return self._see(), 3.0 * (action.tolist() == [1, 7]), False, False, {}


class One(Mixed):
    """The same with one choice, of as many kinds as the two have together."""

    action_space = spaces.Discrete(5)  # type: ignore[assignment]


def record(name: str, env: Any, policy: Any, episodes: int = 4, **options: Any) -> list[Any]:
    """Store episodes of ``policy(observation, rng)`` and return all observations but each last one."""
    rng, buffers, seen = np.random.default_rng(0), [], []
    for number in range(episodes):
        rows, actions, rewards, over = [env.reset(seed=number)[0]], [], [], False
        while not over:
            actions.append(policy(rows[-1], rng))
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            rows.append(observation)
            rewards.append(float(reward))
            over = terminated or truncated
        seen += rows[:-1]
        ends = [step == len(rewards) - 1 for step in range(len(rewards))]
        observations: Any = rows
        if isinstance(rows[0], dict):
            observations = {key: [row[key] for row in rows] for key in options["observation_space"]}
        elif isinstance(rows[0], tuple):
            observations = tuple(np.array(part) for part in zip(*rows, strict=True))
        ended = [terminated and end for end in ends], [truncated and end for end in ends]
        buffers.append(EpisodeBuffer(number, None, None, observations, np.array(actions), rewards, *ended))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(name, buffers, env=env, **options)
    return seen


@pytest.fixture(scope="module", autouse=True)
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        gym.register("dt-lens-test/Mixed-v0", entry_point=f"{__name__}:Mixed", max_episode_steps=STEPS)
        env = gym.make("dt-lens-test/Mixed-v0", disable_env_checker=True)

        def policy(observation: Any, rng: Any) -> Any:
            return np.array([rng.integers(2), 5 + rng.integers(3)])

        yield record("test/mixed-v0", env, policy, observation_space=SPACE)
        del gym.registry["dt-lens-test/Mixed-v0"]


def test_training_and_acting_read_the_same_numbers(seen: list[Any]) -> None:
    data = read("test/mixed-v0")
    assert data.texts == {"mission": MISSIONS} and data.choices == (2, 3) and data.actions.shape == (4 * STEPS, 5)
    acting = StateVector.of(SPACE, (), data.texts)
    np.testing.assert_allclose(data.states, [acting.flat(observation) for observation in seen], rtol=1e-6)
    # lamps, mission, speed, view, where: only the speed is normalised.
    assert data.as_they_are is not None and data.as_they_are.tolist() == [True] * 4 + [False] + [True] * 11
    assert data.state_mean[4] > 2 and data.state_std[4] > 1
    assert not np.delete(data.state_mean, 4).any() and (np.delete(data.state_std, 4) == 1).all()
    without = read("test/mixed-v0", ["mission", "speed"])
    assert without.texts is None and not without.normalised
    np.testing.assert_array_equal(without.states, np.delete(data.states, [2, 3, 4], axis=1))


def test_the_loss_of_several_choices_is_the_sum_of_theirs() -> None:
    logits, taken = torch.randn(1, 2, 5), torch.tensor([[[0.0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]])
    batch = {"actions": taken, "attention_mask": torch.tensor([[True, True]])}
    log_p = torch.cat([logits[..., :2].log_softmax(-1), logits[..., 2:].log_softmax(-1)], -1)
    assert float(action_loss(logits, batch, True, (2, 3))) == pytest.approx(-float((log_p * taken).sum() / 2), rel=1e-5)


def test_what_is_not_read_is_a_fact_that_evaluation_keeps(tmp_path: Path) -> None:
    train("test/mixed-v0", tmp_path, SMALL, ignores=["mission"], environment="dt-lens-test/Mixed-v0", eval_every=0)
    model = dt_lens.load(tmp_path, check=False)
    assert model.facts.ignores == ("mission",) and model.facts.texts is None
    assert " 14 numbers, without mission" in repr(model)
    assert model.facts.choices == (2, 3)
    with pytest.raises(DtLensError, match=r"makes choices of 2 and 3 at once and .*One takes one choice of 5"):
        dt_lens.evaluate(model, One, max_steps=STEPS, episodes=1, workers=1)
    result = dt_lens.evaluate(model, episodes=3, workers=1)
    actions = record_actions(model, result, 0)
    assert actions.shape == (STEPS, 2) and set(actions[:, 1]) <= {5, 6, 7}
    assert result.returns[0] == 3 * (actions == [1, 7]).all(1).sum()
    assert model.embeddings["action_out"].labels[1:3] == ["action 0 = 1", "action 1 = 5"]
    assert model.embeddings["state_in"].labels[:4] == ["lamps 0", "lamps 1", "speed 0", "view (0, 0)"]
    model.facts = replace(model.facts, ignores=None)
    with pytest.raises(DtLensError, match="Mixed-v0 gives a text, 'mission', which this model neither reads nor"):
        dt_lens.evaluate(model, episodes=1, workers=1)
    with pytest.raises(DtLensError, match=r"holds a run with another ignores"):
        train("test/mixed-v0", tmp_path, SMALL, ignores=["mission", "speed"], eval_every=0)


def test_a_text_is_read_one_hot_by_default(tmp_path: Path) -> None:
    train("test/mixed-v0", tmp_path, SMALL, environment="dt-lens-test/Mixed-v0", eval_every=1, eval_episodes=1)
    model = dt_lens.load(tmp_path, check=False)
    assert model.facts.texts == {"mission": MISSIONS} and "16 numbers, mission one-hot among 2 texts" in repr(model)
    assert model.embeddings["state_in"].labels[2:4] == ["mission: go left", "mission: go right"]


def test_a_part_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DtLensError, match=r"ignores names 'misson', .* mean 'mission'\?"):
        train("test/mixed-v0", tmp_path, SMALL, ignores=["misson"])
    with pytest.raises(DtLensError, match=r"ignores is 'mission'; it must be a list"):
        read("test/mixed-v0", "mission")
