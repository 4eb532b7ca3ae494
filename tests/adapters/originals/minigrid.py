"""A MiniGrid agent: TransformerLens's blocks between embeddings without biases."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

D, HEADS, ACTIONS, SIDE, CHANNELS = 8, 2, 3, 3, 3
SIZES = {"d_model": D, "n_heads": HEADS, "n_layers": 2}


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.4 * torch.randn(*shape))


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = weight(D), weight(D)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (D,), self.w, self.b, 1e-5)


class Attention(nn.Module):
    def __init__(self, n_ctx: int) -> None:
        super().__init__()
        e = D // HEADS
        self.W_Q, self.W_K, self.W_V, self.W_O = (
            weight(HEADS, D, e),
            weight(HEADS, D, e),
            weight(HEADS, D, e),
            weight(HEADS, e, D),
        )
        self.b_Q, self.b_K, self.b_V, self.b_O = weight(HEADS, e), weight(HEADS, e), weight(HEADS, e), weight(D)
        self.register_buffer("mask", torch.ones(n_ctx, n_ctx, dtype=torch.bool).tril())
        self.register_buffer("IGNORE", torch.tensor(-math.inf))

    def forward(self, x: Tensor) -> Tensor:
        out = self.b_O.expand_as(x)
        for h in range(HEADS):
            q, k, v = (x @ getattr(self, f"W_{c}")[h] + getattr(self, f"b_{c}")[h] for c in "QKV")
            scores = (q @ k.mT / math.sqrt(D // HEADS)).masked_fill(~self.mask[: x.shape[1], : x.shape[1]], -math.inf)
            out = out + scores.softmax(-1) @ v @ self.W_O[h]
        return out


class MLP(nn.Module):
    def __init__(self, gated: bool, d_mlp: int) -> None:
        super().__init__()
        self.W_in, self.b_in, self.W_out, self.b_out = weight(D, d_mlp), weight(d_mlp), weight(d_mlp, D), weight(D)
        if gated:
            self.W_gate = weight(D, d_mlp)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "W_gate"):
            post = torch.relu(x @ self.W_gate) * (x @ self.W_in) + self.b_in
        else:
            post = torch.relu(x @ self.W_in + self.b_in)
        return post @ self.W_out + self.b_out


class Agent(nn.Module):
    """A stand-in with the parameters and the signature of the code base's class, written from its description."""

    def __init__(self, gated: bool, normed: bool, n_ctx: int, d_mlp: int = 12) -> None:
        super().__init__()
        self.action_embedding = nn.Sequential(nn.Embedding(ACTIONS + 1, D))
        self.time_embedding = nn.Embedding(21, D)
        self.state_embedding = nn.Linear(SIDE * SIDE * CHANNELS, D, bias=False)
        self.reward_embedding = nn.Sequential(nn.Linear(1, D, bias=False))
        self.transformer = nn.Module()
        self.transformer.pos_embed = nn.Module()
        self.transformer.pos_embed.W_pos = weight(n_ctx, D)
        self.transformer.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.transformer.blocks:
            if normed:
                block.ln1, block.ln2 = Norm(), Norm()
            block.attn, block.mlp = Attention(n_ctx), MLP(gated, d_mlp)
        if normed:
            self.transformer.ln_final = Norm()
        self.action_predictor = nn.Linear(D, ACTIONS)
        self.state_predictor = nn.Linear(D, SIDE * SIDE * CHANNELS)
        self.reward_predictor = nn.Linear(D, 1)
        self.normed = normed

    def forward(self, states: Tensor, actions: Tensor | None, rtgs: Tensor, timesteps: Tensor) -> Any:
        flat = torch.stack([torch.stack([image.permute(2, 0, 1).flatten() for image in row]) for row in states])
        time = self.time_embedding(timesteps[..., 0])
        returns, states = self.reward_embedding(rtgs) + time, self.state_embedding(flat) + time
        tokens = []
        for step in range(time.shape[1]):
            tokens += [returns[:, step], states[:, step]]
            if actions is not None and step < actions.shape[1]:
                tokens.append(self.action_embedding(actions[:, step, 0]) + time[:, step])
        x = torch.stack(tokens, 1) + self.transformer.pos_embed.W_pos[: len(tokens)]
        for block in self.transformer.blocks:
            x = x + block.attn(block.ln1(x) if self.normed else x)
            x = x + block.mlp(block.ln2(x) if self.normed else x)
        x = self.transformer.ln_final(x) if self.normed else x
        if actions is None:
            return None, self.action_predictor(x[:, 1::3]), None
        if x.shape[1] % 3:
            x = torch.cat((x, x[:, -2:-1]), 1)  # the code base's filler, not to be believed
        return self.state_predictor(x[:, 2::3]), self.action_predictor(x[:, 1::3]), self.reward_predictor(x[:, 2::3])


def agent(gated: bool = False, normed: bool = False, n_ctx: int = 11, seed: int = 0, d_mlp: int = 12) -> Agent:
    torch.manual_seed(seed)
    return Agent(gated, normed, n_ctx, d_mlp).eval()


def config(made: Agent, **changes: Any) -> dict[str, Any]:
    return {
        "d_model": D, "n_heads": HEADS, "d_mlp": 12, "n_layers": 2, "n_ctx": len(made.transformer.pos_embed.W_pos),
        "layer_norm": "LN" if made.normed else False, "gated_mlp": hasattr(made.transformer.blocks[0].mlp, "W_gate"),
        "activation_fn": "relu", "state_embedding_type": "grid", "time_embedding_type": "embedding", "seed": 1,
        "device": "cpu", **changes,
    }  # fmt: skip


def save(made: Agent, file: Path, tensors: dict[str, Tensor] | None = None, **beside: Any) -> Path:
    words = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in beside.items()}
    torch.save(
        {"model_state_dict": tensors or made.state_dict(), "model_config": json.dumps(config(made)), **words}, file
    )
    return file
