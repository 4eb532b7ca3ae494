"""An agent that other people trained with kzl's code: load it, scan it, run it, edit it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import dt_lens
from dt_lens import SingularEdit, WeightSVD

pytestmark = pytest.mark.acceptance(minutes=3)

SEEDS = [0, 1, 2, 3, *range(10, 18)]  # those that the return was measured on
MEASURED = 3826.0  # mean of twelve at target 6,000, from 1,685 to 5,483; a random policy's is 98


def _kzl_loop(lens: Any, seed: int, steps: int) -> float:
    """The return of an episode's first steps in kzl's evaluation loop, with the settings that kzl trained with.

    Context 20, return scale 1,000, target 6,000, states not normalised; one window at a time, not padded.
    """
    env = gym.make("Humanoid-v4")
    observation, _ = env.reset(seed=seed)
    states, actions, returns, total = [], [], [6000.0 / 1000.0], 0.0
    for step in range(steps):
        states.append(observation)
        actions.append(np.zeros(17))
        n = min(step + 1, 20)
        with torch.no_grad():
            action = (
                lens(
                    states=torch.tensor(np.array(states[-n:]), dtype=torch.float32)[None],
                    actions=torch.tensor(np.array(actions[-n:]), dtype=torch.float32)[None],
                    returns_to_go=torch.tensor(returns[-n:], dtype=torch.float32)[None, :, None],
                    timesteps=torch.arange(step + 1 - n, step + 1)[None],
                )
                .action_preds[0, -1]
                .numpy()
            )
        actions[-1] = np.clip(action, env.action_space.low, env.action_space.high)  # type: ignore[attr-defined]
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        assert not (terminated or truncated)
        total += float(reward)
        returns.append(returns[-1] - float(reward) / 1000.0)
    env.close()
    return total


def test_a_real_humanoid(real_checkpoints: Callable[[str], Path]) -> None:
    file = real_checkpoints("kzl-humanoid/humanoid.ckpt")
    lens = dt_lens.load(file, n_heads=1, environment="Humanoid-v4", target_returns=[6000.0])
    table = WeightSVD(lens, rank=16).scan()
    assert {"state_in", "action_out"} <= set(table["embedding"])
    assert (table["q_value"] < 0.05).any()
    # The walk is chaotic: over 50 steps another kernel changes a return by at most 6e-6 and double precision by at most
    # 0.02, by much less in these four episodes; over whole episodes rounding alone decides when the agent falls.
    short = dt_lens.evaluate(lens, episodes=4, seed=0, max_steps=50)
    assert short.returns.tolist() == pytest.approx([_kzl_loop(lens, seed, 50) for seed in range(4)], abs=1e-3)
    base = dt_lens.evaluate(lens, episodes=18, seed=0)
    returns = base.to_frame().set_index("seed")["return"]
    # It falls near step 300 or runs to 1,000, so twelve episodes' mean has a standard error near 400.
    assert returns[SEEDS].mean() == pytest.approx(MEASURED, abs=1300)
    with SingularEdit(lens, "blocks.0.mlp.W_in", sv=slice(0, 32), value="zero"):
        edited = dt_lens.evaluate(lens, episodes=4, seed=0)
    again = dt_lens.evaluate(lens, episodes=4, seed=0)
    assert edited.model_id != base.model_id == again.model_id
    assert list(again.to_frame()["return"]) == list(returns.iloc[:4])  # the same to the last bit
    assert edited.to_frame()["return"].mean() < returns.iloc[:4].mean()
