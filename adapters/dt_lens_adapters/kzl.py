"""State dicts of kzl/decision-transformer, the authors' own code (its gym half).

The blocks are an early copy of Hugging Face's GPT-2, so the tensors are Hugging Face's under other names:
``transformer.`` for ``encoder.``, and no position table. The file says nothing of heads, context or normalisation;
heads cannot be told from shapes.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.errors import DtLensError
from dt_lens.files import Checkpoint
from dt_lens_adapters.hf_decision_transformer import FACTS, HFDecisionTransformer, refuse_unknown

__all__ = ["KZLDecisionTransformer"]

SHAPE_OPTIONS = {"n_heads", "act_fn", "action_tanh", "max_ep_len"}
NAMES = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu", "tanh": "tanh"}


class KZLDecisionTransformer:
    """The adapter: renames to Hugging Face's keys, reads the sizes off the shapes and asks for the heads."""

    name = "kzl"

    def recognises(self, source: Checkpoint | nn.Module) -> bool:
        keys = set(source.tensors) if isinstance(source, Checkpoint) else set(dict(source.named_parameters()))
        return {"embed_return.weight", "transformer.h.0.attn.c_attn.weight", "predict_action.0.weight"} <= keys

    def load(self, checkpoint: Checkpoint, **given: Any) -> HookedDecisionTransformer:
        return self._build(dict(checkpoint.tensors), given)

    def wrap(self, model: nn.Module, **given: Any) -> HookedDecisionTransformer:
        lens = self._build(dict(model.state_dict()), {**_read_live(model), **given})
        # The tensors are the live model's own, so its outputs follow every edit; certify has run Hugging Face's class
        # on them.
        object.__setattr__(lens, "original", model)
        lens.train(model.training)
        return lens

    def _build(self, tensors: dict[str, Tensor], given: dict[str, Any]) -> HookedDecisionTransformer:
        refuse_unknown(given, SHAPE_OPTIONS | FACTS)
        if "n_heads" not in given:
            raise DtLensError(
                "A kzl checkpoint does not say how many attention heads it has; pass n_heads= (kzl's default is "
                "n_heads=1)."
            )
        config = self._config(tensors, given)
        d_model = config["hidden_size"]
        masks = [key for key in tensors if re.fullmatch(r"transformer\.h\.\d+\.attn\.bias", key)]
        facts = {name: value for name, value in given.items() if name in FACTS}
        if masks and "context" not in facts:
            facts["context"] = max(
                1, tensors[masks[0]].shape[-1] // 3
            )  # the causal mask is as wide as the context's tokens
        facts.setdefault("return_scale", 1000.0)  # what kzl's experiment.py uses in every gym environment
        renamed = {re.sub(r"^transformer\.", "encoder.", key): tensor for key, tensor in tensors.items()}
        if "encoder.wpe.weight" not in renamed:
            renamed["encoder.wpe.weight"] = torch.zeros(1, d_model, dtype=tensors["embed_return.weight"].dtype)
        config["n_positions"] = len(renamed["encoder.wpe.weight"])
        return HFDecisionTransformer().build(renamed, config, None, **facts)

    def _config(self, tensors: dict[str, Tensor], given: dict[str, Any]) -> dict[str, Any]:
        def shape(key: str) -> torch.Size:
            if key not in tensors or tensors[key].ndim != 2:
                raise DtLensError(f"The checkpoint has no matrix {key!r}, which a kzl decision transformer has.")
            return tensors[key].shape

        layers = {int(m[1]) for key in tensors if (m := re.match(r"transformer\.h\.(\d+)\.", key))}
        act_fn = given.get("act_fn", "relu")  # kzl's default; the file cannot tell
        if act_fn not in NAMES:
            raise DtLensError(f"act_fn is {act_fn!r}; it must be one of {', '.join(NAMES)}.")
        rows = shape("embed_timestep.weight")[0]
        if given.get("max_ep_len", rows) != rows:
            raise DtLensError(
                f"max_ep_len={given['max_ep_len']} does not fit the checkpoint, whose timestep table has {rows} rows."
            )
        d_model, state_dim = shape("embed_state.weight")
        return {
            "hidden_size": d_model,
            "state_dim": state_dim,
            "act_dim": shape("embed_action.weight")[1],
            "max_ep_len": rows,
            "n_layer": max(layers) + 1,
            "n_head": given["n_heads"],
            "n_inner": shape("transformer.h.0.mlp.c_fc.weight")[1],
            "activation_function": NAMES[act_fn],
            "action_tanh": given.get("action_tanh", True),
        }


def _read_live(model: Any) -> dict[str, Any]:
    """What a live kzl model knows that its state dict does not."""
    inner = getattr(getattr(model, "transformer", None), "config", None)
    found: dict[str, Any] = {}
    if inner is not None:
        found["n_heads"] = inner.n_head
        found["act_fn"] = {hf: ours for ours, hf in NAMES.items()}.get(
            inner.activation_function, inner.activation_function
        )
    if isinstance(getattr(model, "predict_action", None), nn.Sequential):
        found["action_tanh"] = any(isinstance(part, nn.Tanh) for part in model.predict_action)
    if isinstance(getattr(model, "max_length", None), int):
        found["context"] = model.max_length
    return found
