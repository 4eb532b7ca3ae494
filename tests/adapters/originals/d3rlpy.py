"""d3rlpy's two decision transformers, continuous and discrete, and the two kinds of file that it writes."""

from __future__ import annotations

import io
import json
import math
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

LONGEST = 30


class Swish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


ACTS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "swish": Swish}


class Attention(nn.Module):
    def __init__(self, d: int, tokens: int, heads: int) -> None:
        super().__init__()
        self._num_heads = heads
        self._k, self._q, self._v, self._proj = (nn.Linear(d, d) for _ in range(4))
        self.register_buffer("_mask", torch.ones(tokens, tokens).tril()[None, None])

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        t, e = x.shape[1], x.shape[2] // self._num_heads
        parts = []
        for h in range(self._num_heads):
            q, k, v = (net(x)[..., h * e : (h + 1) * e] for net in (self._q, self._k, self._v))
            scores = (q @ k.mT / math.sqrt(e)).masked_fill(self._mask[0, :, :t, :t] == 0, -10000)
            parts.append((scores - 10000 * padding[:, None]).softmax(-1) @ v)
        return self._proj(torch.cat(parts, -1))


class MLP(nn.Module):
    def __init__(self, d: int, act: str) -> None:
        super().__init__()
        self._l1, self._l2, self._activation = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), ACTS[act]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._l2(self._activation(self._l1(x)))


class Block(nn.Module):
    def __init__(self, d: int, tokens: int, heads: int, act: str) -> None:
        super().__init__()
        self._attention, self._mlp = Attention(d, tokens, heads), MLP(d, act)
        self._layer_norm1, self._layer_norm2 = nn.LayerNorm(d, eps=0.003), nn.LayerNorm(d, eps=0.003)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        x = x + self._attention(self._layer_norm1(x), padding)
        return x + self._mlp(self._layer_norm2(x))


class GPT(nn.Module):
    def __init__(self, d: int, tokens: int, heads: int, blocks: int, act: str) -> None:
        super().__init__()
        self._transformer = nn.ModuleList(Block(d, tokens, heads, act) for _ in range(blocks))
        self._layer_norm = nn.LayerNorm(d, eps=0.003)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        for block in self._transformer:
            x = block(x, padding)
        return self._layer_norm(x)


