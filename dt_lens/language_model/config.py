"""The shape of a language model: what its configuration says, in one vocabulary for all families."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from dt_lens.errors import DtLensError
from dt_lens.lens.matrices import Structure
from dt_lens.lens.placement import Placed

__all__ = ["LanguageModelConfig", "Norm", "Position", "QKNorm", "Values", "alibi_slopes"]

Norm = Literal["layernorm", "rmsnorm"]
Position = Literal["learned", "rotary", "alibi"]
QKNorm = Literal["none", "head", "all"]

SIZES = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_mlp", "n_ctx", "d_vocab")
MOST_LAYERS = 10_000
FLAGS = (
    "gated", "parallel", "own_mlp_norm", "pre_norm", "post_norm", "unit_offset", "embed_ln", "tied", "qkv_bias",
    "out_bias", "mlp_bias", "unembed_bias",
)  # fmt: skip


@dataclass(frozen=True)
class LanguageModelConfig(Placed):
    """A decoder's sizes and options, as TransformerLens names them.

    ``act_fn`` is Hugging Face's name of the activation. ``attn_scale`` is what scores are multiplied by, one number for
    each layer. ``tied``: the unembedding is the token embedding's memory. The four ``*_bias`` say which biases
    exist.

    Raises ``DtLensError`` for sizes or options that no model can have.
    """

    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int  # fewer than n_heads where several query heads share keys and values
    d_model: int
    d_head: int
    d_mlp: int
    n_ctx: int
    d_vocab: int
    act_fn: str
    attn_scale: tuple[float, ...]
    norm: Norm = "layernorm"
    eps: float = 1e-5
    position: Position = "learned"
    gated: bool = False
    parallel: bool = False  # attention and MLP read the stream side by side
    own_mlp_norm: bool = False  # and then each through a norm of its own
    embed_ln: bool = False  # a norm over the token embeddings, before the first block
    tied: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    unembed_bias: bool = False
    pre_norm: bool = True  # attention and MLP read the stream through a norm
    post_norm: bool = False  # what they give passes an RMSNorm before it joins the stream
    unit_offset: bool = False  # the norms multiply by 1 + their weight
    embed_scale: float = 1.0  # what a token's row of the table is multiplied by when it enters the stream
    attn_softcap: float | None = None  # a score s enters the softmax as cap * tanh(s / cap)
    logit_softcap: float | None = None  # the same of the logits
    qk_norm: QKNorm = "none"  # queries and keys pass a norm before the score: each head's own, or of all heads together

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DtLensError(f"The configuration's {name} is {value!r}; it must be a positive whole number.")
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise DtLensError(f"The configuration's {name} is {getattr(self, name)!r}; it must be true or false.")
        if not isinstance(self.eps, (int, float)) or isinstance(self.eps, bool) or not 0 <= self.eps < 1:
            raise DtLensError(f"The configuration's eps is {self.eps!r}; it must be a small number of 0 or more.")
        if self.n_heads % self.n_kv_heads:
            raise DtLensError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} heads of keys and values equally; the "
                "second number must divide the first."
            )
        for name, allowed in (("norm", Norm), ("position", Position), ("qk_norm", QKNorm)):
            if getattr(self, name) not in get_args(allowed):
                raise DtLensError(
                    f"The configuration's {name} is {getattr(self, name)!r}; it must be one of "
                    f"{', '.join(get_args(allowed))}."
                )
        if self.post_norm and self.norm != "rmsnorm":
            raise DtLensError(
                "post_norm asks for norm='rmsnorm': a norm that centres what is written has no place here."
            )
        for name in ("embed_scale", "attn_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < float("inf")):
                raise DtLensError(f"The configuration's {name} is {value!r}; it must be a positive number.")
        if len(self.attn_scale) != self.n_layers:
            raise DtLensError(
                f"attn_scale has {len(self.attn_scale)} entries; give one for each of {self.n_layers} layers."
            )

    @property
    def sizes(self) -> dict[str, int]:
        """The axes that patterns of a layout name."""
        return {
            "vocab": self.d_vocab,
            "ctx": self.n_ctx,
            "d": self.d_model,
            "head": self.n_heads,
            "kv": self.n_kv_heads,
            "e": self.d_head,
            "mlp": self.d_mlp,
        }

    @property
    def has_ln2(self) -> bool:
        """Whether the MLP reads through another norm than attention."""
        return self.pre_norm and (not self.parallel or self.own_mlp_norm)

    @property
    def normed_qk(self) -> bool:
        """Whether queries and keys pass a norm of their own."""
        return self.qk_norm != "none"

    @property
    def structure(self) -> Structure:
        """Blocks, heads, and which norm stands before which matrix."""
        none = (None,) * self.n_layers
        attn, mlp = (tuple(f"blocks.{layer}.{norm}" for layer in range(self.n_layers)) for norm in ("ln1", "ln2"))
        return Structure(
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_model=self.d_model,
            attn_scale=self.attn_scale,
            attn_norm=attn if self.pre_norm else none,
            mlp_norm=(mlp if self.has_ln2 else attn) if self.pre_norm else none,
            n_kv_heads=self.n_kv_heads,
            rms=self.norm == "rmsnorm",
            parallel=self.parallel,
            rotary=self.position == "rotary",
            qk_norm=self.normed_qk,
            alibi=alibi_slopes(self.n_heads) if self.position == "alibi" else (),
            attn_post_norm=tuple(f"{norm}_post" for norm in attn) if self.post_norm else (),
            mlp_post_norm=tuple(f"{norm}_post" for norm in mlp) if self.post_norm else (),
            unit_offset=self.unit_offset,
            attn_softcap=self.attn_softcap,
        )

    @property
    def normalization_type(self) -> str:
        """TransformerLens's name of the norm."""
        return "LN" if self.norm == "layernorm" else "RMS"

    @property
    def attn_only(self) -> bool:
        """False: every block has an MLP. TransformerLens's name."""
        return False

    @property
    def parallel_attn_mlp(self) -> bool:
        """TransformerLens's name of ``parallel``."""
        return self.parallel

    @property
    def n_key_value_heads(self) -> int | None:
        """TransformerLens's name of ``n_kv_heads``: ``None`` where every query head has its own."""
        return None if self.n_kv_heads == self.n_heads else self.n_kv_heads

    def replace(self, **changes: Any) -> LanguageModelConfig:
        """A copy with other values."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {**asdict(self), "attn_scale": list(self.attn_scale)}


def alibi_slopes(n_heads: int) -> tuple[float, ...]:
    """How much each head's scores rise with the position of the key, in the order of the heads.

    A geometric sequence of ratio ``2^(-8 / n)`` for ``n`` heads, a power of two; further heads have every second member
    of the sequence for ``2n`` (Press et al., "Train Short, Test Long: Attention with Linear Biases", 2022).
    """
    power = 2 ** (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return (*slopes, *(2 ** (-4 * i / power) for i in range(1, 2 * (n_heads - power), 2)))


class Values:
    """The values of a ``config.json``, with its class's defaults for what it leaves out.

    Args:
        given: what the file holds, or a live model's ``config.to_dict()``.
        defaults: what a missing value means.
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.given = given
        self.defaults = defaults

    def get(self, *names: str) -> Any:
        """The value of the first of these names that is set, else the first name's default or ``None``."""
        for name in names:
            if self.given.get(name) is not None:
                return self.given[name]
        return self.defaults.get(names[0])

    def size(self, *names: str) -> int:
        """A positive whole number; ``DtLensError`` for anything else, naming it as the file does."""
        value = self.get(*names)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise DtLensError(f"config.json says {names[0]} is {value!r}; it must be a positive whole number.")
        return value

    def layers(self, *names: str) -> int:
        """A number of blocks, at most ``MOST_LAYERS``: entries are made for each before any tensor is read."""
        value = self.size(*names)
        if value > MOST_LAYERS:
            raise DtLensError(f"config.json says {names[0]} is {value}; a model of at most {MOST_LAYERS} can be read.")
        return value

    def flag(self, *names: str) -> bool:
        """True or false; ``DtLensError`` for anything else."""
        value = self.get(*names)
        if not isinstance(value, bool):
            raise DtLensError(f"config.json says {names[0]} is {value!r}; it must be true or false.")
        return value

    def only(self, name: str, wanted: Any, why: str) -> None:
        """Raise ``DtLensError`` naming an option that has another value than the one that the lens can represent."""
        value = self.get(name)
        if value != wanted:
            raise DtLensError(
                f"config.json says {name} is {json.dumps(value, default=str):.80}, so that {why}; models with "
                f"{json.dumps(wanted)} can be read."
            )

    def share(self, whole: int, *names: str) -> int:
        """``whole`` divided by a number of equal parts; ``DtLensError`` if there is a remainder."""
        parts = self.size(*names)
        if whole % parts:
            raise DtLensError(f"config.json says {names[0]} is {parts}, which does not divide {whole} equally.")
        return whole // parts
