"""CORL's decision transformer (corl-team, formerly tinkoff-ai): its checkpoints and its live models.

Pre-LayerNorm blocks around ``nn.MultiheadAttention``, whose three input projections are one tensor, an exact GELU, and
one head, for actions. The training script saves ``{"model_state", "state_mean", "state_std"}`` and, beside it, its
settings as ``config.yaml``; where that file is present and fits, no keyword is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from einops import rearrange
from torch import Tensor

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
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
from dt_lens.errors import DtLensError, because
from dt_lens.lens.checkpoints import Checkpoint

__all__ = ["CORLDecisionTransformer"]

EMBEDDINGS = {"return": "return_to_go", "state": "state", "action": "action"}
SIZES = ("embedding_dim", "episode_len", "num_heads", "seq_len")  # whole numbers in the script's settings
LONGEST = 16_384  # bytes; the script's settings are about a thousand


class _Layout(Layout):
    kind = "a CORL decision transformer"
    unused = r"blocks\.\d+\.causal_mask"

    def __init__(self, tensors: Tensors, given: Options) -> None:
        d, state_dim = tensors.size("state_emb.weight")
        most = given.assume("max_action", 1.0)
        if not isinstance(most, (int, float)) or most != 1.0:
            raise DtLensError(
                f"This CORL model multiplies its actions by max_action={given['max_action']!r}; dt-lens has actions in "
                "-1 to 1 only, as CORL's own settings have in every environment."
            )
        # The script multiplies returns by its reward_scale, 0.001 wherever nobody chose another.
        context = steps_of_mask(tensors.tensors, "blocks.0.causal_mask")
        self.facts = run_facts({"return_scale": given.assume("return_scale", 1000.0), **context}, given)
        self.cfg = HookedDecisionTransformerConfig(
            state_dim=state_dim,
            act_dim=tensors.size("action_head.0.weight")[0],
            d_model=d,
            n_layers=tensors.count(r"blocks\.(\d+)\."),
            n_heads=ask_for_heads(given, self.kind, 1),
            d_mlp=tensors.size("blocks.0.mlp.0.weight")[0],
            n_ctx=self.facts.context,
            # An episode's steps, and a context more for what the training pads with.
            max_ep_len=tensors.size("timestep_emb.weight")[0],
            act_fn="gelu",
            predicts=("action",),
        )

    def canonical(self, tensors: Tensors) -> dict[str, Tensor]:
        cfg, d, heads = self.cfg, self.cfg.d_model, self.cfg.n_heads
        weights = {"embed.timestep.W": tensors.take("timestep_emb.weight", cfg.max_ep_len, d)}
        for (theirs, ours), size in zip(EMBEDDINGS.items(), (1, cfg.state_dim, cfg.act_dim), strict=True):
            weights |= tensors.linear(f"{theirs}_emb", f"embed.{ours}", size, d)
        weights |= tensors.linear("action_head.0", "predict.action", d, cfg.act_dim)
        weights |= tensors.norm("emb_norm", "embed_ln", d) | tensors.norm("out_norm", "ln_final", d)
        for layer in range(cfg.n_layers):
            t, b = f"blocks.{layer}", f"blocks.{layer}"
            fused = tensors.take(f"{t}.attention.in_proj_weight", 3 * d, d)
            fused = rearrange(fused, "(which head e) d -> which head d e", which=3, head=heads)
            bias = tensors.take(f"{t}.attention.in_proj_bias", 3 * d)
            bias = rearrange(bias, "(which head e) -> which head e", which=3, head=heads)
            for which, letter in enumerate("QKV"):
                weights[f"{b}.attn.W_{letter}"], weights[f"{b}.attn.b_{letter}"] = fused[which], bias[which]
            weights |= tensors.output(f"{t}.attention.out_proj", f"{b}.attn", heads, d)
            weights |= tensors.mlp(f"{t}.mlp.0", f"{t}.mlp.2", f"{b}.mlp", d, cfg.d_mlp)
            weights |= tensors.norm(f"{t}.norm1", f"{b}.ln1", d) | tensors.norm(f"{t}.norm2", f"{b}.ln2", d)
        return weights

    def forward(self, trace: Trace, batch: Mapping[str, Any]) -> None:
        note, linear = trace.note, trace.linear
        time = note("hook_embed_timestep", F.embedding(batch["timesteps"], trace.tensors["timestep_emb.weight"]))
        returns = note("hook_embed_return_to_go", linear("return_emb", batch["returns_to_go"])) + time
        states = note("hook_embed_state", linear("state_emb", batch["states"])) + time
        actions = note("hook_embed_action", linear("action_emb", batch["actions"])) + time
        x = trace.norm("emb_norm", trace.tokens(returns, states, actions))
        for layer in range(self.cfg.n_layers):
            x = self._block(trace, f"blocks.{layer}", x)
        note(f"blocks.{self.cfg.n_layers - 1}.hook_resid_post", x)
        x = note("hook_final", trace.norm("out_norm", x))
        note("action_preds", torch.tanh(note("hook_action_pre", linear("action_head.0", x[:, 1::3]))))

    def _block(self, trace: Trace, b: str, x: Tensor) -> Tensor:
        note, linear = trace.note, trace.linear
        normed = note(f"{b}.attn_in", trace.norm(f"{b}.norm1", note(f"{b}.hook_resid_pre", x)))
        fused = F.linear(
            normed, trace.tensors[f"{b}.attention.in_proj_weight"], trace.tensors[f"{b}.attention.in_proj_bias"]
        )
        z = trace.attend(f"{b}.attn", *fused.chunk(3, dim=-1))
        x = note(f"{b}.hook_resid_mid", x + note(f"{b}.hook_attn_out", linear(f"{b}.attention.out_proj", z)))
        normed = note(f"{b}.mlp_in", trace.norm(f"{b}.norm2", x))
        hidden = note(f"{b}.mlp.hook_post", F.gelu(note(f"{b}.mlp.hook_pre", linear(f"{b}.mlp.0", normed))))
        return x + note(f"{b}.hook_mlp_out", linear(f"{b}.mlp.2", hidden))

    def call(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        returns = batch["returns_to_go"].squeeze(-1)
        return {"action_preds": model(batch["states"], batch["actions"], returns, batch["timesteps"])}


class CORLDecisionTransformer(StateDictAdapter):
    """The adapter: what CORL's script saves, a bare state dict, or the live ``DecisionTransformer``."""

    name = "corl"
    layout = _Layout
    marks = frozenset({"return_emb.weight", "blocks.0.attention.in_proj_weight", "action_head.0.weight"})
    options = frozenset({"n_heads", "max_action"})

    def said_by_file(self, checkpoint: Checkpoint, given: Mapping[str, Any]) -> dict[str, Any]:
        said: dict[str, Any] = {}
        mean, std = checkpoint.extra.get("state_mean"), checkpoint.extra.get("state_std")
        if (mean is None) != (std is None):
            raise DtLensError(
                f"{checkpoint.path} holds only one of state_mean and state_std, by which its states are normalised; "
                "save both or neither."
            )
        if mean is not None and std is not None:
            try:
                said["state_mean"], said["state_std"] = (torch.as_tensor(x).flatten() for x in (mean, std))
            except (TypeError, ValueError, RuntimeError) as error:
                raise DtLensError(
                    f"The state_mean or state_std in {checkpoint.path} is not an array of numbers ({because(error)}); "
                    "save the model_state alone and pass state_mean= and state_std=."
                ) from error
        return said | _settings(checkpoint)

    def said_by_model(self, model: Any) -> dict[str, Any]:
        said = {"n_heads": model.blocks[0].attention.num_heads, "max_action": getattr(model, "max_action", 1.0)}
        return said | ({"context": model.seq_len} if isinstance(getattr(model, "seq_len", None), int) else {})


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Plain values without aliases: a merge of aliases of merges would grow without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("CORL's settings hold no alias.")
        return super().compose_node(parent, index)


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a ``config.yaml`` beside the file says, if it is one of CORL's and of a model of this shape."""
    said = _read_yaml(checkpoint.folder / "config.yaml") if checkpoint.folder else {}
    numbers = {name: number for name, value in said.items() if (number := _number(value)) is not None}
    table = checkpoint.tensors.get("timestep_emb.weight")
    whole = all(type(numbers.get(name)) is int for name in SIZES)
    if table is None or not whole or "max_action" not in numbers or not numbers.get("reward_scale"):
        return {}
    if [numbers["episode_len"] + numbers["seq_len"], numbers["embedding_dim"]] != list(table.shape):
        return {}
    targets, dataset = said.get("target_returns"), said.get("env_name")
    listed = [_number(value) for value in targets] if isinstance(targets, list) else []
    return {
        "n_heads": numbers["num_heads"],
        "context": numbers["seq_len"],
        "max_action": float(numbers["max_action"]),
        "return_scale": 1 / numbers["reward_scale"],
        "target_returns": [float(number) for number in listed if number is not None],
        "about": {"dataset": dataset} if isinstance(dataset, str) else {},
    }


def _read_yaml(file: Path) -> Mapping[str, Any]:
    """The mapping in a short YAML file; an empty one for any other file."""
    try:
        if not file.is_file() or file.stat().st_size > LONGEST:
            return {}
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _number(value: Any) -> int | float | None:
    """A number of a usual size, else ``None``. YAML takes 1e-3, which has no point, for text."""
    with suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    return value if type(value) in (int, float) and abs(value) < 1e9 else None
