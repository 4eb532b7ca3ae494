"""Qwen 3 (2025) as Hugging Face's ``Qwen3ForCausalLM``: Qwen2's form, with an RMSNorm of each head's query and key."""

from __future__ import annotations

from dataclasses import replace

from dt_lens.language_model.adapter import LanguageModelAdapter
from dt_lens.language_model.config import LanguageModelConfig, Values
from dt_lens.language_model.layout import At
from dt_lens_adapters.llama import QWEN2
from dt_lens_adapters.llama import read as read_llama

__all__ = ["FAMILY", "Qwen3"]


def read(values: Values) -> LanguageModelConfig:
    """As Llama's, with one option for the biases of attention; the MLP has none."""
    whole = Values(values.given, {**values.defaults, "mlp_bias": False})
    return read_llama(whole).replace(family="qwen3", mlp_bias=False, qk_norm="head")


FAMILY = replace(
    QWEN2,
    name="qwen3",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    block={
        **QWEN2.block,
        "attn.q_norm.w": At("self_attn.q_norm.weight", "e -> e", when="normed_qk"),
        "attn.k_norm.w": At("self_attn.k_norm.weight", "e -> e", when="normed_qk"),
    },
    modules=replace(QWEN2.modules, qk_norm=("self_attn.q_norm", "self_attn.k_norm")),
    defaults={**QWEN2.defaults, "head_dim": 128},
    read=read,
)


class Qwen3(LanguageModelAdapter):
    """The adapter for Qwen 3."""

    name = "qwen3"
    family = FAMILY
