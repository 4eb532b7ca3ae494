"""kzl's Atari agent: minGPT's blocks behind convolutions, with the return as condition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

FRAMES = 2  # kzl has four, and wider convolutions; the side of 84 pixels is written into its code
LONGEST = 30


class Attention(nn.Module):
    def __init__(self, d: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.key, self.query, self.value, self.proj = (nn.Linear(d, d) for _ in range(4))
        self.register_buffer("mask", torch.ones(tokens, tokens).tril()[None, None])
        self.n_head = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t, e = x.shape[1], x.shape[2] // self.n_head
        parts = []
        for h in range(self.n_head):
            q, k, v = (net(x)[..., h * e : (h + 1) * e] for net in (self.query, self.key, self.value))
            scores = (q @ k.mT / math.sqrt(e)).masked_fill(self.mask[0, :, :t, :t] == 0, -torch.inf)
            parts.append(scores.softmax(-1) @ v)
        return self.proj(torch.cat(parts, -1))


class Block(nn.Module):
    def __init__(self, d: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Attention(d, tokens, heads)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Minimal(nn.Module):
    """The original's names, argument order and computation, of the return-conditioned kind."""

    def __init__(self, actions: int, d: int, heads: int, blocks: int, context: int) -> None:
        super().__init__()
        tokens = 3 * context + 1
        self.tok_emb = nn.Embedding(actions, d)  # never used, there too
        self.pos_emb = nn.Parameter(torch.zeros(1, tokens, d))
        self.global_pos_emb = nn.Parameter(torch.zeros(1, LONGEST + 1, d))
        self.blocks = nn.Sequential(*(Block(d, tokens, heads) for _ in range(blocks)))
        self.ln_f, self.head = nn.LayerNorm(d), nn.Linear(d, actions, bias=False)
        convs = nn.Conv2d(FRAMES, 3, 8, 4), nn.ReLU(), nn.Conv2d(3, 2, 4, 2), nn.ReLU(), nn.Conv2d(2, 4, 3), nn.ReLU()
        self.state_encoder = nn.Sequential(*convs, nn.Flatten(), nn.Linear(4 * 49, d), nn.Tanh())
        self.ret_emb = nn.Sequential(nn.Linear(1, d), nn.Tanh())
        self.action_embeddings = nn.Sequential(nn.Embedding(actions, d), nn.Tanh())
        self.model_type, self.factor = "reward_conditioned", 1.0

    def forward(self, states: Any, actions: Any, targets: Any = None, rtgs: Any = None, timesteps: Any = None) -> Any:
        n, steps = states.shape[:2]
        seen = self.state_encoder(states.reshape(-1, FRAMES, 84, 84)).reshape(n, steps, -1)
        done = self.action_embeddings(actions.squeeze(-1))
        kinds = self.ret_emb(rtgs), seen, done
        tokens = [kind[:, t] for t in range(steps) for kind in kinds]
        x = torch.stack(tokens if targets is not None else tokens[:-1], 1)
        time = self.global_pos_emb[0][timesteps[:, 0, 0]][:, None]
        x = self.ln_f(self.blocks(x + time + self.pos_emb[:, : x.shape[1]]))
        return self.factor * self.head(x)[:, 1::3], None


def make(seed: int = 0, size: float = 0.2, **sizes: Any) -> Minimal:
    torch.manual_seed(seed)
    model = Minimal(**{"actions": 4, "d": 16, "heads": 2, "blocks": 2, "context": 4, **sizes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


def batch_of(model: Minimal, n: int = 2, steps: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(LONGEST - steps, (n, 1), generator=generator)
    return {
        "states": torch.rand(n, steps, FRAMES * 84 * 84, generator=generator),
        "actions": torch.randint(model.head.out_features, (n, steps), generator=generator),
        "returns_to_go": torch.randn(n, steps, 1, generator=generator),
        "timesteps": starts + torch.arange(steps),
    }


def original(model: Minimal, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = batch["actions"][..., None]
    # As its own rollouts do: the current step's number for the whole window.
    now = batch["timesteps"][:, -1:, None]
    with torch.no_grad():
        return model(batch["states"], ids, rtgs=batch["returns_to_go"], timesteps=now)[0]


def lensed(lens: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return lens(**batch).action_preds


def saved(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "Breakout_123.pth")
    return folder / "Breakout_123.pth"
