"""The decision transformer as an actor: the same function as the hooked model, with only what acting needs.

An agent needs one vector per step, the action read off the last state's token. So the current action's token, which no
earlier token sees, is left out, and the last block computes its query, its MLP and its output for one token only. What
depends on one token alone (``embed``, ``first``) can be computed once, when the token enters the window. Some weights
are multiplied by each other beforehand; see ``dt_lens.decision_transformer.acting_blocks``.

Rows of a batch may have low-rank changes of weights of their own; see ``dt_lens.decision_transformer.changes``. This
file needs nothing but torch, so that a worker process starts quickly.

``tests/decision_transformer/test_policy.py`` checks it against the hooked model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dt_lens.decision_transformer.acting_blocks import (
    ActingBlock,
    Composed,
    Linear,
    Norm,
    Separate,
    attention_of,
    mlp_of,
    neurons_of,
    terms_of_block,
)
from dt_lens.decision_transformer.changes import NONE, Change, Product, RowChanges, Term
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.errors import DtLensError

__all__ = ["ActingModel", "acting_shapes", "additive_mask"]


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

        def linear(name: str) -> Linear:
            return Linear(get(f"{name}.W").clone(memory_format=torch.contiguous_format), get(f"{name}.b").clone())

        def norm(name: str, present: bool, eps: float = cfg.eps) -> Norm:
            if not present:
                return Norm(None, None, eps)
            return Norm(get(f"{name}.w").clone(), get(f"{name}.b").clone(), eps)

        def block(l: int) -> ActingBlock:
            attn, mlp, normed = f"blocks.{l}.attn", f"blocks.{l}.mlp", cfg.normalization != "none"
            parts = {f"{p}_{kind}": get(f"{attn}.{p}_{kind}").clone() for p in "Wb" for kind in "QKVO"}
            self._attention.append(parts)
            return ActingBlock(
                ln1=norm(f"blocks.{l}.ln1", normed),
                ln2=norm(f"blocks.{l}.ln2", normed),
                attn=attention_of(cfg, l, parts),
                mlp=mlp_of(
                    neurons_of(cfg, l, get("predict.action.W").device),
                    get(f"{mlp}.W_in"),
                    get(f"{mlp}.b_in"),
                    get(f"{mlp}.W_gate") if cfg.gated_mlp else None,
                    get(f"{mlp}.W_out"),
                ),
                mlp_bias=get(f"{mlp}.b_out").clone(),
                scale=cfg.attn_scale(l),
            )

        self._attention: list[dict[str, Tensor]] = []
        self._buffers: dict[tuple[str, torch.Size], Tensor] = {}
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
    ) -> Float[Tensor, "*batch 3 d_model"]:
        """The tokens (action, return-to-go, state), as the first block reads them.

        If the model has a padding action, actions may be one entry wider: one-hot, with padding last. Learned
        positions are not included: they belong to the window, not to the token; see ``place``.
        """
        if actions.shape[-1] < self.cfg.n_actions:
            actions = F.pad(actions, (0, 1))
        read = self.embed_action(actions), self.embed_return_to_go(returns_to_go), self.embed_state(states)
        tokens = torch.stack(read, -2)
        if self.cfg.embed_act == "tanh":
            tokens = tokens.tanh_()
        before = timesteps if action_timesteps is None else action_timesteps
        times = torch.stack((before, timesteps, timesteps), -1)
        tokens = self.embed_ln(tokens.add_(F.embedding(times, self.timestep_table)))
        if self.position_table is not None and self.cfg.position == "constant":
            tokens = tokens + self.position_table[0]
        return tokens

    @property
    def first_width(self) -> int:
        """How many numbers a token has in what ``first`` gives."""
        return self.cfg.d_model * (1 if self.cfg.n_layers == 1 else 3)

    def first(
        self, x: Float[Tensor, "batch token d_model"], changes: RowChanges = NONE
    ) -> Float[Tensor, "batch token first_width"]:
        """What the first block's attention needs of each token, side by side; in memory of its own."""
        return torch.cat(tuple(self._read(0, x, changes)), -1)

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
        first: Float[Tensor, "batch token first_width"],
        mask: Float[Tensor, "batch_or_1 1 token token"],
        changes: RowChanges = NONE,
    ) -> Float[Tensor, "batch d_model"]:
        """The residual stream after the last block, at the last token only.

        Args:
            x: the tokens of a window, the last action's left out.
            first: ``first(x)``.
            mask: added to attention scores: 0 where a token (row) attends to another (column), ``-inf`` elsewhere.
            changes: of each row.
        """
        composed = isinstance(self.blocks[0].attn, Composed)
        for l in range(self.cfg.n_layers):
            read = self._read(l, x, changes) if l else _thirds(first, self.cfg.d_model) if composed else (first,)
            attend = self._attend_last if l == self.cfg.n_layers - 1 else self._attend
            x = self._mlp(l, attend(l, x, read, mask, changes), changes)
        return x[:, -1]

    def action(self, hidden: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch act_dim"]:
        """The action, from what ``hidden`` returns for a window that ends with a state."""
        action = self.predict_action(self.ln_final(hidden))
        return torch.tanh(action) if self.cfg.action_tanh else action

    def terms(self, changes: Sequence[Change]) -> dict[Product, list[Term]]:
        """What changes of weights add to this model's products, in its own type and on its device."""
        found: dict[Product, list[Term]] = {}
        # Edits come on the CPU, and some terms multiply them by this model's weights.
        changes = [c._replace(left=c.left.to(self.device), right=c.right.to(self.device)) for c in changes]
        for l in range(self.cfg.n_layers):
            neurons = neurons_of(self.cfg, l, self.device)
            for name, term in terms_of_block(self.cfg, l, self._attention[l], changes, neurons):
                found.setdefault((l, name), []).append(term.to(self.predict_action.weight))
        return found

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory that is written at every step: new memory costs as much as a small product."""
        key = name, torch.Size(shape)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(shape, dtype=self.dtype, device=self.device)
        return self._buffers[key]

    def _read(self, l: int, x: Tensor, changes: RowChanges) -> Sequence[Tensor]:
        """What the attention of block ``l`` needs of each token.

        Queries, keys and values side by side; or, composed, ``h``, ``h W_QK`` and ``h W_OV``; in the last block ``h``.
        """
        block, d = self.blocks[l], self.cfg.d_model
        h = (block.ln1(x) if self.cfg.normalization == "pre" else x).contiguous()
        if isinstance(block.attn, Separate):
            qkv = block.attn.qkv.into(self._buffer("qkv", (*h.shape[:2], 3 * d)), h)
            changes.add((l, "qkv"), h, qkv)
            return (qkv,)
        if l == self.cfg.n_layers - 1 or block.attn.both is None:
            return (h,)
        both = block.attn.both.into(self._buffer("both", (*h.shape[:2], 2 * d)), h)
        query, gives = both[..., :d], both[..., d:]
        changes.add((l, "qk"), h, query)
        changes.add((l, "ov"), h, gives)
        return h, query, gives

    def _attend(self, l: int, x: Tensor, read: Sequence[Tensor], mask: Tensor, changes: RowChanges) -> Tensor:
        """The stream after the attention of a block that is not the last: ``[batch, token, d_model]``, not ``x``'s own
        memory in the first block."""
        block, (rows, n, d) = self.blocks[l], x.shape
        if isinstance(block.attn, Composed):
            h, query, gives = read
            scores = self._buffer("scores", (rows, n, n))
            torch.baddbmm(mask[:, 0], query, h.transpose(1, 2), alpha=block.scale, out=scores)
            weights = torch.softmax(scores, -1)
            out = self._buffer("stream", (rows, n, d))
            torch.baddbmm(x, weights, gives, out=out)
        else:
            heads = self.cfg.n_heads
            q, k, v = read[0].view(rows, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4).unbind()
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=block.scale)
            z = z.transpose(1, 2).reshape(rows, n, d)
            out = block.attn.out(z)
            changes.add((l, "out"), z, out)
            out = out.add_(x)
        return block.ln1(out) if self.cfg.normalization == "post" else out

    def _attend_last(self, l: int, x: Tensor, read: Sequence[Tensor], mask: Tensor, changes: RowChanges) -> Tensor:
        """The last token of the stream after the attention of the last block, ``[batch, 1, d_model]``."""
        block, (rows, _, d), heads = self.blocks[l], x.shape, self.cfg.n_heads
        assert isinstance(block.attn, Composed)
        (h,) = read
        last = h[:, -1:].contiguous()
        query = block.attn.qk(last)
        changes.add((l, "qk"), last, query)
        scores = torch.baddbmm(mask[:, 0, -1:], query.view(rows, heads, d), h.transpose(1, 2), alpha=block.scale)
        seen = torch.bmm(torch.softmax(scores, -1), h).view(rows, 1, heads * d)
        gives = block.attn.ov(seen)
        changes.add((l, "ov"), seen, gives)
        out = x[:, -1:] + gives
        return block.ln1(out) if self.cfg.normalization == "post" else out

    def _mlp(self, l: int, x: Tensor, changes: RowChanges) -> Tensor:
        """The stream after the MLP, ``[batch, token, d_model]``; ``x`` is lost."""
        block, flat = self.blocks[l], x.view(-1, x.shape[-1])
        # Not ``x``'s own memory, to which the parts add in turn.
        h = block.ln2(x) if self.cfg.normalization == "pre" else self._buffer("read", x.shape).copy_(x)
        read = h.view(flat.shape)
        for number, part in enumerate(block.mlp):
            shape = *x.shape[:2], len(part.write_out)
            inner = self._buffer("inner", shape)
            if part.gate is None:
                part.write_in.into(inner, h)
                changes.add((l, f"W_in.{number}"), h, inner)
                inner = self._activate(inner)
            else:
                gate = self._buffer("gate", shape)
                torch.mm(read, part.gate, out=gate.view(len(flat), -1))
                changes.add((l, f"W_gate.{number}"), h, gate)
                torch.mm(read, part.write_in.weight, out=inner.view(len(flat), -1))
                changes.add((l, f"W_in.{number}"), h, inner)
                inner.mul_(self._activate(gate)).add_(part.write_in.bias)
            flat.addmm_(inner.view(len(flat), -1), part.write_out)
            changes.add((l, f"W_out.{number}"), inner, x)
        flat.add_(block.mlp_bias)
        return block.ln2(x) if self.cfg.normalization == "post" else x

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


def _thirds(x: Tensor, d: int) -> Sequence[Tensor]:
    """The parts of ``d`` numbers that lie side by side."""
    return [x[..., start : start + d] for start in range(0, x.shape[-1], d)]


def additive_mask(real: Bool[Tensor, "batch token"], dtype: torch.dtype) -> Float[Tensor, "batch 1 token token"]:
    """The attention mask of ``hidden``: causal and without padding, given which tokens are ``real [batch, token]``.

    A padding token attends to itself: a row without any token to attend to would be NaN and would spread.
    """
    n = real.shape[-1]
    causal = torch.ones(n, n, dtype=torch.bool, device=real.device).tril()
    allowed = (real[:, None, None, :] & causal) | torch.eye(n, dtype=torch.bool, device=real.device)
    return torch.zeros(allowed.shape, dtype=dtype, device=real.device).masked_fill_(~allowed, float("-inf"))
