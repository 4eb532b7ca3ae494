"""The Atari half of kzl/decision-transformer: minGPT blocks after a convolutional encoder of frames.

Return, action and frame embeddings go through a tanh; there is no LayerNorm over them. Each token has a learned
position in the window, and all tokens of a window have the embedding of one timestep: here, as in the authors' own
rollouts, that of the window's last step. A state is four grey frames of 84 x 84 pixels between 0 and 1. A state dict of
the naive model (``model_type="naive"``, behaviour cloning without returns) has the same keys and cannot be
distinguished.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.state_dicts import (
    UNSCALED,
    Layout,
    Options,
    StateDictAdapter,
    Tensors,
    Trace,
    ask_for_heads,
    run_facts,
)
from dt_lens.errors import DtLensError
from dt_lens_adapters.state_encoders import ConvStack, image_side

__all__ = ["KZLAtariDecisionTransformer"]

KERNELS, STRIDES = (8, 4, 3), (4, 2, 1)
CONVS, LINEAR = ("state_encoder.0", "state_encoder.2", "state_encoder.4"), "state_encoder.7"


class _Layout(Layout):
    kind = "an Atari decision transformer of kzl's"
    unused = r"tok_emb\.weight|blocks\.\d+\.attn\.mask"

    def __init__(self, tensors: Tensors, given: Options) -> None:
        n_position, d = tensors.size("pos_emb", 3)[1:]
        self.channels = [tensors.size(f"{CONVS[0]}.weight", 4)[1]]
        self.channels += [tensors.size(f"{conv}.weight", 4)[0] for conv in CONVS]
        left = math.isqrt(tensors.size(f"{LINEAR}.weight")[1] // self.channels[-1])
        self.side = image_side(left, KERNELS, STRIDES)
        # The position table has a row more than the block has tokens. Returns are fed as they are.
        self.facts = run_facts({**UNSCALED, "context": max(1, (n_position - 1) // 3)}, given)
        self.cfg = HookedDecisionTransformerConfig(
            state_dim=self.channels[0] * self.side**2,
            act_dim=tensors.size("head.weight")[0],
            d_model=d,
            n_layers=tensors.count(r"blocks\.(\d+)\."),
            n_heads=ask_for_heads(given, self.kind, 8),
            d_mlp=tensors.size("blocks.0.mlp.0.weight")[0],
            n_ctx=self.facts.context,
            max_ep_len=tensors.size("global_pos_emb", 3)[1],
            act_fn="gelu",
            embed_ln=False,
            action_tanh=False,
            discrete_actions=True,
            position="learned",
            n_position=n_position,
            timestep_of="window",
            embed_act="tanh",
            predicts=("action",),
        )

    def state_encoder(self) -> nn.Module:
        return ConvStack(self.channels, KERNELS, STRIDES, self.side, self.cfg.d_model, ("relu",), ("tanh",), 255.0)

    def canonical(self, tensors: Tensors) -> dict[str, Tensor]:
        cfg, d = self.cfg, self.cfg.d_model
        weights = tensors.linear("ret_emb.0", "embed.return_to_go", 1, d) | tensors.norm("ln_f", "ln_final", d)
        weights["embed.action.W"] = tensors.take("action_embeddings.0.weight", cfg.act_dim, d)
        weights["embed.position.W"] = tensors.take("pos_emb", 1, cfg.n_position, d)[0]
        weights["embed.timestep.W"] = tensors.take("global_pos_emb", 1, cfg.max_ep_len, d)[0]
        weights["predict.action.W"] = tensors.take("head.weight", cfg.act_dim, d).T
        encoder = "embed.state"
        for i, (key, kernel) in enumerate(zip(CONVS, KERNELS, strict=True)):
            shape = (self.channels[i + 1], self.channels[i], kernel, kernel)
            weights[f"{encoder}.convs.{i}.weight"] = tensors.take(f"{key}.weight", *shape)
            weights[f"{encoder}.convs.{i}.bias"] = tensors.take(f"{key}.bias", self.channels[i + 1])
        left = self.side
        for kernel, stride in zip(KERNELS, STRIDES, strict=True):
            left = (left - kernel) // stride + 1
        weights[f"{encoder}.linear.weight"] = tensors.take(f"{LINEAR}.weight", d, self.channels[-1] * left**2)
        weights[f"{encoder}.linear.bias"] = tensors.take(f"{LINEAR}.bias", d)
        for layer in range(cfg.n_layers):
            b = f"blocks.{layer}"
            for letter, net in (("Q", "query"), ("K", "key"), ("V", "value")):
                weights |= tensors.projection(f"{b}.attn.{net}", f"{b}.attn", letter, cfg.n_heads, d)
            weights |= tensors.output(f"{b}.attn.proj", f"{b}.attn", cfg.n_heads, d)
            weights |= tensors.mlp(f"{b}.mlp.0", f"{b}.mlp.2", f"{b}.mlp", d, cfg.d_mlp)
            weights |= tensors.norm(f"{b}.ln1", f"{b}.ln1", d) | tensors.norm(f"{b}.ln2", f"{b}.ln2", d)
        return weights

    def forward(self, trace: Trace, batch: Mapping[str, Any]) -> None:
        note, linear, w = trace.note, trace.linear, trace.tensors
        last = batch["timesteps"][:, -1:]
        time = note("hook_embed_timestep", w["global_pos_emb"][0][last].expand(-1, batch["timesteps"].shape[1], -1))
        returns = note("hook_embed_return_to_go", torch.tanh(linear("ret_emb.0", batch["returns_to_go"])))
        states = note("hook_embed_state", self._read(trace, batch["states"]))
        ids = batch["actions"].argmax(-1) if batch["actions"].is_floating_point() else batch["actions"]
        actions = note("hook_embed_action", torch.tanh(F.embedding(ids, w["action_embeddings.0.weight"])))
        x = trace.tokens(returns + time, states + time, actions + time)
        x = x + w["pos_emb"][0, : x.shape[1]]
        for layer in range(self.cfg.n_layers):
            x = self._block(trace, f"blocks.{layer}", x)
        note(f"blocks.{self.cfg.n_layers - 1}.hook_resid_post", x)
        x = note("hook_final", trace.norm("ln_f", x))
        note("action_preds", note("hook_action_pre", linear("head", x[:, 1::3])))

    def _read(self, trace: Trace, states: Tensor) -> Tensor:
        x = states.reshape(-1, self.channels[0], self.side, self.side)
        for conv, stride in zip(CONVS, STRIDES, strict=True):
            x = torch.relu(F.conv2d(x, trace.tensors[f"{conv}.weight"], trace.tensors[f"{conv}.bias"], stride))
        return torch.unflatten(torch.tanh(trace.linear(LINEAR, x.flatten(1))), 0, states.shape[:2])

    def _block(self, trace: Trace, b: str, x: Tensor) -> Tensor:
        note, linear = trace.note, trace.linear
        normed = note(f"{b}.attn_in", trace.norm(f"{b}.ln1", note(f"{b}.hook_resid_pre", x)))
        q, k, v = (linear(f"{b}.attn.{net}", normed) for net in ("query", "key", "value"))
        z = trace.attend(f"{b}.attn", q, k, v)
        x = note(f"{b}.hook_resid_mid", x + note(f"{b}.hook_attn_out", linear(f"{b}.attn.proj", z)))
        normed = note(f"{b}.mlp_in", trace.norm(f"{b}.ln2", x))
        hidden = note(f"{b}.mlp.hook_post", F.gelu(note(f"{b}.mlp.hook_pre", linear(f"{b}.mlp.0", normed))))
        return x + note(f"{b}.hook_mlp_out", linear(f"{b}.mlp.2", hidden))

    def call(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        ids = batch["actions"].argmax(-1, keepdim=True)
        # It reads the last action only when it gets targets; the loss is not used.
        time = batch["timesteps"][:, -1:, None]
        logits, _ = model(batch["states"], ids, targets=ids, rtgs=batch["returns_to_go"], timesteps=time)
        return {"action_preds": logits}


class KZLAtariDecisionTransformer(StateDictAdapter):
    """The adapter: a bare state dict, or the live ``GPT`` that it is of."""

    name = "kzl_atari"
    layout = _Layout
    marks = frozenset({"ret_emb.0.weight", "global_pos_emb", "blocks.0.attn.query.weight"})
    options = frozenset({"n_heads"})

    def said_by_model(self, model: Any) -> dict[str, Any]:
        kind = getattr(model, "model_type", "reward_conditioned")
        if kind != "reward_conditioned":
            raise DtLensError(
                f"This model is of kzl's type {kind!r}, which reads no returns; a decision transformer is of type "
                "'reward_conditioned'."
            )
        return {"n_heads": model.blocks[0].attn.n_head}
