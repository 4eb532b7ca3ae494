"""State dicts and live models of nikhilbarhate99/min-decision-transformer.

Post-LayerNorm blocks, ``x = ln1(x + attention(x)); x = ln2(x + mlp(x))``, an exact GELU, no LayerNorm after the last
one, no positions but the timestep's, and no padding mask. The mask's width gives the context; nothing gives the heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dt_lens.decision_transformer.config import HEADS, HookedDecisionTransformerConfig
from dt_lens.decision_transformer.state_dicts import (
    Layout,
    Options,
    StateDictAdapter,
    Tensors,
    Trace,
    ask_for_heads,
    run_facts,
    steps_of_mask,
)

__all__ = ["MinDecisionTransformer"]

EMBEDDINGS = {"rtg": "return_to_go", "state": "state", "action": "action"}
OPTIONAL = {"state": r"predict_state\.(weight|bias)", "return_to_go": r"predict_rtg\.(weight|bias)"}


class _Layout(Layout):
    kind = "a min-decision-transformer"
    unused = r"transformer\.\d+\.attention\.mask"

    def __init__(self, tensors: Tensors, given: Options) -> None:
        d, state_dim = tensors.size("embed_state.weight")
        act_dim = tensors.size("predict_action.0.weight")[0]
        # The code base's variant for discrete actions has a table where the other has a linear map.
        self.by_id = "embed_action.bias" not in tensors and tensors.size("embed_action.weight") == (act_dim, d)
        # The scale is the default of its train.py in every environment.
        context = steps_of_mask(tensors.tensors, "transformer.0.attention.mask")
        self.facts = run_facts({"return_scale": given.assume("return_scale", 1000.0), **context}, given)
        self.cfg = HookedDecisionTransformerConfig(
            state_dim=state_dim,
            act_dim=act_dim,
            d_model=d,
            n_layers=tensors.count(r"transformer\.(\d+)\."),
            n_heads=ask_for_heads(given, self.kind, 1),
            d_mlp=tensors.size("transformer.0.mlp.0.weight")[0],
            n_ctx=self.facts.context,
            max_ep_len=tensors.size("embed_timestep.weight")[0],
            act_fn="gelu",
            normalization="post",
            final_ln=False,
            action_tanh=given.assume("action_tanh", not self.by_id),
            discrete_actions=given.get("discrete_actions", self.by_id),
            # Copies of the code often leave out the heads that have no loss.
            predicts=tuple(head for head in HEADS if head == "action" or tensors.holds(OPTIONAL[head])),
        )

    def canonical(self, tensors: Tensors) -> dict[str, Tensor]:
        cfg, d = self.cfg, self.cfg.d_model
        sizes = {"rtg": 1, "state": cfg.state_dim, "action": cfg.act_dim}
        weights = {"embed.timestep.W": tensors.take("embed_timestep.weight", cfg.max_ep_len, d)}
        for theirs, ours in EMBEDDINGS.items():
            if theirs == "action" and self.by_id:
                weights["embed.action.W"] = tensors.take("embed_action.weight", cfg.act_dim, d)
            else:
                weights |= tensors.linear(f"embed_{theirs}", f"embed.{ours}", sizes[theirs], d)
            head = "predict_action.0" if theirs == "action" else f"predict_{theirs}"
            if ours not in cfg.predicts:
                continue
            weights |= tensors.linear(head, f"predict.{ours}", d, sizes[theirs])
        weights |= tensors.norm("embed_ln", "embed_ln", d)
        for layer in range(cfg.n_layers):
            t, b = f"transformer.{layer}", f"blocks.{layer}"
            for letter in "QKV":
                net = f"{t}.attention.{letter.lower()}_net"
                weights |= tensors.projection(net, f"{b}.attn", letter, cfg.n_heads, d)
            weights |= tensors.output(f"{t}.attention.proj_net", f"{b}.attn", cfg.n_heads, d)
            weights |= tensors.mlp(f"{t}.mlp.0", f"{t}.mlp.2", f"{b}.mlp", d, cfg.d_mlp)
            weights |= tensors.norm(f"{t}.ln1", f"{b}.ln1", d) | tensors.norm(f"{t}.ln2", f"{b}.ln2", d)
        return weights

    def forward(self, trace: Trace, batch: Mapping[str, Any]) -> None:
        note, linear = trace.note, trace.linear
        time = note("hook_embed_timestep", F.embedding(batch["timesteps"], trace.tensors["embed_timestep.weight"]))
        returns = note("hook_embed_return_to_go", linear("embed_rtg", batch["returns_to_go"])) + time
        states = note("hook_embed_state", linear("embed_state", batch["states"])) + time
        chosen = batch["actions"]
        if not self.by_id:
            actions = linear("embed_action", chosen)
        else:
            ids = chosen.argmax(-1) if chosen.is_floating_point() else chosen
            actions = F.embedding(ids, trace.tensors["embed_action.weight"])
        actions = note("hook_embed_action", actions) + time
        x = trace.norm("embed_ln", trace.tokens(returns, states, actions))
        for layer in range(self.cfg.n_layers):
            x = self._block(trace, f"transformer.{layer}", f"blocks.{layer}", x)
        note(f"blocks.{self.cfg.n_layers - 1}.hook_resid_post", x)
        note("hook_final", x)
        state_token, action_token = x[:, 1::3], x[:, 2::3]
        action = note("hook_action_pre", linear("predict_action.0", state_token))
        note("action_preds", torch.tanh(action) if self.cfg.action_tanh else action)
        for head, key, name in (
            ("state", "predict_state", "state_preds"),
            ("return_to_go", "predict_rtg", "return_preds"),
        ):
            if head in self.cfg.predicts:
                note(name, linear(key, action_token))

    def _block(self, trace: Trace, t: str, b: str, x: Tensor) -> Tensor:
        note, linear = trace.note, trace.linear
        note(f"{b}.hook_resid_pre", x)
        q, k, v = (linear(f"{t}.attention.{letter}_net", x) for letter in "qkv")
        z = trace.attend(f"{b}.attn", q, k, v)
        attended = note(f"{b}.hook_attn_out", linear(f"{t}.attention.proj_net", z))
        x = note(f"{b}.hook_resid_mid", trace.norm(f"{t}.ln1", x + attended))
        hidden = note(f"{b}.mlp.hook_post", F.gelu(note(f"{b}.mlp.hook_pre", linear(f"{t}.mlp.0", x))))
        return trace.norm(f"{t}.ln2", x + note(f"{b}.hook_mlp_out", linear(f"{t}.mlp.2", hidden)))

    def call(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        actions = batch["actions"].argmax(-1) if self.by_id else batch["actions"]
        out = model(batch["timesteps"], batch["states"], actions, batch["returns_to_go"])
        if isinstance(out, Tensor):
            return {"action_preds": out}
        named = zip(("state_preds", "action_preds", "return_preds"), out, strict=True)
        return {name: tensor for name, tensor in named if tensor is not None}


class MinDecisionTransformer(StateDictAdapter):
    """The adapter: a bare state dict, or the live ``DecisionTransformer`` that it is of."""

    name = "min_decision_transformer"
    layout = _Layout
    marks = frozenset({"embed_rtg.weight", "transformer.0.attention.q_net.weight", "predict_action.0.weight"})
    options = frozenset({"n_heads", "action_tanh", "discrete_actions"})

    def said_by_model(self, model: Any) -> dict[str, Any]:
        head = model.predict_action
        return {
            "n_heads": model.transformer[0].attention.n_heads,
            "action_tanh": isinstance(head, nn.Sequential) and any(isinstance(part, nn.Tanh) for part in head),
        }
