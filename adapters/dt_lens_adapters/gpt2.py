"""GPT-2 (Radford et al., 2019) as Hugging Face's ``GPT2LMHeadModel``.

Its ``Conv1D`` stores (in, out); ``c_attn`` holds query, key and value side by side, each with its heads in order.
"""

from __future__ import annotations

from dt_lens.language_model.adapter import LanguageModelAdapter
from dt_lens.language_model.config import LanguageModelConfig, Values
from dt_lens.language_model.family import Family, Modules
from dt_lens.language_model.layout import At, Part

__all__ = ["FAMILY", "GPT2"]


def read(values: Values) -> LanguageModelConfig:
    """The configuration; ``n_inner`` is four times the width by default."""
    d, layers = values.size("n_embd", "hidden_size"), values.layers("n_layer", "num_hidden_layers")
    d_head = values.share(d, "n_head", "num_attention_heads")
    scale = d_head**-0.5 if values.flag("scale_attn_weights") else 1.0
    by_layer = values.flag("scale_attn_by_inverse_layer_idx")
    heads = d // d_head
    return LanguageModelConfig(
        family="gpt2",
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        d_model=d,
        d_head=d_head,
        d_mlp=values.size("n_inner") if values.get("n_inner") is not None else 4 * d,
        n_ctx=values.size("n_positions", "max_position_embeddings"),
        d_vocab=values.size("vocab_size"),
        act_fn=values.get("activation_function"),
        attn_scale=tuple(scale / (layer + 1) if by_layer else scale for layer in range(layers)),
        eps=values.get("layer_norm_epsilon"),
        tied=values.flag("tie_word_embeddings"),
    )


def _fused(index: int) -> dict[str, At]:
    letter = "QKV"[index]
    return {
        f"attn.W_{letter}": At("attn.c_attn.weight", "d (head e) -> head d e", Part(1, index, 3)),
        f"attn.b_{letter}": At("attn.c_attn.bias", "(head e) -> head e", Part(0, index, 3)),
    }


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    architectures=("GPT2LMHeadModel",),
    whole={
        "embed.W_E": At("transformer.wte.weight", "vocab d -> vocab d"),
        "pos_embed.W_pos": At("transformer.wpe.weight", "ctx d -> ctx d"),
        "ln_final.w": At("transformer.ln_f.weight", "d -> d"),
        "ln_final.b": At("transformer.ln_f.bias", "d -> d"),
        "unembed.W_U": At("lm_head.weight", "vocab d -> d vocab"),
    },
    block_key="transformer.h.{l}.",
    block={
        "ln1.w": At("ln_1.weight", "d -> d"),
        "ln1.b": At("ln_1.bias", "d -> d"),
        **_fused(0),
        **_fused(1),
        **_fused(2),
        "attn.W_O": At("attn.c_proj.weight", "(head e) d -> head e d"),
        "attn.b_O": At("attn.c_proj.bias", "d -> d"),
        "ln2.w": At("ln_2.weight", "d -> d"),
        "ln2.b": At("ln_2.bias", "d -> d"),
        "mlp.W_in": At("mlp.c_fc.weight", "d mlp -> d mlp"),
        "mlp.b_in": At("mlp.c_fc.bias", "mlp -> mlp"),
        "mlp.W_out": At("mlp.c_proj.weight", "mlp d -> mlp d"),
        "mlp.b_out": At("mlp.c_proj.bias", "d -> d"),
    },
    modules=Modules(
        embed="transformer.wte",
        pos_embed="transformer.wpe",
        block="transformer.h.{l}",
        ln1="ln_1",
        attn="attn",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        ln2="ln_2",
        mlp="mlp",
        mlp_in="mlp.c_fc",
        mlp_out="mlp.c_proj",
        ln_final="transformer.ln_f",
    ),
    defaults={
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    },
    read=read,
    # The causal masks of older releases. Whole keys: a suffix match on "attn.bias" would match "c_attn.bias" too.
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
    prefix="transformer.",
)


class GPT2(LanguageModelAdapter):
    """The adapter for GPT-2."""

    name = "gpt2"
    family = FAMILY
