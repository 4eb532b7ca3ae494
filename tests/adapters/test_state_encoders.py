"""Models whose states are images act on what an environment shows them, whichever way its channels lie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from dt_lens.behaviour.evaluate import evaluate
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens_adapters.state_encoders import ConvStack


@pytest.mark.parametrize("pixels", [1.0, 255.0])
def test_an_agent_sees_a_small_image_through_its_encoder(pixels: float) -> None:
    pytest.importorskip("minigrid")
    name = "minigrid:MiniGrid-Empty-5x5-v0"
    cfg = HookedDecisionTransformerConfig(
        147, 7, d_model=8, n_layers=1, d_mlp=8, n_ctx=3, discrete_actions=True, action_tanh=False
    )
    model = HookedDecisionTransformer(cfg, ConvStack((3, 4), (3,), (2,), 7, 8, ("relu",), (), pixels)).eval()
    model.facts = RunFacts(3, ignores=("mission", "direction"), target_returns=(1.0,))
    seen: list[torch.Tensor] = []
    encoder: Any = model.embed["state"]
    encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    assert evaluate(model, name, episodes=1, max_steps=2).lengths.tolist() == [2]
    image = gym.make(name).reset(seed=0)[0]["image"]  # [x, y, channel]
    shown = seen[0][0, -1].reshape(3, 7, 7).numpy()
    np.testing.assert_allclose(shown * pixels, image.transpose(2, 0, 1), rtol=1e-6)
    if pixels == 1:
        return
    # A mean and a scale of the user's say how pixels are scaled, and nothing else does.
    model.facts = replace(model.facts, state_mean=(0.0,) * 147, state_std=(10.0,) * 147)
    evaluate(model, name, episodes=1, max_steps=1)
    np.testing.assert_allclose(seen[-1][0, -1].reshape(3, 7, 7).numpy() * 10, image.transpose(2, 0, 1), rtol=1e-6)
