"""Small models that act."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.decision_transformer.model import HookedDecisionTransformer

SIZES: dict[str, tuple[int, int, bool]] = {
    "CartPole-v1": (4, 2, True),
    "Pendulum-v1": (3, 1, False),
    "Hopper-v5": (11, 3, False),
    "FrozenLake-v1": (16, 4, True),
}


@pytest.fixture(scope="session")
def make_model() -> Callable[..., HookedDecisionTransformer]:
    """A random model for an environment: ``make_model("CartPole-v1", context=3, position="learned", ...)``."""

    def make(environment: str, *, context: int = 4, seed: int = 0, spread: float = 0.3, **cfg: Any) -> Any:
        state_dim, act_dim, discrete = SIZES[environment]
        torch.manual_seed(seed)
        options = {
            "d_model": 16,
            "n_layers": 2,
            "n_heads": 2,
            "d_mlp": 32,
            "max_ep_len": 30,
            "discrete_actions": discrete,
            "action_tanh": not discrete,
        }
        model = HookedDecisionTransformer(
            HookedDecisionTransformerConfig(state_dim, act_dim, n_ctx=context, **(options | cfg))
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(spread * torch.randn_like(parameter))
        model.facts = RunFacts(
            context=context,
            environment=environment,
            state_mean=(0.1,) * state_dim,
            state_std=(0.7,) * state_dim,
            return_scale=100.0,
            target_returns=(200.0, 100.0),
        )
        return model.eval()

    return make
