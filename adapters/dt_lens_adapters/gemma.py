"""Gemma 2 (2024) and the text models of Gemma 3 (2025) as Hugging Face's classes.

Attention and MLP read the stream through an RMSNorm, and what they give passes another one before it joins the stream;
every norm multiplies by 1 + its weight. Token embeddings enter the stream times ``sqrt(d_model)``. Gemma 2 caps scores
and logits softly; Gemma 3 has norms of each head's query and key instead. Every matrix is an ``nn.Linear``, which
stores (out, in). Which layers see a window only, and how positions rotate, is computed by Hugging Face's class.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dt_lens.errors import DtLensError
from dt_lens.language_model.adapter import LanguageModelAdapter
from dt_lens.language_model.config import LanguageModelConfig, Values
from dt_lens.language_model.family import Family
from dt_lens.language_model.layout import At
from dt_lens_adapters.llama import LLAMA
from dt_lens_adapters.llama import read as read_llama

__all__ = ["GEMMA2", "GEMMA3", "Gemma2", "Gemma3"]


def optional(values: Values, name: str) -> Any:
    """A value that ``null`` switches off, whatever the default is."""
    return values.given.get(name, values.defaults.get(name))


def read(values: Values) -> LanguageModelConfig:
    """What both have in common.

    Raises:
        DtLensError: for attention in both directions, which predicts no next token.
    """
    if values.get("use_bidirectional_attention"):
        raise DtLensError(
            "config.json says use_bidirectional_attention is true, so that each token sees those after it; only models "
            "that predict the next token can be read."
        )
    cfg = read_llama(Values(values.given, {**values.defaults, "mlp_bias": False}))
    return cfg.replace(
        act_fn=values.get("hidden_activation"),
        attn_scale=(values.size("query_pre_attn_scalar") ** -0.5,) * cfg.n_layers,
        mlp_bias=False,
        post_norm=True,
        unit_offset=True,
        embed_scale=cfg.d_model**0.5,
        logit_softcap=optional(values, "final_logit_softcapping"),
    )


def read_gemma2(values: Values) -> LanguageModelConfig:
    """With soft-capping of the scores."""
    return read(values).replace(family="gemma2", attn_softcap=optional(values, "attn_logit_softcapping"))


def read_gemma3(values: Values) -> LanguageModelConfig:
    """With norms of queries and keys.

    Raises:
        DtLensError: for an option that Hugging Face's class accepts and does not compute.
    """
    cap = optional(values, "attn_logit_softcapping")
    if cap is not None:
        raise DtLensError(
            f"config.json says attn_logit_softcapping is {cap!r}, which Hugging Face's Gemma 3 does not compute; "
            "say null if the model was trained without it."
        )
    return read(values).replace(family="gemma3", qk_norm="head")


GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    architectures=("Gemma2ForCausalLM",),
    whole=LLAMA.whole,
    block_key=LLAMA.block_key,
    block={
        **LLAMA.block,
        "ln1_post.w": At("post_attention_layernorm.weight", "d -> d", when="post_norm"),
        "ln2.w": At("pre_feedforward_layernorm.weight", "d -> d"),
        "ln2_post.w": At("post_feedforward_layernorm.weight", "d -> d", when="post_norm"),
    },
    modules=replace(
        LLAMA.modules,
        ln1_post="post_attention_layernorm",
        ln2="pre_feedforward_layernorm",
        ln2_post="post_feedforward_layernorm",
        embed_scale="embed_scale",
    ),
    defaults={
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    read=read_gemma2,
    ignored=LLAMA.ignored,
    prefix="model.",
    single_inside=True,
)
GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    model_types=("gemma3_text",),
    architectures=("Gemma3ForCausalLM",),
    block={
        **GEMMA2.block,
        "attn.q_norm.w": At("self_attn.q_norm.weight", "e -> e", when="normed_qk"),
        "attn.k_norm.w": At("self_attn.k_norm.weight", "e -> e", when="normed_qk"),
    },
    modules=replace(GEMMA2.modules, qk_norm=("self_attn.q_norm", "self_attn.k_norm"), qk_normed="n h t e"),
    defaults={
        **GEMMA2.defaults,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    read=read_gemma3,
)


class Gemma2(LanguageModelAdapter):
    """The adapter for Gemma 2."""

    name = "gemma2"
    family = GEMMA2


class Gemma3(LanguageModelAdapter):
    """The adapter for the text models of Gemma 3."""

    name = "gemma3"
    family = GEMMA3
