"""OPT (Zhang et al., 2022) as Hugging Face's ``OPTForCausalLM``.

Every matrix is an ``nn.Linear``, which stores (out, in). The table of positions begins with two rows that only padding
reads. A block's second LayerNorm and its MLP see all texts of a batch as one.
"""

from __future__ import annotations

from dt_lens.language_model.adapter import LanguageModelAdapter
from dt_lens.language_model.config import LanguageModelConfig, Values
from dt_lens.language_model.family import Family, Modules
from dt_lens.language_model.layout import At, Part

__all__ = ["FAMILY", "OPT"]

NARROW = "its token table is narrower than the residual stream (as in opt-350m), and directions of tokens lie elsewhere"


def read(values: Values) -> LanguageModelConfig:
    """The configuration.

    Raises:
        DtLensError: for LayerNorms behind the sums, none at the end, ones without weights, or tokens of another width.
    """
    d, layers = values.size("hidden_size"), values.layers("num_hidden_layers")
    values.only("do_layer_norm_before", True, "its LayerNorms stand behind the sums (as in opt-350m)")
    values.only("_remove_final_layer_norm", False, "it has no LayerNorm before the unembedding")
    values.only("layer_norm_elementwise_affine", True, "its LayerNorms have no weights")
    if values.get("word_embed_proj_dim") is not None:
        values.only("word_embed_proj_dim", d, NARROW)
    d_head = values.share(d, "num_attention_heads")
    bias = values.flag("enable_bias")
    return LanguageModelConfig(
        family="opt",
        n_layers=layers,
        n_heads=d // d_head,
        n_kv_heads=d // d_head,
        d_model=d,
        d_head=d_head,
        d_mlp=values.size("ffn_dim"),
        n_ctx=values.size("max_position_embeddings"),
        d_vocab=values.size("vocab_size"),
        act_fn=values.get("activation_function"),
        attn_scale=(d_head**-0.5,) * layers,
        tied=values.flag("tie_word_embeddings"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
    )


def _attention(letter: str) -> dict[str, At]:
    key = f"self_attn.{letter.lower()}_proj"
    return {
        f"attn.W_{letter}": At(f"{key}.weight", "(head e) d -> head d e"),
        f"attn.b_{letter}": At(f"{key}.bias", "(head e) -> head e", when="qkv_bias"),
    }


FAMILY = Family(
    name="opt",
    model_types=("opt",),
    architectures=("OPTForCausalLM",),
    whole={
        "embed.W_E": At("model.decoder.embed_tokens.weight", "vocab d -> vocab d"),
        "pos_embed.W_pos": At("model.decoder.embed_positions.weight", "ctx d -> ctx d", Part(0, 1, ("2", "ctx"))),
        "ln_final.w": At("model.decoder.final_layer_norm.weight", "d -> d"),
        "ln_final.b": At("model.decoder.final_layer_norm.bias", "d -> d"),
        "unembed.W_U": At("lm_head.weight", "vocab d -> d vocab"),
    },
    block_key="model.decoder.layers.{l}.",
    block={
        "ln1.w": At("self_attn_layer_norm.weight", "d -> d"),
        "ln1.b": At("self_attn_layer_norm.bias", "d -> d"),
        **_attention("Q"),
        **_attention("K"),
        **_attention("V"),
        "attn.W_O": At("self_attn.out_proj.weight", "d (head e) -> head e d"),
        "attn.b_O": At("self_attn.out_proj.bias", "d -> d", when="out_bias"),
        "ln2.w": At("final_layer_norm.weight", "d -> d"),
        "ln2.b": At("final_layer_norm.bias", "d -> d"),
        "mlp.W_in": At("fc1.weight", "mlp d -> d mlp"),
        "mlp.b_in": At("fc1.bias", "mlp -> mlp", when="mlp_bias"),
        "mlp.W_out": At("fc2.weight", "d mlp -> mlp d"),
        "mlp.b_out": At("fc2.bias", "d -> d", when="mlp_bias"),
    },
    modules=Modules(
        embed="model.decoder.embed_tokens",
        pos_embed="model.decoder.embed_positions",
        block="model.decoder.layers.{l}",
        ln1="self_attn_layer_norm",
        attn="self_attn",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out="self_attn.out_proj",
        ln2="final_layer_norm",
        mlp="fc2",
        mlp_in="fc1",
        mlp_out="fc2",
        flat_mlp=True,
        ln_final="model.decoder.final_layer_norm",
        core="self_attn",
    ),
    defaults={
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "num_attention_heads": 12,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
        "enable_bias": True,
        "tie_word_embeddings": True,
    },
    read=read,
    prefix="model.",
    single_inside=True,
)


class OPT(LanguageModelAdapter):
    """The adapter for OPT."""

    name = "opt"
    family = FAMILY
