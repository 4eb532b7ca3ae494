"""From Hugging Face's layout of a decision transformer to canonical weights and configuration, and back.

Canonical weights are strided views of Hugging Face's tensors (transposes, slices, splits of an axis), so that both
models share their memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor, cat

from dt_lens.decision_transformer.config import HEADS, Activation, HookedDecisionTransformerConfig
from dt_lens.errors import DtLensError, nearest

__all__ = ["HEAD_KEYS", "canonical_from_hf", "config_from_hf", "config_to_hf", "heads_in", "hf_from_canonical"]

# Hugging Face's activation names to ours; "gelu_new" and the like are one formula.
ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


# predict_action is a Sequential of the linear map and its tanh.
HEAD_KEYS = {"action": "predict_action.0", "state": "predict_state", "return_to_go": "predict_return"}


class _Plain(NamedTuple):
    """A tensor that is one whole weight; ``transposed`` for ``nn.Linear``'s (out, in)."""

    key: str
    name: str
    transposed: bool = False


def _plain_rules(cfg: HookedDecisionTransformerConfig) -> Iterator[_Plain]:
    for hf, ours in (("return", "return_to_go"), ("state", "state"), ("action", "action")):
        yield _Plain(f"embed_{hf}.weight", f"embed.{ours}.W", transposed=True)
        yield _Plain(f"embed_{hf}.bias", f"embed.{ours}.b")
        if ours in cfg.predicts:
            yield _Plain(f"{HEAD_KEYS[ours]}.weight", f"predict.{ours}.W", transposed=True)
            yield _Plain(f"{HEAD_KEYS[ours]}.bias", f"predict.{ours}.b")
    yield _Plain("embed_timestep.weight", "embed.timestep.W")
    yield _Plain("encoder.wpe.weight", "embed.position.W")
    for hf, ours in (("embed_ln", "embed_ln"), ("encoder.ln_f", "ln_final")):
        yield _Plain(f"{hf}.weight", f"{ours}.w")
        yield _Plain(f"{hf}.bias", f"{ours}.b")
    for layer in range(cfg.n_layers):
        h, b = f"encoder.h.{layer}", f"blocks.{layer}"
        for norm in ("1", "2"):
            yield _Plain(f"{h}.ln_{norm}.weight", f"{b}.ln{norm}.w")
            yield _Plain(f"{h}.ln_{norm}.bias", f"{b}.ln{norm}.b")
        yield _Plain(f"{h}.attn.c_proj.bias", f"{b}.attn.b_O")
        yield _Plain(f"{h}.mlp.c_fc.weight", f"{b}.mlp.W_in")
        yield _Plain(f"{h}.mlp.c_fc.bias", f"{b}.mlp.b_in")
        yield _Plain(f"{h}.mlp.c_proj.weight", f"{b}.mlp.W_out")
        yield _Plain(f"{h}.mlp.c_proj.bias", f"{b}.mlp.b_out")


def canonical_from_hf(tensors: Mapping[str, Tensor], cfg: HookedDecisionTransformerConfig) -> dict[str, Tensor]:
    """Canonical weights as views of Hugging Face's tensors.

    Raises:
        DtLensError: naming a key that is missing, unknown, or of a shape that does not fit ``cfg``.
    """
    held = {int(found[1]) for key in tensors if (found := re.match(r"encoder\.h\.([0-9]{1,6})\.", key))}
    if held and max(held) + 1 != cfg.n_layers:
        raise DtLensError(
            f"The checkpoint holds {max(held) + 1} blocks and its configuration says {cfg.n_layers}; the two do not "
            "belong together."
        )
    # Checked first, so that a huge number in a configuration or a key builds nothing.
    absent = next((layer for layer in range(cfg.n_layers) if layer not in held), None)
    if absent is not None:
        raise DtLensError(
            f"The checkpoint has no tensors of block {absent} ('encoder.h.{absent}.'), which a decision transformer of "
            f"{cfg.n_layers} blocks needs."
        )
    # Conv1D stores (in, out); c_attn holds query, key and value side by side, each with its heads in order.
    left = dict(tensors)
    weights: dict[str, Tensor] = {}

    def take(key: str, *shape: int) -> Tensor:
        if key not in left:
            raise DtLensError(
                f"The checkpoint has no tensor {key!r}, which a decision transformer of this shape needs."
            )
        tensor = left.pop(key)
        if tuple(tensor.shape) != shape:
            raise DtLensError(f"The tensor {key!r} has shape {list(tensor.shape)}; {list(shape)} was expected.")
        return tensor

    shapes = _shapes(cfg)
    for rule in _plain_rules(cfg):
        shape = shapes[rule.name]
        tensor = take(rule.key, *(reversed(shape) if rule.transposed else shape))
        weights[rule.name] = tensor.T if rule.transposed else tensor
    d = cfg.d_model
    for layer in range(cfg.n_layers):
        h, b = f"encoder.h.{layer}.attn", f"blocks.{layer}.attn"
        fused = rearrange(
            take(f"{h}.c_attn.weight", d, 3 * d), "d (which head e) -> which head d e", which=3, head=cfg.n_heads
        )
        bias = rearrange(take(f"{h}.c_attn.bias", 3 * d), "(which head e) -> which head e", which=3, head=cfg.n_heads)
        for which, letter in enumerate("QKV"):
            weights[f"{b}.W_{letter}"], weights[f"{b}.b_{letter}"] = fused[which], bias[which]
        weights[f"{b}.W_O"] = rearrange(take(f"{h}.c_proj.weight", d, d), "(head e) d -> head e d", head=cfg.n_heads)
    if left:
        key = min(left)
        raise DtLensError(
            f"The checkpoint has a tensor {key!r} that a decision transformer of this shape has no place for."
            + nearest(key, set(tensors) - set(left))
        )
    return weights


