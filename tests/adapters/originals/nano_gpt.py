"""A small GPT's tensors as nanoGPT and its relatives save them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def as_nano(model: Any, spelling: str) -> dict[str, Tensor]:
    """A GPT-2's tensors as nanoGPT writes them."""
    kept = {}
    for key, tensor in model.state_dict().items():
        linear = ".c_" in key and key.endswith("weight")
        name = key
        if spelling == "blocks":
            name = key.removeprefix("transformer.").replace("h.", "blocks.", 1).replace("lm_head", "head")
            name = name.replace("wte", "tok_emb").replace("wpe", "pos_emb")
            name = key.removeprefix("transformer.") if key.startswith("transformer.ln_f") else name
        kept[name] = tensor.T.contiguous() if linear else tensor.clone()
    return kept
