"""Phi-3 (Abdin et al., 2024), of whose class Phi-3.5-mini and Phi-4 are too, as Hugging Face's ``Phi3ForCausalLM``.

Llama's form with two fused matrices: one holds all queries, then all keys, then all values; another the gate, then the
input of the MLP. Every matrix is an ``nn.Linear``, which stores (out, in).
"""

from __future__ import annotations

from dataclasses import replace

from dt_lens.language_model.adapter import LanguageModelAdapter
from dt_lens.language_model.config import LanguageModelConfig, Values
from dt_lens.language_model.layout import At, Part
from dt_lens_adapters.llama import LLAMA, read_mistral

__all__ = ["FAMILY", "Phi3"]


def read(values: Values) -> LanguageModelConfig:
    """As Llama's, without biases; rotations, short or long, and windows are the class's own affair."""
    return read_mistral(values).replace(family="phi3")


def _fused(index: int) -> dict[str, At]:
    heads = "kv" if index else "head"
    part = Part(0, index, ("head e", "kv e", "kv e"))
    return {f"attn.W_{'QKV'[index]}": At("self_attn.qkv_proj.weight", f"({heads} e) d -> {heads} d e", part)}


FAMILY = replace(
    LLAMA,
    name="phi3",
    model_types=("phi3",),
    architectures=("Phi3ForCausalLM",),
    block={
        "ln1.w": At("input_layernorm.weight", "d -> d"),
        **_fused(0),
        **_fused(1),
        **_fused(2),
        "attn.W_O": At("self_attn.o_proj.weight", "d (head e) -> head e d"),
        "ln2.w": At("post_attention_layernorm.weight", "d -> d"),
        "mlp.W_gate": At("mlp.gate_up_proj.weight", "mlp d -> d mlp", Part(0, 0, 2)),
        "mlp.W_in": At("mlp.gate_up_proj.weight", "mlp d -> d mlp", Part(0, 1, 2)),
        "mlp.W_out": At("mlp.down_proj.weight", "d mlp -> mlp d"),
    },
    modules=replace(
        LLAMA.modules,
        qkv=("self_attn.qkv_proj",),
        mlp_gate="mlp.gate_up_proj",
        mlp_in="mlp.gate_up_proj",
    ),
    defaults={
        **LLAMA.defaults,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    read=read,
)


class Phi3(LanguageModelAdapter):
    """The adapter for Phi-3."""

    name = "phi3"
    family = FAMILY