def hf_from_canonical(weights: Mapping[str, Tensor], cfg: HookedDecisionTransformerConfig) -> dict[str, Tensor]:
    """Hugging Face's tensors from canonical weights, as contiguous copies.

    Parts that Hugging Face's model has and ``cfg`` lacks are filled with neutral values.
    """
    d = cfg.d_model
    kind = weights["blocks.0.mlp.W_in"]
    tensors = {"encoder.wte.weight": kind.new_zeros(1, d)}
    for rule in _plain_rules(cfg):
        if rule.name in weights:
            tensor = weights[rule.name]
        elif rule.name == "embed.position.W":
            tensor = kind.new_zeros(1, d)
        else:
            raise DtLensError(
                f"Hugging Face's decision transformer needs the weight {rule.name!r}, which this model lacks."
            )
        tensors[rule.key] = tensor.T if rule.transposed else tensor
    for layer in range(cfg.n_layers):
        h, b = f"encoder.h.{layer}.attn", f"blocks.{layer}.attn"
        tensors[f"{h}.c_attn.weight"] = cat(
            [rearrange(weights[f"{b}.W_{q}"], "head d e -> d (head e)") for q in "QKV"], dim=1
        )
        tensors[f"{h}.c_attn.bias"] = cat([rearrange(weights[f"{b}.b_{q}"], "head e -> (head e)") for q in "QKV"])
        tensors[f"{h}.c_proj.weight"] = rearrange(weights[f"{b}.W_O"], "head e d -> (head e) d")
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}


def _shapes(cfg: HookedDecisionTransformerConfig) -> dict[str, tuple[int, ...]]:
    d = cfg.d_model
    shapes: dict[str, tuple[int, ...]] = {
        "embed.timestep.W": (cfg.max_ep_len, d),
        "embed.position.W": (cfg.n_position, d),
    }
    for name, size in (("return_to_go", 1), ("state", cfg.state_dim), ("action", cfg.act_dim)):
        shapes |= {f"embed.{name}.W": (size, d), f"embed.{name}.b": (d,)}
        shapes |= {f"predict.{name}.W": (d, size), f"predict.{name}.b": (size,)}
    norms = ["embed_ln", "ln_final"]
    for layer in range(cfg.n_layers):
        b = f"blocks.{layer}"
        norms += [f"{b}.ln1", f"{b}.ln2"]
        shapes |= {f"{b}.attn.b_O": (d,), f"{b}.mlp.b_out": (d,), f"{b}.mlp.b_in": (cfg.d_mlp,)}
        shapes |= {f"{b}.mlp.W_in": (d, cfg.d_mlp), f"{b}.mlp.W_out": (cfg.d_mlp, d)}
    for norm in norms:
        shapes |= {f"{norm}.w": (d,), f"{norm}.b": (d,)}
    return shapes


def heads_in(tensors: Iterable[str]) -> tuple[str, ...]:
    """The output heads that a file has under Hugging Face's keys; of the action's, which must be there, any part."""
    keys = set(tensors)
    held = {name: {f"{key}.weight", f"{key}.bias"} & keys for name, key in HEAD_KEYS.items()}
    return tuple(name for name in HEADS if name == "action" or held[name])


