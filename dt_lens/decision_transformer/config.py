"""The shape and the options of a decision transformer: everything in which the code bases differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from dt_lens.arguments import is_finite_number
from dt_lens.errors import DtLensError, as_written, nearest
from dt_lens.lens.matrices import Structure
from dt_lens.lens.placement import Placed

__all__ = ["HEADS", "Activation", "HookedDecisionTransformerConfig", "Normalization", "Position"]

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh"]
Normalization = Literal["pre", "post", "none"]
Position = Literal["none", "constant", "learned", "step"]
HEADS = ("action", "state", "return_to_go")

SIZES = ("state_dim", "act_dim", "d_model", "n_layers", "n_heads", "d_mlp", "n_ctx", "max_ep_len", "n_position")
FLAGS = (
    "final_ln",
    "embed_ln",
    "action_tanh",
    "discrete_actions",
    "attn_scale_by_head",
    "attn_scale_by_layer",
    "gated_mlp",
    "action_padding",
)


@dataclass(frozen=True)
class HookedDecisionTransformerConfig(Placed):
    """The shape and the options of a decision transformer.

    Sizes are counts of features; ``n_ctx`` counts environment steps (a step is three tokens: return-to-go, state,
    action) and ``max_ep_len`` counts rows of the timestep table.

    Raises ``DtLensError`` for sizes or options that no model can have.

    >>> HookedDecisionTransformerConfig(state_dim=11, act_dim=3, n_heads=2).d_head
    64
    """

    state_dim: int
    act_dim: int
    d_model: int = 128
    n_layers: int = 3
    n_heads: int = 1
    d_mlp: int = 512
    n_ctx: int = 20
    max_ep_len: int = 1000
    act_fn: Activation = "relu"
    # Where a block's LayerNorms stand: "pre", before the sublayer; "post", after the sum; or nowhere.
    normalization: Normalization = "pre"
    final_ln: bool = True  # a LayerNorm after the last block
    embed_ln: bool = True  # a LayerNorm over the interleaved tokens
    eps: float = 1e-5  # of the blocks' LayerNorms and the final one
    embed_ln_eps: float = 1e-5
    action_tanh: bool = True
    discrete_actions: bool = False  # predictions are logits; actions may be given as integer ids
    # "constant": row 0 of the table is added to every token, which is what position ids of zero do. "learned": a row
    # for each token of the window. "step": a row for each step, added where the timestep's is, before embed_ln.
    position: Position = "none"
    # Rows of the position table. "learned" has one for each token; acting uses 3 * n_ctx - 1 of them, without the last
    # step's action, which is yet to come.
    n_position: int = 1
    timestep_of: Literal["step", "window"] = "step"  # "window": every token has the row of the window's last step
    attn_scale_by_head: bool = True  # scores divided by sqrt(d_head)
    attn_scale_by_layer: bool = False  # and by (layer + 1)
    gated_mlp: bool = False  # act(x @ W_gate) * (x @ W_in) + b_in, instead of act(x @ W_in + b_in)
    predicts: tuple[str, ...] = HEADS  # the output heads; "action" is always one
    embed_act: Literal["none", "tanh"] = "none"  # applied to the three embeddings, before the timestep's is added
    action_padding: bool = False  # one more row in the action table, id act_dim, for "no action was taken"
    # Dropout acts in training mode only: on the tokens, the attention pattern, and what each sublayer adds.
    embed_dropout: float = 0.1
    attn_dropout: float = 0.1
    resid_dropout: float = 0.1

    def __post_init__(self) -> None:
        self._order_heads()
        for name in SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DtLensError(f"The configuration's {name} is {value!r}; it must be a positive whole number.")
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise DtLensError(f"The configuration's {name} is {getattr(self, name)!r}; it must be true or false.")
        for name in ("eps", "embed_ln_eps"):
            if not (is_finite_number(getattr(self, name)) and 0 <= getattr(self, name) < 1):
                raise DtLensError(
                    f"The configuration's {name} is {as_written(getattr(self, name))}; it must be a small number of 0 "
                    "or more."
                )
        for name in ("embed_dropout", "attn_dropout", "resid_dropout"):
            if not (is_finite_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1):
                raise DtLensError(
                    f"The configuration's {name} is {as_written(getattr(self, name))}; it must lie in 0 to 1."
                )
        if self.d_model % self.n_heads:
            raise DtLensError(
                f"d_model {self.d_model} does not split into n_heads {self.n_heads} equal heads; give an n_heads that "
                "divides it."
            )
        for name, allowed in (
            ("act_fn", Activation),
            ("normalization", Normalization),
            ("position", Position),
            ("embed_act", Literal["none", "tanh"]),
            ("timestep_of", Literal["step", "window"]),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in get_args(allowed):
                raise DtLensError(
                    f"The configuration's {name} is {value!r}; it must be one of {', '.join(get_args(allowed))}."
                    + nearest(str(value), get_args(allowed))
                )
        if self.position == "learned" and self.n_position < 2:
            raise DtLensError(
                f"The configuration's n_position is {self.n_position}; learned positions need at least 2, one for the "
                "first return-to-go and one for the first state."
            )

    def _order_heads(self) -> None:
        """Put ``predicts`` in one order, as a tuple, so that equal models have equal configurations."""
        given = self.predicts
        if not isinstance(given, (list, tuple)) or "action" not in given:
            raise DtLensError(f"The configuration's predicts is {given!r}; it must be a list of heads with 'action'.")
        for head in given:
            if head not in HEADS:
                raise DtLensError(
                    f"The configuration's predicts names {head!r}; the heads are {', '.join(HEADS)}."
                    + nearest(str(head), HEADS)
                )
        object.__setattr__(self, "predicts", tuple(head for head in HEADS if head in given))

    @property
    def d_head(self) -> int:
        """Features of one attention head."""
        return self.d_model // self.n_heads

    @property
    def n_actions(self) -> int:
        """Rows of the action table: one for each action coordinate or id, and one more if ``action_padding``."""
        return self.act_dim + self.action_padding

    @property
    def normalization_type(self) -> str:
        """TransformerLens's name of the norm, where there is one."""
        return "LN"

    @property
    def attn_only(self) -> bool:
        """False: every block has an MLP. TransformerLens's name."""
        return False

    @property
    def structure(self) -> Structure:
        """Blocks, heads, and which LayerNorm stands before which matrix."""
        layers, pre = range(self.n_layers), self.normalization == "pre"
        return Structure(
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_model=self.d_model,
            attn_scale=tuple(self.attn_scale(layer) for layer in layers),
            attn_norm=tuple(f"blocks.{layer}.ln1" if pre else None for layer in layers),
            mlp_norm=tuple(f"blocks.{layer}.ln2" if pre else None for layer in layers),
        )

    def attn_scale(self, layer: int) -> float:
        """The factor that attention scores of ``layer`` are multiplied by."""
        scale = self.d_head**-0.5 if self.attn_scale_by_head else 1.0
        return scale / (layer + 1) if self.attn_scale_by_layer else scale

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HookedDecisionTransformerConfig:
        """The inverse of ``to_dict``; an unknown field is a ``DtLensError`` that names it."""
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise DtLensError(f"Unknown configuration field {name!r}." + nearest(name, known))
        for name in ("state_dim", "act_dim"):
            if name not in values:
                raise DtLensError(f"The configuration lacks {name!r}, which a decision transformer needs.")
        return cls(**values)
