"""GPT-NeoX (Black et al., 2022), of which Pythia (Biderman et al., 2023) is made, as ``GPTNeoXForCausalLM``.

Every matrix is an ``nn.Linear``, which stores (out, in). One of them holds query, key and value of each head side by
side, head after head. Attention and MLP read the stream each through a LayerNorm of its own, by default side by side;
a part of each head's features is rotated.
"""

from __future__ import annotations

from dt_lens.language_model.adapter import LanguageModelAdapter
from dt_lens.language_model.config import LanguageModelConfig, Values
from dt_lens.language_model.family import Family, Modules
from dt_lens.language_model.layout import At, Interleaved

__all__ = ["FAMILY", "GPTNeoX"]


def read(values: Values) -> LanguageModelConfig:
    """The configuration; what part of a head is rotated is the class's own affair."""
    d, layers = values.size("hidden_size"), values.layers("num_hidden_layers")
    d_head = values.share(d, "num_attention_heads")
    bias = values.flag("attention_bias")
    parallel = values.flag("use_parallel_residual")
    return LanguageModelConfig(
        family="gpt_neox",
        n_layers=layers,
        n_heads=d // d_head,
        n_kv_heads=d // d_head,
        d_model=d,
        d_head=d_head,
        d_mlp=values.size("intermediate_size"),
        n_ctx=values.size("max_position_embeddings"),
        d_vocab=values.size("vocab_size"),
        act_fn=values.get("hidden_act"),
        attn_scale=(d_head**-0.5,) * layers,
        eps=values.get("layer_norm_eps"),
        position="rotary",
        parallel=parallel,
        own_mlp_norm=parallel,
        tied=values.flag("tie_word_embeddings"),
        qkv_bias=bias,
        out_bias=bias,
    )


def _fused(index: int) -> dict[str, At]:
    letter, part = "QKV"[index], Interleaved(index, 3)
    return {
        f"attn.W_{letter}": At("attention.query_key_value.weight", "(head part e) d -> part head d e", part),
        f"attn.b_{letter}": At("attention.query_key_value.bias", "(head part e) -> part head e", part, "qkv_bias"),
    }


FAMILY = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    architectures=("GPTNeoXForCausalLM",),
    whole={
        "embed.W_E": At("gpt_neox.embed_in.weight", "vocab d -> vocab d"),
        "ln_final.w": At("gpt_neox.final_layer_norm.weight", "d -> d"),
        "ln_final.b": At("gpt_neox.final_layer_norm.bias", "d -> d"),
        "unembed.W_U": At("lm_head.weight", "vocab d -> d vocab"),
    },
    block_key="gpt_neox.layers.{l}.",
    block={
        "ln1.w": At("input_layernorm.weight", "d -> d"),
        "ln1.b": At("input_layernorm.bias", "d -> d"),
        **_fused(0),
        **_fused(1),
        **_fused(2),
        "attn.W_O": At("attention.dense.weight", "d (head e) -> head e d"),
        "attn.b_O": At("attention.dense.bias", "d -> d", when="out_bias"),
        "ln2.w": At("post_attention_layernorm.weight", "d -> d"),
        "ln2.b": At("post_attention_layernorm.bias", "d -> d"),
        "mlp.W_in": At("mlp.dense_h_to_4h.weight", "mlp d -> d mlp"),
        "mlp.b_in": At("mlp.dense_h_to_4h.bias", "mlp -> mlp"),
        "mlp.W_out": At("mlp.dense_4h_to_h.weight", "d mlp -> mlp d"),
        "mlp.b_out": At("mlp.dense_4h_to_h.bias", "d -> d"),
    },
    modules=Modules(
        embed="gpt_neox.embed_in",
        block="gpt_neox.layers.{l}",
        ln1="input_layernorm",
        attn="attention",
        qkv=("attention.query_key_value",),
        by_head=True,
        out="attention.dense",
        ln2="post_attention_layernorm",
        mlp="mlp",
        mlp_in="mlp.dense_h_to_4h",
        mlp_out="mlp.dense_4h_to_h",
        ln_final="gpt_neox.final_layer_norm",
        core="attention",
    ),
    defaults={
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
    },
    read=read,
    # Causal masks and frequencies of the rotation, which older releases saved, as in Pythia's files.
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
    prefix="gpt_neox.",
    single_inside=True,
    renamed={"embed_out.weight": "lm_head.weight"},
)


class GPTNeoX(LanguageModelAdapter):
    """The adapter for GPT-NeoX and Pythia."""

    name = "gpt_neox"
    family = FAMILY
