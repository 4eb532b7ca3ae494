"""OLMo 2 (2024) as Hugging Face's ``Olmo2ForCausalLM``.

Attention and MLP read the stream itself, and what they give passes an RMSNorm before it joins the stream. Queries, and
keys, pass one RMSNorm of all heads together. The rest is Llama's.
"""

from __future__ import annotations

from dataclasses import replace

from dt_lens.language_model.adapter import LanguageModelAdapter
from dt_lens.language_model.config import LanguageModelConfig, Values
from dt_lens.language_model.layout import At
from dt_lens_adapters.llama import LLAMA
from dt_lens_adapters.llama import read as read_llama

__all__ = ["FAMILY", "Olmo2"]


def read(values: Values) -> LanguageModelConfig:
    """As Llama's, with one option for the biases of attention; the MLP has none."""
    whole = Values(values.given, {**values.defaults, "mlp_bias": False})
    return read_llama(whole).replace(family="olmo2", mlp_bias=False, pre_norm=False, post_norm=True, qk_norm="all")


FAMILY = replace(
    LLAMA,
    name="olmo2",
    model_types=("olmo2",),
    architectures=("Olmo2ForCausalLM",),
    block={
        **{name: rule for name, rule in LLAMA.block.items() if name not in ("ln1.w", "ln2.w")},
        "attn.q_norm.w": At("self_attn.q_norm.weight", "(head e) -> head e", when="normed_qk"),
        "attn.k_norm.w": At("self_attn.k_norm.weight", "(kv e) -> kv e", when="normed_qk"),
        "ln1_post.w": At("post_attention_layernorm.weight", "d -> d", when="post_norm"),
        "ln2_post.w": At("post_feedforward_layernorm.weight", "d -> d", when="post_norm"),
    },
    modules=replace(
        LLAMA.modules,
        ln1=None,
        ln2=None,
        ln1_post="post_attention_layernorm",
        ln2_post="post_feedforward_layernorm",
        qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
        qk_normed="n t (h e)",
    ),
    defaults={
        **{name: value for name, value in LLAMA.defaults.items() if name != "mlp_bias"},
        "vocab_size": 50304,
        "rms_norm_eps": 1e-5,
    },
    read=read,
)


class Olmo2(LanguageModelAdapter):
    """The adapter for OLMo 2."""

    name = "olmo2"
    family = FAMILY
