"""GPT-J (Wang and Komatsuzaki, 2021) as Hugging Face's ``GPTJForCausalLM``.

Every matrix is an ``nn.Linear``, which stores (out, in). Attention and MLP read the stream through one LayerNorm, and
``n_heads * d_head`` is d_model, so that a wrong reshape of any attention matrix has the right shape.
"""

from __future__ import annotations

from dt_lens.errors import DtLensError
from dt_lens.language_model.adapter import LanguageModelAdapter
from dt_lens.language_model.config import LanguageModelConfig, Values
from dt_lens.language_model.family import Family, Modules
from dt_lens.language_model.layout import At

__all__ = ["FAMILY", "GPTJ"]

MOST_POSITIONS = 2**17


def read(values: Values) -> LanguageModelConfig:
    """The configuration; ``n_inner`` is four times the width by default."""
    d, layers = values.size("n_embd", "hidden_size"), values.layers("n_layer", "num_hidden_layers")
    d_head = values.share(d, "n_head", "num_attention_heads")
    # Each block has a table of this many rotations, whose size no tensor of the file limits.
    rotated, n_ctx = values.size("rotary_dim"), values.size("n_positions", "max_position_embeddings")
    if rotated > d_head or n_ctx > MOST_POSITIONS:
        raise DtLensError(
            f"config.json says rotary_dim is {rotated} and n_positions {n_ctx}; they can be {d_head} (a head's "
            f"features) and {MOST_POSITIONS} at most."
        )
    return LanguageModelConfig(
        family="gptj",
        n_layers=layers,
        n_heads=d // d_head,
        n_kv_heads=d // d_head,
        d_model=d,
        d_head=d_head,
        d_mlp=values.size("n_inner") if values.get("n_inner") is not None else 4 * d,
        n_ctx=n_ctx,
        d_vocab=values.size("vocab_size"),
        act_fn=values.get("activation_function"),
        attn_scale=(d_head**-0.5,) * layers,
        eps=values.get("layer_norm_epsilon"),
        position="rotary",
        parallel=True,
        tied=values.flag("tie_word_embeddings"),
        qkv_bias=False,
        out_bias=False,
        unembed_bias=True,
    )


FAMILY = Family(
    name="gptj",
    model_types=("gptj",),
    architectures=("GPTJForCausalLM",),
    whole={
        "embed.W_E": At("transformer.wte.weight", "vocab d -> vocab d"),
        "ln_final.w": At("transformer.ln_f.weight", "d -> d"),
        "ln_final.b": At("transformer.ln_f.bias", "d -> d"),
        "unembed.W_U": At("lm_head.weight", "vocab d -> d vocab"),
        "unembed.b_U": At("lm_head.bias", "vocab -> vocab"),
    },
    block_key="transformer.h.{l}.",
    block={
        "ln1.w": At("ln_1.weight", "d -> d"),
        "ln1.b": At("ln_1.bias", "d -> d"),
        "attn.W_Q": At("attn.q_proj.weight", "(head e) d -> head d e"),
        "attn.W_K": At("attn.k_proj.weight", "(head e) d -> head d e"),
        "attn.W_V": At("attn.v_proj.weight", "(head e) d -> head d e"),
        "attn.W_O": At("attn.out_proj.weight", "d (head e) -> head e d"),
        "mlp.W_in": At("mlp.fc_in.weight", "mlp d -> d mlp"),
        "mlp.b_in": At("mlp.fc_in.bias", "mlp -> mlp"),
        "mlp.W_out": At("mlp.fc_out.weight", "d mlp -> mlp d"),
        "mlp.b_out": At("mlp.fc_out.bias", "d -> d"),
    },
    modules=Modules(
        embed="transformer.wte",
        block="transformer.h.{l}",
        ln1="ln_1",
        attn="attn",
        qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        out="attn.out_proj",
        mlp="mlp",
        mlp_in="mlp.fc_in",
        mlp_out="mlp.fc_out",
        ln_final="transformer.ln_f",
        core_kind="method",
    ),
    defaults={
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "n_positions": 2048,
        "rotary_dim": 64,
        "vocab_size": 50400,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    },
    read=read,
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
    prefix="transformer.",
    single_inside=True,
)


class GPTJ(LanguageModelAdapter):
    """The adapter for GPT-J."""

    name = "gptj"
    family = FAMILY
