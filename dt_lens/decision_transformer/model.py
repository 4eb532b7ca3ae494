"""A decision transformer with TransformerLens's hook points, in one file to read from top to bottom.

Chen et al., "Decision Transformer: Reinforcement Learning via Sequence Modeling" (2021). A step of an episode is three
tokens, (return-to-go, state, action); a causal transformer reads them in order, and the action is predicted from the
state's token. Weights have TransformerLens's names and orientation: ``y = x @ W + b`` always, heads first.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dt_lens.arguments import require_offers
from dt_lens.decision_transformer.attribution import ActionAttribution
from dt_lens.decision_transformer.batch import random_batch, require_batch
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.embeddings import decision_transformer_embeddings
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.decision_transformer.sharing import SharingModule
from dt_lens.errors import DtLensError
from dt_lens.lens.embeddings import EmbeddingRegistry
from dt_lens.lens.hooks import HookPoint, copy_edits
from dt_lens.lens.in_place import seen
from dt_lens.lens.matrices import Structure

__all__ = ["DecisionTransformerOutput", "HookedDecisionTransformer"]


@dataclass(frozen=True)
class DecisionTransformerOutput:
    """What a forward pass returns; the names are Hugging Face's."""

    # The next state and return-to-go, read off the action's token; None if the model has no such head.
    state_preds: Float[Tensor, "batch acted state_dim"] | None
    action_preds: Float[Tensor, "batch step act_dim"]  # this step's action, read off the state's token
    return_preds: Float[Tensor, "batch acted 1"] | None
    last_hidden_state: Float[Tensor, "batch token d_model"]


def activation(name: str, x: Tensor) -> Tensor:
    """The MLP's nonlinearity by its name in the configuration."""
    match name:
        case "relu":
            return F.relu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "silu":
            return F.silu(x)
        case "tanh":
            return torch.tanh(x)
    raise DtLensError(f"Unknown activation {name!r}.")


def _parameter(*shape: int, std: float = 0.02) -> nn.Parameter:
    drawn = std and torch.get_default_device().type != "meta"  # to draw there imports torch's compiler
    return nn.Parameter(torch.randn(*shape) * std if drawn else torch.zeros(*shape))


class Linear(nn.Module):
    """``y = x @ W + b`` with ``W [d_in, d_out]``."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.W = _parameter(d_in, d_out)
        self.b = _parameter(d_out, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W.T, self.b)


class Table(nn.Module):
    """Rows ``W [n, d_model]``, looked up by an integer index."""

    def __init__(self, n: int, d_model: int) -> None:
        super().__init__()
        self.W = _parameter(n, d_model)

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.W)


class Embed(Linear):
    """States or actions ``[..., n]``, one-hot or of any numbers; or whole numbers ``[...]``, whose rows are looked up.

    The last row of actions is the padding's, if the model has one; one-hot actions may leave it out.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return F.embedding(x.long(), self.W) + self.b
        return F.linear(x, self.W[: x.shape[-1]].T, self.b)


