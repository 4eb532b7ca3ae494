"""Bloom (BigScience, 2022) as Hugging Face's ``BloomForCausalLM``.

Every matrix is an ``nn.Linear``, which stores (out, in); one holds query, key and value of each head side by side, head
after head. There is no table of positions: a head's scores rise with the position of the key (ALiBi). The token
embeddings pass a LayerNorm before the first block.
"""

from __future__ import annotations

from dt_lens.language_model.adapter import LanguageModelAdapter
from dt_lens.language_model.config import LanguageModelConfig, Values
from dt_lens.language_model.family import Family, Modules
from dt_lens.language_model.layout import At, Interleaved

__all__ = ["FAMILY", "Bloom"]

SPLIT = "it multiplies each weight in slices, which shows no whole activation"


def read(values: Values) -> LanguageModelConfig:
    """The configuration; the MLP is four times the width, and ``seq_length`` is what the model was trained on.

    Raises:
        DtLensError: for LayerNorms whose output is the stream, or weights that are multiplied in slices.
    """
    d, layers = values.size("n_embed", "hidden_size"), values.layers("n_layer", "num_hidden_layers")
    d_head = values.share(d, "n_head", "num_attention_heads")
    name = "apply_residual_connection_post_layernorm"
    values.only(name, False, "what a block adds to is the LayerNorm's output, not the stream")
    if values.size("pretraining_tp") > 1:
        values.only("slow_but_exact", False, SPLIT)
    return LanguageModelConfig(
        family="bloom",
        n_layers=layers,
        n_heads=d // d_head,
        n_kv_heads=d // d_head,
        d_model=d,
        d_head=d_head,
        d_mlp=4 * d,
        n_ctx=values.size("seq_length"),
        d_vocab=values.size("vocab_size"),
        act_fn="gelu_new",
        attn_scale=(d_head**-0.5,) * layers,
        eps=values.get("layer_norm_epsilon"),
        position="alibi",
        embed_ln=True,
        tied=values.flag("tie_word_embeddings"),
    )


def _fused(index: int) -> dict[str, At]:
    letter, part = "QKV"[index], Interleaved(index, 3)
    return {
        f"attn.W_{letter}": At("self_attention.query_key_value.weight", "(head part e) d -> part head d e", part),
        f"attn.b_{letter}": At("self_attention.query_key_value.bias", "(head part e) -> part head e", part),
    }


FAMILY = Family(
    name="bloom",
    model_types=("bloom",),
    architectures=("BloomForCausalLM",),
    whole={
        "embed.W_E": At("transformer.word_embeddings.weight", "vocab d -> vocab d"),
        "embed_ln.w": At("transformer.word_embeddings_layernorm.weight", "d -> d"),
        "embed_ln.b": At("transformer.word_embeddings_layernorm.bias", "d -> d"),
        "ln_final.w": At("transformer.ln_f.weight", "d -> d"),
        "ln_final.b": At("transformer.ln_f.bias", "d -> d"),
        "unembed.W_U": At("lm_head.weight", "vocab d -> d vocab"),
    },
    block_key="transformer.h.{l}.",
    block={
        "ln1.w": At("input_layernorm.weight", "d -> d"),
        "ln1.b": At("input_layernorm.bias", "d -> d"),
        **_fused(0),
        **_fused(1),
        **_fused(2),
        "attn.W_O": At("self_attention.dense.weight", "d (head e) -> head e d"),
        "attn.b_O": At("self_attention.dense.bias", "d -> d"),
        "ln2.w": At("post_attention_layernorm.weight", "d -> d"),
        "ln2.b": At("post_attention_layernorm.bias", "d -> d"),
        "mlp.W_in": At("mlp.dense_h_to_4h.weight", "mlp d -> d mlp"),
        "mlp.b_in": At("mlp.dense_h_to_4h.bias", "mlp -> mlp"),
        "mlp.W_out": At("mlp.dense_4h_to_h.weight", "d mlp -> mlp d"),
        "mlp.b_out": At("mlp.dense_4h_to_h.bias", "d -> d"),
    },
    # Attention and MLP add to the stream themselves, so what they add is the output of their last matrix.
    modules=Modules(
        embed="transformer.word_embeddings",
        embed_ln="transformer.word_embeddings_layernorm",
        block="transformer.h.{l}",
        ln1="input_layernorm",
        attn="self_attention.dense",
        qkv=("self_attention.query_key_value",),
        by_head=True,
        out="self_attention.dense",
        ln2="post_attention_layernorm",
        mlp="mlp.dense_4h_to_h",
        mlp_in="mlp.dense_h_to_4h",
        mlp_out="mlp.dense_4h_to_h",
        ln_final="transformer.ln_f",
        core="self_attention.attention_dropout",
        core_kind="dropout",
    ),
    defaults={
        "vocab_size": 250880,
        "n_embed": 64,
        "n_layer": 2,
        "n_head": 8,
        "seq_length": 2048,
        "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False,
        "pretraining_tp": 1,
        "slow_but_exact": False,
        "tie_word_embeddings": True,
    },
    read=read,
    prefix="transformer.",
    single_inside=True,
)


class Bloom(LanguageModelAdapter):
    """The adapter for Bloom."""

    name = "bloom"
    family = FAMILY
