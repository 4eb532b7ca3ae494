"""Decision transformers of many configurations, and how to run one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.model import HookedDecisionTransformer

OUTPUTS = ("state_preds", "action_preds", "return_preds", "last_hidden_state")
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "post": {"normalization": "post", "final_ln": False, "position": "learned", "n_position": 12},
    "bare": {"normalization": "none", "final_ln": False, "embed_ln": False, "action_tanh": False},
    "constant": {"position": "constant", "n_position": 2, "act_fn": "gelu_tanh", "attn_scale_by_layer": True},
    "learned": {"position": "learned", "n_position": 40, "act_fn": "gelu", "attn_scale_by_head": False, "eps": 0.1},
    "one head": {"n_heads": 1, "act_fn": "silu", "embed_ln_eps": 0.5},
    "post with final": {"normalization": "post", "act_fn": "tanh", "n_heads": 4},
    "gated": {"gated_mlp": True, "act_fn": "silu", "action_padding": True, "discrete_actions": True},
    "tanh": {
        "embed_act": "tanh",
        "gated_mlp": True,
        "normalization": "post",
        "predicts": ("action", "return_to_go"),
    },
    "step": {"position": "step", "n_position": 4, "timestep_of": "window", "action_tanh": False},
    "headless": {"predicts": ("action",), "action_padding": True, "position": "learned", "n_position": 12},
}


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> Any:
    """Each configuration in turn, by its name; a test may choose its own by ``parametrize``."""
    return request.param


@pytest.fixture(scope="session")
def make() -> Callable[..., HookedDecisionTransformer]:
    """A random model in evaluation mode, of a named configuration and with further options."""

    def make(name: str = "plain", seed: int = 0, encoder: nn.Module | None = None, **options: Any) -> Any:
        torch.manual_seed(seed)
        sizes = {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_mlp": 12, "n_ctx": 4, "max_ep_len": 20}
        cfg = HookedDecisionTransformerConfig(5, 3, **{**sizes, **CONFIGS[name], **options})
        model = HookedDecisionTransformer(cfg, encoder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.4 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def run() -> Callable[[HookedDecisionTransformer, dict[str, Tensor]], dict[str, Tensor]]:
    """Run a model on a batch: its outputs by name, without those that it lacks."""

    def run(model: HookedDecisionTransformer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            out = model(**batch)
        return {name: getattr(out, name) for name in OUTPUTS if getattr(out, name) is not None}

    return run