class LayerNorm(nn.Module):
    """``(x - mean) / hook_scale * w + b``, with the normalised vector before ``w`` and ``b`` at ``hook_normalized``."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(d_model))
        self.b = nn.Parameter(torch.zeros(d_model))
        self.eps = eps
        self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        if not (self.hook_scale.has_hooks() or self.hook_normalized.has_hooks()):
            return F.layer_norm(x, self.w.shape, self.w, self.b, self.eps)
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))  # as torch's own does
        x = x - x.mean(-1, keepdim=True)
        scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return (self.hook_normalized(x / scale) * self.w + self.b).to(dtype)


class Attention(nn.Module):
    """Causal multi-head attention; scores and pattern are computed explicitly only if they are hooked."""

    def __init__(self, cfg: HookedDecisionTransformerConfig, layer: int) -> None:
        super().__init__()
        shape = (cfg.n_heads, cfg.d_model, cfg.d_head)
        self.W_Q, self.W_K, self.W_V = _parameter(*shape), _parameter(*shape), _parameter(*shape)
        self.b_Q, self.b_K, self.b_V = (_parameter(cfg.n_heads, cfg.d_head, std=0.0) for _ in range(3))
        # GPT-2's initialisation: weights that write to the stream start smaller the more of them there are.
        self.W_O = _parameter(cfg.n_heads, cfg.d_head, cfg.d_model, std=0.02 / (2 * cfg.n_layers) ** 0.5)
        self.b_O = _parameter(cfg.d_model, std=0.0)
        self.scale, self.dropout = cfg.attn_scale(layer), cfg.attn_dropout
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z, self.hook_result = HookPoint(), HookPoint()

    def _project(self, x: Tensor, W: Tensor, b: Tensor) -> Float[Tensor, "batch token n_heads d_head"]:
        if x.ndim == 4:  # each head reads a copy of its own
            return einsum(x, W, "batch token head d_model, head d_model e -> batch token head e") + b
        flat = F.linear(x, rearrange(W, "head d_model d_head -> (head d_head) d_model"), rearrange(b, "h e -> (h e)"))
        return rearrange(flat, "batch token (head d_head) -> batch token head d_head", head=W.shape[0])

    def forward(
        self, x: Float[Tensor, "batch token *head d_model"], allowed: Bool[Tensor, "batch 1 query key"] | None
    ) -> Float[Tensor, "batch token d_model"]:
        q = self.hook_q(self._project(x, self.W_Q, self.b_Q))
        k = self.hook_k(self._project(x, self.W_K, self.b_K))
        v = self.hook_v(self._project(x, self.W_V, self.b_V))
        dropout = self.dropout if self.training else 0.0
        if self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks():
            scores = einsum(q, k, "batch query head e, batch key head e -> batch head query key") * self.scale
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).tril()
            scores = scores.masked_fill(~(causal if allowed is None else allowed), float("-inf"))
            pattern = self.hook_pattern(F.softmax(self.hook_attn_scores(scores), dim=-1))
            pattern = F.dropout(pattern, dropout)
            z = einsum(pattern, v, "batch head query key, batch key head e -> batch query head e")
        else:
            q, k, v = (rearrange(a, "batch token head e -> batch head token e") for a in (q, k, v))
            z = F.scaled_dot_product_attention(
                q, k, v, attn_mask=allowed, is_causal=allowed is None, dropout_p=dropout, scale=self.scale
            )
            z = rearrange(z, "batch head token e -> batch token head e")
        z = self.hook_z(z)
        if self.hook_result.has_hooks():
            result = einsum(z, self.W_O, "batch token head e, head e d_model -> batch token head d_model")
            return self.hook_result(result).sum(-2) + self.b_O
        return F.linear(
            rearrange(z, "batch token head e -> batch token (head e)"),
            rearrange(self.W_O, "head e d_model -> d_model (head e)"),
            self.b_O,
        )


class MLP(nn.Module):
    """``act(x @ W_in + b_in) @ W_out + b_out``, or gated: ``(act(x @ W_gate) * (x @ W_in) + b_in) @ W_out + b_out``."""

    def __init__(self, cfg: HookedDecisionTransformerConfig) -> None:
        super().__init__()
        self.W_in = _parameter(cfg.d_model, cfg.d_mlp)
        self.b_in = _parameter(cfg.d_mlp, std=0.0)
        self.W_out = _parameter(cfg.d_mlp, cfg.d_model, std=0.02 / (2 * cfg.n_layers) ** 0.5)
        self.b_out = _parameter(cfg.d_model, std=0.0)
        self.act_fn, self.gated = cfg.act_fn, cfg.gated_mlp
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()
        if cfg.gated_mlp:
            self.W_gate = _parameter(cfg.d_model, cfg.d_mlp)
            self.hook_pre_linear = HookPoint()

    def forward(self, x: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_model"]:
        if self.gated:
            gate = activation(self.act_fn, self.hook_pre(F.linear(x, self.W_gate.T)))
            post = gate * self.hook_pre_linear(F.linear(x, self.W_in.T)) + self.b_in
        else:
            post = activation(self.act_fn, self.hook_pre(F.linear(x, self.W_in.T, self.b_in)))
        post = self.hook_post(post)
        return F.linear(post, self.W_out.T, self.b_out)


class Block(nn.Module):
    """Attention and an MLP, each added to the residual stream; LayerNorms before each, after each sum, or nowhere."""

    def __init__(self, cfg: HookedDecisionTransformerConfig, layer: int) -> None:
        super().__init__()
        self.normalization, self.dropout = cfg.normalization, cfg.resid_dropout
        self.ln1, self.ln2 = (
            nn.Identity() if cfg.normalization == "none" else LayerNorm(cfg.d_model, cfg.eps) for _ in range(2)
        )
        self.attn = Attention(cfg, layer)
        self.mlp = MLP(cfg)
        self.hook_resid_pre, self.hook_resid_mid, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_in, self.hook_attn_out, self.hook_mlp_in, self.hook_mlp_out = (HookPoint() for _ in range(4))

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        x = self.hook_resid_pre(x)
        if self.normalization == "post":
            x = self.hook_resid_mid(self.ln1(x + self._attn_out(self._attn_in(x), allowed)))
            return self.hook_resid_post(self.ln2(x + self._mlp_out(self._mlp_in(x))))
        x = self.hook_resid_mid(x + self._attn_out(self.ln1(self._attn_in(x)), allowed))
        return self.hook_resid_post(x + self._mlp_out(self.ln2(self._mlp_in(x))))

    def _attn_in(self, x: Tensor) -> Tensor:
        """The stream as attention reads it: ``[batch, token, d_model]``, or with a head's axis if a hook changes it."""
        if not self.hook_attn_in.has_hooks():
            return x
        copies = repeat(x, "n t d -> n t head d", head=self.attn.W_Q.shape[0]).clone()
        given = seen(self.hook_attn_in, copies)
        return x if given is copies else given

    def _mlp_in(self, x: Tensor) -> Tensor:
        return self.hook_mlp_in(x.clone()) if self.hook_mlp_in.has_hooks() else x

    def _attn_out(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        return self.hook_attn_out(F.dropout(self.attn(x, allowed), self.dropout, self.training))

    def _mlp_out(self, x: Tensor) -> Tensor:
        return self.hook_mlp_out(F.dropout(self.mlp(x), self.dropout, self.training))


class HookedDecisionTransformer(ActionAttribution, SharingModule):
    """A decision transformer whose every activation can be read and replaced.

    ``model(states=, actions=, returns_to_go=, timesteps=, attention_mask=)`` takes Hugging Face's keywords;
    ``run_with_cache`` and ``run_with_hooks`` are TransformerLens's, and so are the names: ``hook_embed_state``,
    ``hook_embed``, ``blocks.{l}.hook_resid_pre``, ``blocks.{l}.attn.hook_pattern``, ``blocks.{l}.mlp.hook_post``, ...

    Args:
        cfg: the shape and the options.
        state_encoder: any module that maps a batch of states to ``[batch, step, d_model]``; a linear map by default.
            If it reads anything but ``[batch, step, state_dim]``, its attribute ``state_shape`` is the shape of one
            state. ``image``, (channels, height, width), and ``pixels``, 255 if it reads 0 to 1, fit an environment's.

    Attributes:
        facts: what a rollout needs and weights do not hold: environment, normalisation, target returns, labels.
    """

    kind = "decision transformer"
    can_run = can_act = True

    def __init__(self, cfg: HookedDecisionTransformerConfig, state_encoder: nn.Module | None = None) -> None:
        require_offers(cfg, "cfg", "a HookedDecisionTransformerConfig", "d_model", "n_layers", "predicts")
        super().__init__()
        self.cfg = cfg
        d = cfg.d_model
        self.embed = nn.ModuleDict(
            {
                "return_to_go": Linear(1, d),
                "state": state_encoder or Embed(cfg.state_dim, d),
                "action": Embed(cfg.n_actions, d),
                "timestep": Table(cfg.max_ep_len, d),
            }
        )
        if cfg.position != "none":
            self.embed["position"] = Table(cfg.n_position, d)
        self.embed_ln = LayerNorm(d, cfg.embed_ln_eps) if cfg.embed_ln else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.ln_final = LayerNorm(d, cfg.eps) if cfg.final_ln else nn.Identity()
        sizes = {"return_to_go": 1, "state": cfg.state_dim, "action": cfg.act_dim}
        self.predict = nn.ModuleDict({name: Linear(d, n) for name, n in sizes.items() if name in cfg.predicts})
        self.hook_embed_return_to_go, self.hook_embed_state, self.hook_embed_action = (HookPoint() for _ in range(3))
        self.hook_embed_timestep, self.hook_embed = HookPoint(), HookPoint()
        if cfg.position != "none":
            self.hook_pos_embed = HookPoint()
        self.hook_final, self.hook_action_pre = HookPoint(), HookPoint()  # action_pre: before the tanh
        self.facts = RunFacts(context=cfg.n_ctx)
        self._embeddings: EmbeddingRegistry | None = None
        self._standard: dict[str, Tensor] = {}
        self.setup()

    @property
    def structure(self) -> Structure:
        """Blocks, heads, and which LayerNorm stands before which matrix."""
        return self.cfg.structure  # type: ignore[no-any-return]

    @property
    def embeddings(self) -> EmbeddingRegistry:
        """The model's labelled directions: ``state_in``, ``action_in``, ..., ``action_out``; yours to extend."""
        if self._embeddings is None:
            self._embeddings = self._fresh_embeddings()
            self._standard = {name: embedding.directions for name, embedding in self._embeddings.items()}
        elif self.cfg.embed_act != "none":
            self._weights_moved()  # directions behind a nonlinearity are copies, which do not follow the weights
        return self._embeddings

    def _fresh_embeddings(self) -> EmbeddingRegistry:
        return decision_transformer_embeddings(self.weights, self.cfg, self.facts, self.identity)

    def _weights_moved(self) -> None:
        # The standard directions are views of weights that have moved; labels and the user's own embeddings stay.
        if self._embeddings is None:
            return
        for name, fresh in self._fresh_embeddings().items():
            if name in self._embeddings and self._embeddings[name].directions is self._standard[name]:
                self._embeddings[name] = replace(fresh, labels=self._embeddings[name].labels)
                self._standard[name] = fresh.directions

    def probe(self, seed: int = 0) -> dict[str, Any]:
        """A small random batch, the same for the same seed."""
        shape = getattr(self.embed["state"], "state_shape", (self.cfg.state_dim,))
        return random_batch(self.cfg, shape, self.get_parameter("embed.return_to_go.W"), seed)

    def rows_read(self, batch: Mapping[str, Any]) -> dict[str, tuple[str, Tensor]]:
        """For each table the hook that shows what is looked up on ``batch``, and the rows that this should be."""
        times, steps = batch["timesteps"], batch["timesteps"].shape[1]
        when = times[:, -1:].expand(-1, steps) if self.cfg.timestep_of == "window" else times
        read = {"embed.timestep.W": ("hook_embed_timestep", when)}
        tokens = 2 * steps + batch["actions"].shape[1]
        n = {"constant": 1, "learned": tokens, "step": steps}.get(self.cfg.position)
        return read if n is None else {**read, "embed.position.W": ("hook_pos_embed", torch.arange(n))}

    def untrained(self, seed: int = 0) -> HookedDecisionTransformer:
        """A freshly initialised model of the same shape, the same for the same seed.

        In a state encoder of the user's own, every module that has ``reset_parameters`` is reset.
        """
        encoder = self.embed["state"]
        own = None if isinstance(encoder, Linear) else copy.deepcopy(encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for part in () if own is None else own.modules():
                reset: Any = getattr(part, "reset_parameters", None)
                if callable(reset):
                    reset()
            fresh = HookedDecisionTransformer(self.cfg, own)
        fresh.facts, fresh.assumed = self.facts, self.assumed
        return fresh.eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> HookedDecisionTransformer:
        """A copy with its own memory and without an original; edits in force are in force on the copy too."""
        encoder = self.embed["state"]
        own = None if isinstance(encoder, Linear) else copy.deepcopy(encoder, memo)
        with torch.device("meta"):
            copied = HookedDecisionTransformer(self.cfg, own)
        copied.adopt({name: weight.clone() for name, weight in self.weights.items()})
        copied.facts, copied.assumed = self.facts, self.assumed
        for parameter, mine in zip(copied.parameters(), self.parameters(), strict=True):
            parameter.requires_grad_(mine.requires_grad)
        copied.train(self.training)
        copy_edits(self, copied, memo)
        return copied

    def forward(
        self,
        states: Tensor,
        actions: Tensor,
        returns_to_go: Float[Tensor, "batch step 1"],
        timesteps: Int[Tensor, "batch step"],
        attention_mask: Tensor | None = None,
        rewards: Tensor | None = None,
        *,
        stop_at_layer: int | None = None,
    ) -> Any:
        """Predict actions, next states and next returns for every step of a batch of episode windows.

        Args:
            states: ``[batch, step, state_dim]``, one-hot ones also as ids ``[batch, step]``; or what the encoder takes.
            actions: ``[batch, step, act_dim]``, or integer ids ``[batch, step]``. The last step's may be missing, as
                when an agent is about to choose it; the predictions from its token are then missing too.
            returns_to_go: ``[batch, step, 1]``, in the units the model was trained in (divided by its return scale).
            timesteps: ``[batch, step]``, the step of the episode, from 0.
            attention_mask: ``[batch, step]``, nonzero for real steps and 0 for padding; all are real by default.
            rewards: unused, as in Hugging Face's model, which has it in its signature.
            stop_at_layer: end before this block, and give the stream ``[batch, token, d_model]`` that enters it.

        Raises:
            DtLensError: for a tensor whose size does not fit the model, or a timestep beyond its table.
        """
        flat, scaled = isinstance(self.embed["state"], Linear), self.facts.state_mean is not None
        require_batch(self.cfg, states if flat else None, actions, returns_to_go, timesteps, attention_mask, scaled)
        tokens = self._tokens(states, actions, returns_to_go, timesteps)
        allowed = None if attention_mask is None else self._allowed(attention_mask, tokens.shape[1])
        x = F.dropout(self._add_position(self.embed_ln(tokens)), self.cfg.embed_dropout, self.training)
        for block in self.blocks[: self._block(stop_at_layer)]:
            x = block(x, allowed)
        if stop_at_layer is not None:
            return x
        x = self.hook_final(self.ln_final(x))
        of_states, of_actions = x[:, 1::3], x[:, 2::3]
        action = self.hook_action_pre(self.predict["action"](of_states))
        heads = self.cfg.predicts
        return DecisionTransformerOutput(
            state_preds=self.predict["state"](of_actions) if "state" in heads else None,
            action_preds=torch.tanh(action) if self.cfg.action_tanh else action,
            return_preds=self.predict["return_to_go"](of_actions) if "return_to_go" in heads else None,
            last_hidden_state=x,
        )

    def _tokens(
        self, states: Tensor, actions: Tensor, returns_to_go: Tensor, timesteps: Tensor
    ) -> Float[Tensor, "batch token d_model"]:
        acted, steps = actions.shape[1], timesteps.shape[1]
        when = timesteps[:, -1:].expand(-1, steps) if self.cfg.timestep_of == "window" else timesteps
        time = self.hook_embed_timestep(self.embed["timestep"](when))
        if self.cfg.position == "step":
            time = time + self.hook_pos_embed(self._positions(steps, "steps"))
        action = self.hook_embed_action(self._embed("action", actions)) + time[:, :acted]
        kinds = (
            self.hook_embed_return_to_go(self._embed("return_to_go", returns_to_go)) + time,
            self.hook_embed_state(self._embed("state", states)) + time,
            action if acted == steps else F.pad(action, (0, 0, 0, 1)),
        )
        tokens = rearrange(list(kinds), "kind batch step d_model -> batch (step kind) d_model")
        return self.hook_embed(tokens if acted == steps else tokens[:, :-1])

    def _embed(self, kind: str, x: Tensor) -> Float[Tensor, "batch step d_model"]:
        module = self.embed[kind]
        # A state encoder of the user's own applies its own nonlinearity.
        return torch.tanh(module(x)) if self.cfg.embed_act == "tanh" and isinstance(module, Linear) else module(x)

    def _add_position(self, x: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_model"]:
        if self.cfg.position in ("none", "step"):
            return x
        n = 1 if self.cfg.position == "constant" else x.shape[1]
        return x + self.hook_pos_embed(self._positions(n, "tokens"))

    def _positions(self, n: int, what: str) -> Float[Tensor, "n d_model"]:
        if n > self.cfg.n_position:
            last = " or leave out the last action" if n == self.cfg.n_position + 1 and n % 3 == 0 else ""
            raise DtLensError(
                f"{n} {what} do not fit this model's {self.cfg.n_position} positions; give fewer steps{last}."
            )
        return self.get_parameter("embed.position.W")[:n]

    def _allowed(self, attention_mask: Tensor, n: int) -> Bool[Tensor, "batch 1 token token"]:
        real = repeat(attention_mask != 0, "batch step -> batch 1 1 (step kind)", kind=3)[..., :n]
        causal = torch.ones(n, n, dtype=torch.bool, device=real.device).tril()
        # A padding token attends to itself: a row without any token to attend to would be NaN and would spread.
        itself = torch.eye(n, dtype=torch.bool, device=real.device)
        return (real & causal) | itself
