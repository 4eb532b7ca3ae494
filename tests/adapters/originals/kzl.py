"""kzl's gym agent, made from a Hugging Face model: its tensors under kzl's names, and its live class."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

OPTIONS = {"n_positions": 1, "activation_function": "relu", "max_ep_len": 40}


def renamed(hf: Any, width: int | None = 12, position: bool = False) -> dict[str, torch.Tensor]:
    """A Hugging Face model's tensors as kzl's code base saves them, with the masks of its time."""
    tensors = {re.sub(r"^encoder\.", "transformer.", key): tensor for key, tensor in hf.state_dict().items()}
    if not position:
        del tensors["transformer.wpe.weight"]
    for layer in range(hf.config.n_layer if width else 0):
        mask = torch.ones(1, 1, width, width, dtype=torch.uint8).tril()
        tensors |= {f"transformer.h.{layer}.attn.bias": mask}
        tensors |= {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4)}
    return tensors


class LiveKZL(nn.Module):
    """A stand-in with the modules and the signature of kzl's class, computing what ``hf`` computes."""

    def __init__(self, hf: Any, max_length: int = 6) -> None:
        super().__init__()
        for name in ("embed_timestep", "embed_return", "embed_state", "embed_action", "embed_ln"):
            setattr(self, name, getattr(hf, name))
        for name in ("predict_state", "predict_action", "predict_return"):
            setattr(self, name, getattr(hf, name))
        self.transformer = hf.encoder
        self.max_length = max_length
        object.__setattr__(self, "hf", hf)  # no submodule, so that every tensor is listed once
        self.factor = 1.0

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if "wpe" not in k}

    def forward(
        self,
        states: Any,
        actions: Any,
        rewards: Any,
        returns_to_go: Any,
        timesteps: Any,
        attention_mask: Any = None,
    ) -> Any:
        out = self.hf(
            states=states * self.factor,
            actions=actions,
            returns_to_go=returns_to_go,
            timesteps=timesteps,
            attention_mask=attention_mask,
        )
        return out.state_preds, out.action_preds, out.return_preds


def predictions(out: Any) -> torch.Tensor:
    return torch.cat([out.state_preds, out.action_preds, out.return_preds], -1)


class LiveAroundGPT2(LiveKZL):
    """A model of kzl's form around ``GPT2Model`` itself, which adds a row of ``wpe`` to each token of the window."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.state_dict(self, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hook = self.transformer.register_forward_pre_hook(
            lambda _m, inputs, named: (inputs, {**named, "position_ids": None}), with_kwargs=True
        )
        try:
            return super().forward(*args, **kwargs)
        finally:
            hook.remove()
