"""dt-lens on the agents of toy_dt: an adapter in one file, outside dt-lens. docs/adapters.md explains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dt_lens import DtLensError
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.state_dicts import (
    Layout,
    Options,
    StateDictAdapter,
    Tensors,
    Trace,
    ask_for_heads,
    run_facts,
)
from dt_lens.lens import Checkpoint

SETTINGS = {"heads": "n_heads", "window": "context", "env": "environment", "scale": "return_scale"}


class ToyLayout(Layout):
    """Sizes, names and computation of one agent."""

    kind = "a toy_dt agent"
    unused = r"ladder\.\d+\.causal"

    def __init__(self, tensors: Tensors, given: Options) -> None:
        width, obs = tensors.size("obs_in.weight")
        self.facts = run_facts({}, given)
        self.cfg = HookedDecisionTransformerConfig(
            state_dim=obs,
            act_dim=tensors.size("act_out.weight")[0],
            d_model=width,
            n_layers=tensors.count(r"ladder\.(\d+)\."),
            n_heads=ask_for_heads(given, self.kind, 2),
            d_mlp=tensors.size("ladder.0.widen.weight")[0],
            n_ctx=self.facts.context,
            max_ep_len=tensors.size("clock.weight")[0],
            act_fn="silu",
            embed_ln=False,
            action_tanh=False,
            discrete_actions=True,
            predicts=("action",),
        )

    def canonical(self, tensors: Tensors) -> dict[str, Tensor]:
        cfg, d = self.cfg, self.cfg.d_model
        weights = {
            "embed.action.W": tensors.take("act_in.weight", cfg.act_dim, d),
            "embed.timestep.W": tensors.take("clock.weight", cfg.max_ep_len, d),
            "predict.action.W": tensors.take("act_out.weight", cfg.act_dim, d).T,
        }
        weights |= tensors.linear("rtg_in", "embed.return_to_go", 1, d)
        weights |= tensors.linear("obs_in", "embed.state", cfg.state_dim, d)
        weights |= tensors.norm("norm_out", "ln_final", d)
        for layer in range(cfg.n_layers):
            t, b = f"ladder.{layer}", f"blocks.{layer}"
            query = tensors.take(f"{t}.query.weight", d, d)
            fused = tensors.take(f"{t}.key_value.weight", 2 * d, d)
            mix = tensors.take(f"{t}.mix.weight", d, d)
            weights[f"{b}.attn.W_Q"] = rearrange(query, "(head e) d -> head d e", head=cfg.n_heads)
            key, value = rearrange(fused, "(head which e) d -> which head d e", which=2, head=cfg.n_heads)
            weights[f"{b}.attn.W_K"], weights[f"{b}.attn.W_V"] = key, value
            weights[f"{b}.attn.W_O"] = rearrange(mix, "d (head e) -> head e d", head=cfg.n_heads)
            weights |= tensors.mlp(f"{t}.widen", f"{t}.narrow", f"{b}.mlp", d, cfg.d_mlp)
            weights |= tensors.norm(f"{t}.norm_a", f"{b}.ln1", d) | tensors.norm(f"{t}.norm_b", f"{b}.ln2", d)
        return weights

    def forward(self, trace: Trace, batch: Mapping[str, Any]) -> None:
        note, linear = trace.note, trace.linear
        time = note("hook_embed_timestep", F.embedding(batch["timesteps"], trace.tensors["clock.weight"]))
        returns = note("hook_embed_return_to_go", linear("rtg_in", batch["returns_to_go"])) + time
        states = note("hook_embed_state", linear("obs_in", batch["states"])) + time
        taken = F.embedding(batch["actions"].argmax(-1), trace.tensors["act_in.weight"])
        x = trace.tokens(returns, states, note("hook_embed_action", taken) + time)
        for layer in range(self.cfg.n_layers):
            x = self._block(trace, f"ladder.{layer}", f"blocks.{layer}", x)
        x = note("hook_final", trace.norm("norm_out", note(f"blocks.{self.cfg.n_layers - 1}.hook_resid_post", x)))
        note("action_preds", note("hook_action_pre", linear("act_out", x[:, 1::3])))

    def _block(self, trace: Trace, t: str, b: str, x: Tensor) -> Tensor:
        note, linear = trace.note, trace.linear
        y = note(f"{b}.attn_in", trace.norm(f"{t}.norm_a", note(f"{b}.hook_resid_pre", x)))
        pairs = rearrange(linear(f"{t}.key_value", y), "n t (head ke) -> n t head ke", head=self.cfg.n_heads)
        k, v = (rearrange(part, "n t head e -> n t (head e)") for part in pairs.chunk(2, dim=-1))
        z = trace.attend(f"{b}.attn", linear(f"{t}.query", y), k, v)
        x = note(f"{b}.hook_resid_mid", x + note(f"{b}.hook_attn_out", linear(f"{t}.mix", z)))
        y = note(f"{b}.mlp_in", trace.norm(f"{t}.norm_b", x))
        hidden = note(f"{b}.mlp.hook_post", F.silu(note(f"{b}.mlp.hook_pre", linear(f"{t}.widen", y))))
        return x + note(f"{b}.hook_mlp_out", linear(f"{t}.narrow", hidden))

    def call(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        acts = batch["actions"].argmax(-1)
        return {"action_preds": model(batch["returns_to_go"], batch["states"], acts, batch["timesteps"])}


class ToyDecisionTransformer(StateDictAdapter):
    """The adapter: what toy_dt's ``save`` writes, a bare state dict, or a live ``ToyDT``."""

    name = "toy"
    layout = ToyLayout
    marks = frozenset({"rtg_in.weight", "ladder.0.key_value.weight", "act_out.weight"})
    options = frozenset({"n_heads"})

    def said_by_file(self, checkpoint: Checkpoint, given: Mapping[str, Any]) -> dict[str, Any]:
        settings = checkpoint.extra.get("settings", {})
        if not isinstance(settings, Mapping):
            raise DtLensError(f"The settings in {checkpoint.path} are not a dict; save the file with toy_dt's save().")
        said = {ours: settings[theirs] for theirs, ours in SETTINGS.items() if theirs in settings}
        return said | ({"target_returns": [settings["goal"]]} if "goal" in settings else {})

    def said_by_model(self, model: Any) -> dict[str, Any]:
        return {"n_heads": model.ladder[0].heads, "context": model.window}