def config_from_hf(
    config: Mapping[str, Any],
    context: int = 20,
    discrete_actions: bool | None = None,
    predicts: tuple[str, ...] = HEADS,
) -> HookedDecisionTransformerConfig:
    """Our configuration from the values of Hugging Face's ``DecisionTransformerConfig``.

    ``config.json`` leaves out values that are Hugging Face's default, so a missing value is that default. It does not
    hold the context; it holds ``discrete_actions`` if ``save_pretrained`` wrote it. ``predicts`` are the output heads,
    which it does not say either.

    Raises:
        DtLensError: for a value that no model can have, or an option that this model cannot represent.
    """

    def get(*names: str, default: Any) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), default)

    act_fn = get("activation_function", default="relu")
    if not isinstance(act_fn, str) or act_fn not in ACTIVATIONS:
        raise DtLensError(
            f"The configuration's activation_function is {act_fn!r}; dt-lens knows {', '.join(ACTIVATIONS)}."
            + nearest(str(act_fn), ACTIVATIONS)
        )
    if config.get("add_cross_attention"):
        raise DtLensError(
            "The configuration has add_cross_attention=True; dt-lens has no cross-attention, so it would be lost."
        )
    d_model = get("hidden_size", "n_embd", default=128)
    return HookedDecisionTransformerConfig(
        state_dim=get("state_dim", default=17),
        act_dim=get("act_dim", default=4),
        d_model=d_model,
        n_layers=get("n_layer", "num_hidden_layers", default=3),
        n_heads=get("n_head", "num_attention_heads", default=1),
        d_mlp=get("n_inner", default=4 * d_model if isinstance(d_model, int) else d_model),
        n_ctx=context,
        max_ep_len=get("max_ep_len", default=4096),
        act_fn=ACTIVATIONS[act_fn],
        eps=get("layer_norm_epsilon", default=1e-5),
        action_tanh=get("action_tanh", default=True),
        discrete_actions=get("discrete_actions", default=False) if discrete_actions is None else discrete_actions,
        predicts=predicts,
        position="constant",
        n_position=get("n_positions", "max_position_embeddings", default=1024),
        attn_scale_by_head=get("scale_attn_weights", default=True),
        attn_scale_by_layer=get("scale_attn_by_inverse_layer_idx", default=False),
        embed_dropout=get("embd_pdrop", default=0.1),
        attn_dropout=get("attn_pdrop", default=0.1),
        resid_dropout=get("resid_pdrop", default=0.1),
    )


def config_to_hf(cfg: HookedDecisionTransformerConfig) -> dict[str, Any]:
    """The values of ``config.json`` with which Hugging Face's class computes what ``cfg`` computes.

    Raises:
        DtLensError: naming an option that Hugging Face's class cannot represent.
    """
    # Hugging Face's embed_ln has torch's default epsilon; its configuration sets only those of the other LayerNorms.
    for name, wanted in (
        ("normalization", "pre"),
        ("embed_ln", True),
        ("final_ln", True),
        ("embed_ln_eps", 1e-5),
        ("gated_mlp", False),
        ("predicts", HEADS),
        ("embed_act", "none"),
        ("action_padding", False),
        ("timestep_of", "step"),
    ):
        if getattr(cfg, name) != wanted:
            raise DtLensError(
                f"Hugging Face's decision transformer has no {name}={getattr(cfg, name)!r}; only {wanted!r} can be "
                "saved in its format."
            )
    if cfg.position in ("learned", "step"):
        raise DtLensError(
            f"Hugging Face's decision transformer has no learned positions, so a model with position={cfg.position!r} "
            "cannot be saved in its format."
        )
    names = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu", "tanh": "tanh"}
    return {
        "architectures": ["DecisionTransformerModel"],
        "model_type": "decision_transformer",
        "state_dim": cfg.state_dim,
        "act_dim": cfg.act_dim,
        "hidden_size": cfg.d_model,
        "max_ep_len": cfg.max_ep_len,
        "action_tanh": cfg.action_tanh,
        "discrete_actions": cfg.discrete_actions,  # not a field of Hugging Face's class, which keeps it anyway
        "vocab_size": 1,
        "n_positions": cfg.n_position if cfg.position == "constant" else 1,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "n_inner": cfg.d_mlp,
        "activation_function": names[cfg.act_fn],
        "layer_norm_epsilon": cfg.eps,
        "scale_attn_weights": cfg.attn_scale_by_head,
        "scale_attn_by_inverse_layer_idx": cfg.attn_scale_by_layer,
        "embd_pdrop": cfg.embed_dropout,
        "attn_pdrop": cfg.attn_dropout,
        "resid_pdrop": cfg.resid_dropout,
        # The model has no vocabulary; the class's default ids would make it warn.
        "bos_token_id": None,
        "eos_token_id": None,
    }
