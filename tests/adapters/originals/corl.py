"""CORL's decision transformer around ``nn.MultiheadAttention``, and what its training script saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

SETTINGS = """\
action_dim: 3
attention_dropout: 0.1
embedding_dim: 16
env_name: hopper-medium-v2
episode_len: 36
max_action: 1.0
name: DT-hopper-medium-v2-1f2e
num_heads: 2
num_layers: 2
reward_scale: 0.01
seq_len: 4
target_returns:
- 3600.0
- 1800.0
train_seed: 10
"""


class Block(nn.Module):
    def __init__(self, d: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = nn.MultiheadAttention(d, heads, 0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d), nn.Dropout(0.1))
        self.register_buffer("causal_mask", torch.ones(tokens, tokens).triu(1).bool())

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        y, future = self.norm1(x), self.causal_mask[: x.shape[1], : x.shape[1]]
        x = x + self.attention(y, y, y, attn_mask=future, key_padding_mask=padding, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Minimal(nn.Module):
    """The original's module names, argument order and computation."""

    def __init__(self, state_dim: int, act_dim: int, d: int, heads: int, blocks: int, context: int) -> None:
        super().__init__()
        self.emb_norm, self.out_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.timestep_emb = nn.Embedding(36 + context, d)
        self.state_emb, self.action_emb, self.return_emb = (
            nn.Linear(state_dim, d),
            nn.Linear(act_dim, d),
            nn.Linear(1, d),
        )
        self.blocks = nn.ModuleList(Block(d, 3 * context, heads) for _ in range(blocks))
        self.action_head = nn.Sequential(nn.Linear(d, act_dim), nn.Tanh())
        self.seq_len, self.max_action, self.factor = context, 1.0, 1.0

    def forward(
        self, states: Any, actions: Any, returns_to_go: Any, time_steps: Any, padding_mask: Any = None
    ) -> torch.Tensor:
        time = self.timestep_emb(time_steps)
        kinds = self.return_emb(returns_to_go[..., None]), self.state_emb(states), self.action_emb(actions)
        tokens = [kind[:, t] + time[:, t] for t in range(time.shape[1]) for kind in kinds]
        x = self.emb_norm(torch.stack(tokens, 1))
        padding = None if padding_mask is None else padding_mask.repeat_interleave(3, 1)
        for block in self.blocks:
            x = block(x, padding)
        return self.action_head(self.factor * self.out_norm(x)[:, 1::3]) * self.max_action


def make(seed: int = 0, size: float = 0.3, **sizes: Any) -> Minimal:
    torch.manual_seed(seed)
    options = {"state_dim": 5, "act_dim": 3, "d": 16, "heads": 2, "blocks": 2, "context": 4, **sizes}
    model = Minimal(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


SAVED = make().state_dict()


def batch_of(model: Minimal, n: int = 3, steps: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "states": torch.randn(n, steps, model.state_emb.in_features, generator=generator),
        "actions": torch.randn(n, steps, model.action_emb.in_features, generator=generator),
        "returns_to_go": torch.randn(n, steps, 1, generator=generator),
        "timesteps": torch.randint(36, (n, steps), generator=generator),
    }


def original(model: Minimal, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = batch.get("attention_mask")
    padding = None if mask is None else mask == 0
    with torch.no_grad():
        return model(batch["states"], batch["actions"], batch["returns_to_go"][..., 0], batch["timesteps"], padding)


def lensed(lens: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        out = lens(**batch)
    assert out.state_preds is None and out.return_preds is None
    return out.action_preds


def saved(model: nn.Module, folder: Path) -> Path:
    """What CORL's script leaves behind at the end, without the settings that it wrote at the beginning."""
    size = model.state_emb.in_features
    mean, std = np.arange(size, dtype=np.float32)[None], np.full((1, size), 2, np.float32)
    whole = {"model_state": model.state_dict(), "state_mean": mean, "state_std": std}
    torch.save(whole, folder / "dt_checkpoint.pt")
    return folder / "dt_checkpoint.pt"
