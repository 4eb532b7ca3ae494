"""Somebody's code base, made up: a small decision transformer for discrete actions, and the script that trains it.

    python toy_dt.py toy.pt     imitates a controller that balances a pole, in a few seconds

It knows nothing of dt-lens, and dt-lens knows nothing of it. Its names are its own; keys and values are one matrix, in
which each head's two lie side by side; projections have no bias; actions are a table; nothing is predicted but logits
of actions.
"""

from __future__ import annotations

import math
import sys

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rung(nn.Module):
    """One block."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_a, self.norm_b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.widen, self.narrow = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.register_buffer("causal", torch.ones(3 * window, 3 * window, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        size = width // self.heads
        y = self.norm_a(x)
        q = self.query(y).view(n, t, self.heads, size).transpose(1, 2)
        k, v = self.key_value(y).view(n, t, self.heads, 2 * size).transpose(1, 2).chunk(2, dim=-1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(size)).masked_fill(~self.causal[:t, :t], -math.inf)
        x = x + self.mix((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, width))
        return x + self.narrow(F.silu(self.widen(self.norm_b(x))))


class ToyDT(nn.Module):
    """Logits of actions from ``rtg [n, step, 1]``, ``obs [n, step, obs]``, ``acts [n, step]``, ``when [n, step]``."""

    def __init__(
        self, obs: int, acts: int, width: int = 32, depth: int = 2, heads: int = 2, window: int = 8, horizon: int = 500
    ) -> None:
        super().__init__()
        self.window = window
        self.rtg_in, self.obs_in = nn.Linear(1, width), nn.Linear(obs, width)
        self.act_in, self.clock = nn.Embedding(acts, width), nn.Embedding(horizon, width)
        self.ladder = nn.ModuleList(Rung(width, heads, window) for _ in range(depth))
        self.norm_out, self.act_out = nn.LayerNorm(width), nn.Linear(width, acts, bias=False)

    def forward(self, rtg: Tensor, obs: Tensor, acts: Tensor, when: Tensor) -> Tensor:
        tokens = (
            torch.stack((self.rtg_in(rtg), self.obs_in(obs), self.act_in(acts)), dim=2) + self.clock(when)[:, :, None]
        )
        x = tokens.flatten(1, 2)
        for rung in self.ladder:
            x = rung(x)
        return self.act_out(self.norm_out(x[:, 1::3]))


def save(model: ToyDT, path: str, env: str = "CartPole-v1", scale: float = 500.0, goal: float = 500.0) -> None:
    settings = {"heads": model.ladder[0].heads, "window": model.window, "env": env, "scale": scale, "goal": goal}
    torch.save({"model": model.state_dict(), "settings": settings}, path)


def balance(obs: np.ndarray) -> int:
    """A controller that keeps the pole up until the time limit."""
    return int(obs @ np.array([0.1, 0.4, 1.5, 1.0]) > 0)


def train(path: str, episodes: int = 60, steps: int = 400, seed: int = 0) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    env = gymnasium.make("CartPole-v1")
    played = []
    for episode in range(episodes):
        slips = rng.uniform(0, 0.5)  # how often another action is taken than the controller's, which is the label
        obs, over, rows = env.reset(seed=seed + episode)[0], False, []
        while not over:
            wise = balance(obs)
            act = int(rng.integers(2)) if rng.random() < slips else wise
            rows.append((obs, act, wise))
            obs, _, terminated, truncated, _ = env.step(act)
            over = terminated or truncated
        played.append(rows)
    model = ToyDT(obs=4, acts=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = []
        while len(batch) < 32:
            rows = played[rng.integers(len(played))]
            if len(rows) >= model.window:
                start = int(rng.integers(len(rows) - model.window + 1))
                batch.append((rows, range(start, start + model.window)))
        rtg = torch.tensor([[[(len(rows) - i) / 500.0] for i in at] for rows, at in batch])
        obs = torch.tensor(np.array([[rows[i][0] for i in at] for rows, at in batch]))
        acts, wise = (torch.tensor([[rows[i][which] for i in at] for rows, at in batch]) for which in (1, 2))
        logits = model(rtg, obs, acts, torch.tensor([list(at) for _, at in batch]))
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), wise.flatten()).backward()
        optimizer.step()
    save(model.eval(), path)


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "toy.pt")