class Simple(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self._embed = nn.Embedding(LONGEST + 2, d)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self._embed(t)


class Rows(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self._parameter = nn.Parameter(torch.zeros(*shape))


class Global(nn.Module):
    def __init__(self, d: int, context: int) -> None:
        super().__init__()
        self._global_position_embedding = nn.Embedding(LONGEST + 2, d)
        self._block_position_embedding = Rows(1, 3 * context, d)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        here = self._block_position_embedding._parameter[:, : t.shape[1]]
        return self._global_position_embedding(t[:, -1:]) + here


class Vector(nn.Module):
    def __init__(self, widths: list[int], act: str, last: str) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            parts += [nn.Linear(a, b), ACTS[last if i == len(widths) - 2 else act]()]
        self._layers = nn.Sequential(*parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._layers(x)


class Pixel(nn.Module):
    def __init__(self, shape: tuple[int, int, int], d: int) -> None:
        super().__init__()
        convs = nn.Conv2d(shape[0], 3, 6, 3), nn.ReLU(), nn.Conv2d(3, 4, 3, 2), nn.ReLU()
        self._cnn_layers = nn.Sequential(*convs)
        left = ((shape[1] - 6) // 3 + 1 - 3) // 2 + 1
        self._last_layers = nn.Sequential(nn.Linear(4 * left**2, d), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._last_layers(self._cnn_layers(x).flatten(1))


class Minimal(nn.Module):
    """Names, argument order and computation of both of d3rlpy's transformers."""

    def __init__(
        self, discrete: bool, states: Any, act_dim: int, d: int, heads: int, blocks: int, context: int, act: str,
        last: str, by_window: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.discrete, self.states, self.context, self.act_dim = discrete, states, context, act_dim
        self._position_encoding = Global(d, context) if by_window else Simple(d)
        if discrete:
            self._action_embed = nn.Embedding(act_dim, d)
            self._embed_activation = nn.Tanh()
        else:
            self._action_embed, self._embed_ln = nn.Linear(act_dim, d), nn.LayerNorm(d)
        self._gpt2 = GPT(d, 3 * context, heads, blocks, act)
        self._encoder = Pixel(states, d) if isinstance(states, tuple) else Vector([states, 9, d], act, last)
        self._rtg_embed, self._output = nn.Linear(1, d), nn.Linear(d, act_dim, bias=not discrete)
        self.factor = 1.0

    def forward(self, x: Any, action: Any, return_to_go: Any, timesteps: Any, attention_mask: Any) -> Any:
        n, steps = timesteps.shape
        seen = self._encoder(x.reshape(-1, *x.shape[2:])).view(n, steps, -1)
        done = self._action_embed(action.view(n, steps).long() if self.discrete else action)
        kinds = [self._rtg_embed(return_to_go), seen, done]
        if self.discrete:
            kinds = [self._embed_activation(kind) for kind in kinds]
        place = self._position_encoding(timesteps)
        h = torch.stack([kind[:, t] + place[:, t] for t in range(steps) for kind in kinds][:-1], 1)
        h = h if self.discrete else self._embed_ln(h)
        h = self._gpt2(h, attention_mask.repeat_interleave(3, 1)[:, :-1])
        out = self.factor * self._output(h[:, 1::3])
        return (out.softmax(-1), out) if self.discrete else torch.tanh(out)


def make(discrete: bool = False, seed: int = 0, size: float = 0.2, **options: Any) -> Minimal:
    torch.manual_seed(seed)
    usual = {"states": 5, "act_dim": 3, "d": 16, "heads": 2, "blocks": 2, "context": 4, "last": "relu"}
    kind = {"act": "gelu", "by_window": True} if discrete else {"act": "relu", "by_window": False}
    model = Minimal(discrete, **{**usual, **kind, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


def batch_of(model: Minimal, n: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Whole windows in the lens's words; the second is padded on the left, as d3rlpy pads."""
    generator, steps = torch.Generator().manual_seed(seed), model.context
    actions = torch.randn(n, steps, model.act_dim, generator=generator)
    if model.discrete:
        actions = nn.functional.one_hot(actions.argmax(-1), model.act_dim).float()
    mask = torch.ones(n, steps, dtype=torch.long)
    mask[1, : steps // 2] = 0
    size = math.prod(model.states) if isinstance(model.states, tuple) else model.states
    return {
        "states": torch.randn(n, steps, size, generator=generator),
        "actions": actions,
        "returns_to_go": torch.randn(n, steps, 1, generator=generator),
        "timesteps": torch.randint(LONGEST - steps, (n, 1), generator=generator) + torch.arange(steps),
        "attention_mask": mask,
    }


def original(model: Minimal, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    states, actions = batch["states"], batch["actions"]
    if isinstance(model.states, tuple):
        states = states.unflatten(-1, model.states)
    if model.discrete:
        actions = actions.argmax(-1, keepdim=True)
    with torch.no_grad():
        # It counts steps from 1, and what it calls the attention mask is of the padding.
        out = model(states, actions, batch["returns_to_go"], batch["timesteps"] + 1, 1 - batch["attention_mask"])
    return (out[1] if model.discrete else out)[batch["attention_mask"].bool()]


def lensed(lens: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return lens(**batch).action_preds[batch["attention_mask"].bool()]


def weights_file(model: Minimal, file: Path) -> Path:
    """What save_model writes."""
    torch.save({"transformer": model.state_dict(), "optim": {"state": {}, "param_groups": [{"lr": 1e-4}]}}, file)
    return file


def whole_file(model: Minimal, file: Path, act: str, encoder: dict[str, Any], **params: Any) -> Path:
    """What save writes: a pickle of torch's bytes and the configuration."""
    buffer, none = io.BytesIO(), {"type": "none", "params": {}}
    torch.save({"transformer": model.state_dict(), "optim": {"state": {}}}, buffer)
    shape = list(model.states) if isinstance(model.states, tuple) else [model.states]
    said = {
        "observation_scaler": none, "action_scaler": none, "reward_scaler": none, "context_size": model.context,
        "max_timestep": LONGEST, "encoder_factory": encoder, "activation_type": act,
        "num_heads": model._gpt2._transformer[0]._attention._num_heads,
    }  # fmt: skip
    if model.discrete:
        said["embed_activation_type"] = "tanh"
    config = {
        "observation_shape": shape,
        "action_size": model.act_dim,
        "config": {"type": "x", "params": said | params},
    }
    whole = {"torch": buffer.getvalue(), "config": json.dumps(config), "version": "2.8.1"}
    file.write_bytes(pickle.dumps(whole))
    return file


def vector(act: str = "relu", last: str | None = None) -> dict[str, Any]:
    return {"type": "vector", "params": {"hidden_units": [9, 16], "activation": act, "last_activation": last}}
