"""GPT-Neo (Black et al., 2021) as Hugging Face's ``GPTNeoForCausalLM``.

The keys are GPT-2's in part, but every matrix is an ``nn.Linear``, which stores (out, in). Scores are not scaled.
"""

from __future__ import annotations

from typing import Any

from dt_lens.errors import DtLensError
from dt_lens.language_model.adapter import LanguageModelAdapter
from dt_lens.language_model.config import LanguageModelConfig, Values
from dt_lens.language_model.family import Family, Modules
from dt_lens.language_model.layout import At

__all__ = ["FAMILY", "GPTNeo"]


def read(values: Values) -> LanguageModelConfig:
    """The configuration; the MLP is four times the width by default."""
    d, layers = values.size("hidden_size"), values.layers("num_layers", "num_hidden_layers")
    d_head = values.share(d, "num_heads", "num_attention_heads")
    _require_kinds(values.given.get("attention_types"), layers)
    return LanguageModelConfig(
        family="gpt_neo",
        n_layers=layers,
        n_heads=d // d_head,
        n_kv_heads=d // d_head,
        d_model=d,
        d_head=d_head,
        d_mlp=values.size("intermediate_size") if values.get("intermediate_size") is not None else 4 * d,
        n_ctx=values.size("max_position_embeddings"),
        d_vocab=values.size("vocab_size"),
        act_fn=values.get("activation_function"),
        attn_scale=(1.0,) * layers,
        eps=values.get("layer_norm_epsilon"),
        tied=values.flag("tie_word_embeddings"),
        qkv_bias=False,
    )


def _require_kinds(kinds: Any, layers: int) -> None:
    """Raise unless there is one kind for each layer: Hugging Face's class expands any counts before it checks them."""
    plain = isinstance(kinds, (list, tuple)) and all(
        isinstance(kind, (list, tuple)) and len(kind) == 2 and isinstance(kind[0], list) and type(kind[1]) is int
        for kind in kinds
    )
    if kinds is not None and (not plain or sum(len(kind[0]) * max(0, kind[1]) for kind in kinds) != layers):
        raise DtLensError(
            f"config.json says attention_types is {str(kinds)[:80]}; it must name a kind for each of {layers} layers."
        )


FAMILY = Family(
    name="gpt_neo",
    model_types=("gpt_neo",),
    architectures=("GPTNeoForCausalLM",),
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
        "attn.W_Q": At("attn.attention.q_proj.weight", "(head e) d -> head d e"),
        "attn.W_K": At("attn.attention.k_proj.weight", "(head e) d -> head d e"),
        "attn.W_V": At("attn.attention.v_proj.weight", "(head e) d -> head d e"),
        "attn.W_O": At("attn.attention.out_proj.weight", "d (head e) -> head e d"),
        "attn.b_O": At("attn.attention.out_proj.bias", "d -> d"),
        "ln2.w": At("ln_2.weight", "d -> d"),
        "ln2.b": At("ln_2.bias", "d -> d"),
        "mlp.W_in": At("mlp.c_fc.weight", "mlp d -> d mlp"),
        "mlp.b_in": At("mlp.c_fc.bias", "mlp -> mlp"),
        "mlp.W_out": At("mlp.c_proj.weight", "d mlp -> mlp d"),
        "mlp.b_out": At("mlp.c_proj.bias", "d -> d"),
    },
    modules=Modules(
        embed="transformer.wte",
        pos_embed="transformer.wpe",
        block="transformer.h.{l}",
        ln1="ln_1",
        attn="attn",
        qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        out="attn.attention.out_proj",
        ln2="ln_2",
        mlp="mlp",
        mlp_in="mlp.c_fc",
        mlp_out="mlp.c_proj",
        ln_final="transformer.ln_f",
        core="attn.attention",
        core_kind="method",
    ),
    defaults={
        "hidden_size": 2048,
        "num_layers": 24,
        "num_heads": 16,
        "max_position_embeddings": 2048,
        "vocab_size": 50257,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    read=read,
    ignored=(r"transformer\.h\.\d+\.attn\.attention\.(masked_)?bias",),
    prefix="transformer.",
    single_inside=True,
)


class GPTNeo(LanguageModelAdapter):
    """The adapter for GPT-Neo."""

    name = "gpt_neo"
    family = FAMILY
