"""Llama (Touvron et al., 2023) and the models of its form, Mistral and Qwen2, as Hugging Face's classes.

Gated MLPs, RMSNorm, rotary positions, and query heads that share keys and values. Every matrix is an ``nn.Linear``,
which stores (out, in).
"""

from __future__ import annotations

from dataclasses import replace

from dt_lens.language_model.adapter import LanguageModelAdapter
from dt_lens.language_model.config import LanguageModelConfig, Values
from dt_lens.language_model.family import Family, Modules
from dt_lens.language_model.layout import At

__all__ = ["LLAMA", "MISTRAL", "QWEN2", "Llama", "Mistral", "Qwen2"]


def read(values: Values) -> LanguageModelConfig:
    """The configuration; by default as many heads of keys as of queries, which share d_model."""
    d, layers = values.size("hidden_size"), values.layers("num_hidden_layers")
    heads = values.size("num_attention_heads")
    shared = values.get("num_key_value_heads") is not None
    d_head = values.size("head_dim") if values.get("head_dim") is not None else values.share(d, "num_attention_heads")
    return LanguageModelConfig(
        family="llama",
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=values.size("num_key_value_heads") if shared else heads,
        d_model=d,
        d_head=d_head,
        d_mlp=values.size("intermediate_size"),
        n_ctx=values.size("max_position_embeddings"),
        d_vocab=values.size("vocab_size"),
        act_fn=values.get("hidden_act"),
        attn_scale=(d_head**-0.5,) * layers,
        norm="rmsnorm",
        eps=values.get("rms_norm_eps"),
        position="rotary",
        gated=True,
        tied=values.flag("tie_word_embeddings"),
        qkv_bias=values.flag("attention_bias"),
        out_bias=values.flag("attention_bias"),
        mlp_bias=values.flag("mlp_bias"),
    )


def read_mistral(values: Values) -> LanguageModelConfig:
    """As Llama's, without biases."""
    return read(Values(values.given, {**values.defaults, "attention_bias": False, "mlp_bias": False})).replace(
        family="mistral", qkv_bias=False, out_bias=False, mlp_bias=False
    )


def read_qwen2(values: Values) -> LanguageModelConfig:
    """As Llama's, with biases of queries, keys and values only."""
    return read_mistral(values).replace(family="qwen2", qkv_bias=True)


LLAMA = Family(
    name="llama",
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    whole={
        "embed.W_E": At("model.embed_tokens.weight", "vocab d -> vocab d"),
        "ln_final.w": At("model.norm.weight", "d -> d"),
        "unembed.W_U": At("lm_head.weight", "vocab d -> d vocab"),
    },
    block_key="model.layers.{l}.",
    block={
        "ln1.w": At("input_layernorm.weight", "d -> d"),
        "attn.W_Q": At("self_attn.q_proj.weight", "(head e) d -> head d e"),
        "attn.b_Q": At("self_attn.q_proj.bias", "(head e) -> head e", when="qkv_bias"),
        "attn.W_K": At("self_attn.k_proj.weight", "(kv e) d -> kv d e"),
        "attn.b_K": At("self_attn.k_proj.bias", "(kv e) -> kv e", when="qkv_bias"),
        "attn.W_V": At("self_attn.v_proj.weight", "(kv e) d -> kv d e"),
        "attn.b_V": At("self_attn.v_proj.bias", "(kv e) -> kv e", when="qkv_bias"),
        "attn.W_O": At("self_attn.o_proj.weight", "d (head e) -> head e d"),
        "attn.b_O": At("self_attn.o_proj.bias", "d -> d", when="out_bias"),
        "ln2.w": At("post_attention_layernorm.weight", "d -> d"),
        "mlp.W_gate": At("mlp.gate_proj.weight", "mlp d -> d mlp"),
        "mlp.b_gate": At("mlp.gate_proj.bias", "mlp -> mlp", when="mlp_bias"),
        "mlp.W_in": At("mlp.up_proj.weight", "mlp d -> d mlp"),
        "mlp.b_in": At("mlp.up_proj.bias", "mlp -> mlp", when="mlp_bias"),
        "mlp.W_out": At("mlp.down_proj.weight", "d mlp -> mlp d"),
        "mlp.b_out": At("mlp.down_proj.bias", "d -> d", when="mlp_bias"),
    },
    modules=Modules(
        embed="model.embed_tokens",
        block="model.layers.{l}",
        ln1="input_layernorm",
        attn="self_attn",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out="self_attn.o_proj",
        ln2="post_attention_layernorm",
        mlp="mlp",
        mlp_gate="mlp.gate_proj",
        mlp_in="mlp.up_proj",
        mlp_out="mlp.down_proj",
        ln_final="model.norm",
        core="self_attn",
    ),
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    read=read,
    # The frequencies of the rotation, which older releases saved.
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    prefix="model.",
    single_inside=True,
)
MISTRAL = replace(
    LLAMA,
    name="mistral",
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    defaults={
        **LLAMA.defaults,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
    },
    read=read_mistral,
)
QWEN2 = replace(
    LLAMA,
    name="qwen2",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    defaults={
        **LLAMA.defaults,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    read=read_qwen2,
)


class Llama(LanguageModelAdapter):
    """The adapter for Llama."""

    name = "llama"
    family = LLAMA


class Mistral(LanguageModelAdapter):
    """The adapter for Mistral."""

    name = "mistral"
    family = MISTRAL


class Qwen2(LanguageModelAdapter):
    """The adapter for Qwen2."""

    name = "qwen2"
    family = QWEN2
