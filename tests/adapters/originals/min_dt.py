"""min-decision-transformer: blocks with the LayerNorm behind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, d: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.n_heads = heads
        self.q_net, self.k_net, self.v_net, self.proj_net = (nn.Linear(d, d) for _ in range(4))
        self.register_buffer("mask", torch.ones(tokens, tokens).tril()[None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, t, d = x.shape
        heads = []
        for h in range(self.n_heads):
            part = slice(h * d // self.n_heads, (h + 1) * d // self.n_heads)
            q, k, v = self.q_net(x)[..., part], self.k_net(x)[..., part], self.v_net(x)[..., part]
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            scores[:, self.mask[0, 0, :t, :t] == 0] = -torch.inf
            heads.append(scores.softmax(-1) @ v)
        return self.proj_net(torch.cat(heads, -1))


class Block(nn.Module):
    def __init__(self, d: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(d, tokens, heads)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d), nn.Dropout(0.1))
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.ln1(x + self.attention(x))
        return self.ln2(x + self.mlp(x))


class Minimal(nn.Module):
    """The original's module names, argument order and computation."""

    def __init__(
        self, state_dim: int, act_dim: int, d: int, heads: int, blocks: int, context: int, discrete: bool = False
    ) -> None:
        super().__init__()
        self.transformer = nn.Sequential(*(Block(d, 3 * context, heads) for _ in range(blocks)))
        self.embed_ln = nn.LayerNorm(d)
        self.embed_timestep = nn.Embedding(40, d)
        self.embed_rtg, self.embed_state = nn.Linear(1, d), nn.Linear(state_dim, d)
        self.embed_action = nn.Embedding(act_dim, d) if discrete else nn.Linear(act_dim, d)
        self.predict_rtg, self.predict_state = nn.Linear(d, 1), nn.Linear(d, state_dim)
        self.predict_action = nn.Sequential(nn.Linear(d, act_dim), *([] if discrete else [nn.Tanh()]))
        self.factor = 1.0

    def forward(self, timesteps: Any, states: Any, actions: Any, returns_to_go: Any) -> Any:
        time = self.embed_timestep(timesteps)
        kinds = self.embed_rtg(returns_to_go), self.embed_state(states), self.embed_action(actions)
        tokens = [kind[:, t] + time[:, t] for t in range(time.shape[1]) for kind in kinds]
        x = self.transformer(self.embed_ln(torch.stack(tokens, 1)))
        state, action = x[:, 1::3], x[:, 2::3]
        return self.predict_state(action), self.factor * self.predict_action(state), self.predict_rtg(action)


def make(seed: int = 0, size: float = 0.3, **sizes: Any) -> Minimal:
    torch.manual_seed(seed)
    options = {"state_dim": 5, "act_dim": 3, "d": 16, "heads": 2, "blocks": 2, "context": 4, **sizes}
    model = Minimal(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


def batch_of(model: Minimal, n: int = 3, steps: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state_dim, act_dim = model.predict_state.out_features, model.predict_action[0].out_features
    actions = torch.randn(n, steps, act_dim, generator=generator)
    if isinstance(model.embed_action, nn.Embedding):
        actions = torch.nn.functional.one_hot(actions.argmax(-1), act_dim).float()
    return {
        "states": torch.randn(n, steps, state_dim, generator=generator),
        "actions": actions,
        "returns_to_go": torch.randn(n, steps, 1, generator=generator),
        "timesteps": torch.randint(40, (n, steps), generator=generator),
    }


def original(model: Minimal, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    actions = batch["actions"].argmax(-1) if isinstance(model.embed_action, nn.Embedding) else batch["actions"]
    with torch.no_grad():
        return torch.cat(model(batch["timesteps"], batch["states"], actions, batch["returns_to_go"]), -1)


def lensed(lens: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        out = lens(**batch)
    return torch.cat([out.state_preds, out.action_preds, out.return_preds], -1)


def saved(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "dt_hopper-medium-v2_model.pt")
    return folder / "dt_hopper-medium-v2_model.pt"
