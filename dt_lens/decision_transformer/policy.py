"""The decision transformer as an actor: the same function as the hooked model, with only what acting needs.

An agent needs one vector per step, the action read off the last state's token. So the current action's token, which no
earlier token sees, is left out; the last block computes its queries, its MLP and its output for one token only; and
what depends on one token alone (``embed``, ``first_qkv``) can be computed once, when the token enters the window. This
file needs nothing but torch, so that a worker process starts quickly.

``tests/decision_transformer/test_policy.py`` checks it against the hooked model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.errors import DtLensError

__all__ = ["ActingModel", "acting_shapes", "additive_mask"]


@dataclass(frozen=True)
class _Norm:
    """A LayerNorm, or the identity if the configuration has none here."""

    w: Tensor | None
    b: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.w is None else F.layer_norm(x, self.w.shape, self.w, self.b, self.eps)


@dataclass(frozen=True)
class _Linear:
    """``y = x @ W + b``, stored as ``torch.nn.functional.linear`` reads it: ``weight`` is ``W`` transposed."""

    weight: Tensor  # [d_out, d_in]
    bias: Tensor  # [d_out]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class _Block:
    ln1: _Norm
    ln2: _Norm
    qkv: _Linear  # the three projections side by side, heads in order within each: [3 * d_model, d_model]
    out: _Linear
    mlp_in: _Linear
    mlp_gate: Tensor | None  # [d_mlp, d_model], as _Linear stores it
    mlp_out: _Linear
    scale: float


def acting_shapes(cfg: HookedDecisionTransformerConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the weights that acting needs."""
    d, heads, e = cfg.d_model, cfg.n_heads, cfg.d_head
    shapes: dict[str, tuple[int, ...]] = {"embed.timestep.W": (cfg.max_ep_len, d)}
    for kind, size in (("return_to_go", 1), ("state", cfg.state_dim), ("action", cfg.n_actions)):
        shapes |= {f"embed.{kind}.W": (size, d), f"embed.{kind}.b": (d,)}
    if cfg.position != "none":
        shapes["embed.position.W"] = (cfg.n_position, d)
    norms = ["embed_ln"] * cfg.embed_ln + ["ln_final"] * cfg.final_ln
    for l in range(cfg.n_layers):
        attn, mlp = f"blocks.{l}.attn", f"blocks.{l}.mlp"
        for kind in "QKV":
            shapes |= {f"{attn}.W_{kind}": (heads, d, e), f"{attn}.b_{kind}": (heads, e)}
        shapes |= {f"{attn}.W_O": (heads, e, d), f"{attn}.b_O": (d,)}
        shapes |= {f"{mlp}.W_in": (d, cfg.d_mlp), f"{mlp}.b_in": (cfg.d_mlp,)}
        if cfg.gated_mlp:
            shapes[f"{mlp}.W_gate"] = (d, cfg.d_mlp)
        shapes |= {f"{mlp}.W_out": (cfg.d_mlp, d), f"{mlp}.b_out": (d,)}
        if cfg.normalization != "none":
            norms += [f"blocks.{l}.ln1", f"blocks.{l}.ln2"]
    for name in norms:
        shapes |= {f"{name}.w": (d,), f"{name}.b": (d,)}
    return shapes | {"predict.action.W": (d, cfg.act_dim), "predict.action.b": (cfg.act_dim,)}


class ActingModel:
    """The weights of a decision transformer, arranged for acting.

    They are copies: a later edit of the model's weights has no effect here.

    Args:
        weights: by canonical name, as in ``HookedDecisionTransformer.weights``, on any device, all of one
            floating-point type. The other heads (``predict.state``, ``predict.return_to_go``) may be missing.
        cfg: the shape and the options.

    Raises:
        DtLensError: naming the first weight that is missing, such as those of a state encoder that is not linear.
    """

    def __init__(self, weights: Mapping[str, Tensor], cfg: HookedDecisionTransformerConfig) -> None:
        self.cfg = cfg
        if cfg.position == "step" or cfg.timestep_of == "window":
            raise DtLensError(
                "This model's tokens depend on where in the window their step stands; acting without the full model "
                "needs tokens that do not change as the window moves on."
            )

        def get(name: str) -> Tensor:
            if name not in weights:
                raise DtLensError(f"The weight {name!r} is missing; acting without the full model needs it.")
            return weights[name].detach()

        def linear(name: str) -> _Linear:
            return _Linear(get(f"{name}.W").T.contiguous(), get(f"{name}.b").clone())

        def norm(name: str, present: bool, eps: float = cfg.eps) -> _Norm:
            if not present:
                return _Norm(None, None, eps)
            return _Norm(get(f"{name}.w").clone(), get(f"{name}.b").clone(), eps)

        def block(l: int) -> _Block:
            attn, normed = f"blocks.{l}.attn", cfg.normalization != "none"
            rows = [rearrange(get(f"{attn}.W_{kind}"), "head d e -> (head e) d") for kind in "QKV"]
            biases = [rearrange(get(f"{attn}.b_{kind}"), "head e -> (head e)") for kind in "QKV"]
            return _Block(
                ln1=norm(f"blocks.{l}.ln1", normed),
                ln2=norm(f"blocks.{l}.ln2", normed),
                qkv=_Linear(torch.cat(rows), torch.cat(biases)),
                out=_Linear(
                    rearrange(get(f"{attn}.W_O"), "head e d -> d (head e)").contiguous(), get(f"{attn}.b_O").clone()
                ),
                mlp_in=_Linear(get(f"blocks.{l}.mlp.W_in").T.contiguous(), get(f"blocks.{l}.mlp.b_in").clone()),
                mlp_gate=get(f"blocks.{l}.mlp.W_gate").T.contiguous() if cfg.gated_mlp else None,
                mlp_out=_Linear(get(f"blocks.{l}.mlp.W_out").T.contiguous(), get(f"blocks.{l}.mlp.b_out").clone()),
                scale=cfg.attn_scale(l),
            )

        self.embed_return_to_go = linear("embed.return_to_go")
        self.embed_state = linear("embed.state")
        self.embed_action = linear("embed.action")
        self.timestep_table = get("embed.timestep.W").clone()
        self.position_table = get("embed.position.W").clone() if cfg.position != "none" else None
        self.embed_ln = norm("embed_ln", cfg.embed_ln, cfg.embed_ln_eps)
        self.blocks = [block(l) for l in range(cfg.n_layers)]
        self.ln_final = norm("ln_final", cfg.final_ln)
        self.predict_action = linear("predict.action")

    @classmethod
    def random(
        cls, cfg: HookedDecisionTransformerConfig, dtype: torch.dtype, generator: torch.Generator
    ) -> ActingModel:
        """A model of this shape with random weights of a typical size, on the generator's device."""

        def draw(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator, device=generator.device)
            return (x * shape[-2] ** -0.5 if len(shape) > 1 else 1 + 0.1 * x).to(dtype)

        return cls({name: draw(*shape) for name, shape in acting_shapes(cfg).items()}, cfg)

    @property
    def dtype(self) -> torch.dtype:
        """The type that the model computes in."""
        return self.predict_action.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return self.predict_action.weight.device

    def embed(
        self,
        returns_to_go: Float[Tensor, "*batch 1"],
        states: Float[Tensor, "*batch state_dim"],
        actions: Float[Tensor, "*batch n_actions"],
        timesteps: Int[Tensor, "*batch"],
        action_timesteps: Int[Tensor, "*batch"] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens (return-to-go, state, action), each ``[*batch, d_model]``, as the first block reads them.

        If the model has a padding action, actions may be one entry wider: one-hot, with padding last. Learned
        positions are not included: they belong to the window, not to the token; see ``place``.
        """
        time = F.embedding(timesteps, self.timestep_table)
        action_time = time if action_timesteps is None else F.embedding(action_timesteps, self.timestep_table)
        if actions.shape[-1] < self.cfg.n_actions:
            actions = F.pad(actions, (0, 1))
        parts = self.embed_return_to_go(returns_to_go), self.embed_state(states), self.embed_action(actions)
        if self.cfg.embed_act == "tanh":
            parts = torch.tanh(parts[0]), torch.tanh(parts[1]), torch.tanh(parts[2])
        tokens = torch.stack((parts[0] + time, parts[1] + time, parts[2] + action_time))
        tokens = self.embed_ln(tokens)
        if self.position_table is not None and self.cfg.position == "constant":
            tokens = tokens + self.position_table[0]
        returns, states, actions = tokens.unbind()
        return returns, states, actions

    def first_qkv(self, x: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token three_d_model"]:
        """The first block's queries, keys and values, side by side."""
        block = self.blocks[0]
        return block.qkv(block.ln1(x) if self.cfg.normalization == "pre" else x)

    def place(self, x: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_model"]:
        """``x`` with learned positions added, if the model has them.

        Raises:
            DtLensError: for a window longer than the position table.
        """
        if self.cfg.position != "learned" or self.position_table is None:
            return x
        if x.shape[1] > self.cfg.n_position:
            raise DtLensError(
                f"A window of {x.shape[1]} tokens does not fit this model's {self.cfg.n_position} positions; "
                "give a shorter context."
            )
        return x + self.position_table[: x.shape[1]]

    def hidden(
        self,
        x: Float[Tensor, "batch token d_model"],
        qkv: Float[Tensor, "batch token three_d_model"],
        mask: Float[Tensor, "batch 1 token token"],
    ) -> Float[Tensor, "batch d_model"]:
        """The residual stream after the last block, at the last token only.

        Args:
            x: the tokens of a window, the last action's left out.
            qkv: ``first_qkv(x)``.
            mask: added to attention scores: 0 where a token (row) attends to another (column), ``-inf`` elsewhere.
        """
        cfg, last = self.cfg, self.cfg.n_layers - 1
        for l, block in enumerate(self.blocks):
            if l == last:
                q, k, v = self._last_qkv(block, x, qkv if l == 0 else None)
                x, mask = x[:, -1:], mask[:, :, -1:]
            else:
                if l > 0:
                    qkv = block.qkv(block.ln1(x) if cfg.normalization == "pre" else x)
                q, k, v = self._heads(qkv, 3)
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=block.scale)
            x = x + block.out(rearrange(z, "batch head token e -> batch token (head e)"))
            if cfg.normalization == "post":
                x = block.ln1(x)
                x = block.ln2(x + self._mlp(block, x))
            else:
                x = x + self._mlp(block, block.ln2(x))
        return x[:, -1]

    def action(self, hidden: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch act_dim"]:
        """The action, from what ``hidden`` returns for a window that ends with a state."""
        action = self.predict_action(self.ln_final(hidden))
        return torch.tanh(action) if self.cfg.action_tanh else action

    def _heads(self, x: Tensor, kinds: int) -> tuple[Tensor, ...]:
        """Split projections that lie side by side: ``kinds`` tensors of ``[batch, head, token, d_head]``."""
        pattern = "batch token (kind head e) -> kind batch head token e"
        return rearrange(x, pattern, kind=kinds, head=self.cfg.n_heads).unbind()

    def _last_qkv(self, block: _Block, x: Tensor, qkv: Tensor | None) -> tuple[Tensor, ...]:
        d = self.cfg.d_model
        if qkv is not None:
            q, k, v = self._heads(qkv, 3)
            return q[:, :, -1:], k, v
        h = block.ln1(x) if self.cfg.normalization == "pre" else x
        q = F.linear(h[:, -1:], block.qkv.weight[:d], block.qkv.bias[:d])
        return *self._heads(q, 1), *self._heads(F.linear(h, block.qkv.weight[d:], block.qkv.bias[d:]), 2)

    def _mlp(self, block: _Block, x: Tensor) -> Tensor:
        if block.mlp_gate is not None:
            gate = self._activate(F.linear(x, block.mlp_gate))
            return block.mlp_out(gate * F.linear(x, block.mlp_in.weight) + block.mlp_in.bias)
        return block.mlp_out(self._activate(block.mlp_in(x)))

    def _activate(self, h: Tensor) -> Tensor:
        match self.cfg.act_fn:
            case "relu":
                h = F.relu_(h)
            case "gelu":
                h = F.gelu(h)
            case "gelu_tanh":
                h = F.gelu(h, approximate="tanh")
            case "silu":
                h = F.silu(h, inplace=True)
            case "tanh":
                h = torch.tanh_(h)
        return h


def additive_mask(real: Bool[Tensor, "batch token"], dtype: torch.dtype) -> Float[Tensor, "batch 1 token token"]:
    """The attention mask of ``hidden``: causal and without padding, given which tokens are ``real [batch, token]``.

    A padding token attends to itself: a row without any token to attend to would be NaN and would spread.
    """
    n = real.shape[-1]
    causal = torch.ones(n, n, dtype=torch.bool, device=real.device).tril()
    allowed = (real[:, None, None, :] & causal) | torch.eye(n, dtype=torch.bool, device=real.device)
    return torch.zeros(allowed.shape, dtype=dtype, device=real.device).masked_fill_(~allowed, float("-inf"))
