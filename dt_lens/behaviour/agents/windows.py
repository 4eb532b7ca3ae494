"""Policies over a batch of episodes: each row keeps its own window of the last ``context`` steps.

Both policies here work on full windows, padded on the left, whatever the rows' ages, so that the arithmetic of a row
does not depend on how old its neighbours are. The padding is masked; or it is visible, as some code bases train: states
of zero after normalisation, the padding action, the episode's first return-to-go, and timestep 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import Padding
from dt_lens.decision_transformer.policy import ActingModel, additive_mask

__all__ = ["SlidingPolicy", "WindowPolicy"]


def _by_row(alone: bool, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """``function`` of all rows at once, or of each alone; in memory of its own, since alignment can change rounding."""
    if not alone:
        return function(*rows)
    return torch.cat([function(*(r[i : i + 1].clone() for r in rows)) for i in range(len(rows[0]))])


def _no_action(cfg: HookedDecisionTransformerConfig, like: Tensor) -> Tensor:
    """``[width, n_actions]``: the padding action for every row, zeros for a model that has none."""
    nothing = torch.zeros_like(like)
    if cfg.action_padding:
        nothing[:, -1] = 1
    return nothing


class SlidingPolicy:
    """A policy on an ``ActingModel``: what a token is before attention is computed once, when it enters the window.

    Args:
        model: the weights.
        context: steps in a window.
        width: rows.
        alone: compute each row by itself.
        padding: whether the model sees what stands before the first step.

    Raises:
        DtLensError: when windows of ``context`` steps do not fit the model's position table.
    """

    def __init__(
        self, model: ActingModel, context: int, width: int, *, alone: bool = False, padding: Padding = "mask"
    ) -> None:
        self.model, self.context, self.width, self.alone = model, context, width, alone
        self._visible = padding == "visible"
        # Tokens enter by threes: the action just taken, the return-to-go, the state. The model acts on all but the
        # oldest token. With learned positions a token's queries, keys and values change as it slides.
        self._slides_qkv = model.cfg.position != "learned"
        features = model.cfg.d_model * (4 if self._slides_qkv else 1)
        self._tokens = torch.zeros(width, 3 * context, features, dtype=model.dtype, device=model.device)
        self._spare = torch.zeros_like(self._tokens)
        self._last_timesteps = torch.zeros(width, dtype=torch.long, device=model.device)
        self._age = [0] * width
        model.place(self._tokens[:, 1:, : model.cfg.d_model])  # raises now, not at the first step
        seen = torch.full((width, 3 * context - 1), self._visible, device=model.device)
        self._mask = additive_mask(seen, model.dtype)

    def restart(self, row: int, arm: int = 0) -> None:
        """A new episode begins in ``row``; its window is empty."""
        self._age[row] = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Narrow the batch to ``rows``, in that order."""
        index = torch.tensor(rows, device=self.model.device)
        self._tokens, self._mask = self._tokens[index], self._mask[index]
        self._spare = torch.zeros_like(self._tokens)
        self._last_timesteps = self._last_timesteps[index]
        self._age = [self._age[row] for row in rows]
        self.width = len(rows)

    @torch.inference_mode()
    def act(
        self,
        states: Float[Tensor, "width state_dim"],
        returns_to_go: Float[Tensor, "width 1"],
        timesteps: Int[Tensor, " width"],
        previous_actions: Float[Tensor, "width act_dim"],
    ) -> Float[Tensor, "width act_dim"]:
        """The rows' actions. ``previous_actions`` are those taken one step earlier; ignored in a new episode."""
        model = self.model
        returns, states, actions = (a.to(model.device, model.dtype) for a in (returns_to_go, states, previous_actions))
        # Not timesteps - 1: beyond the end of the timestep table its last row repeats.
        before, self._last_timesteps = self._last_timesteps, timesteps.to(model.device, copy=True)
        if self._visible and 0 in self._age:
            actions, before = self._pad(returns, states, actions, before)
        new = _by_row(self.alone, self._enter, returns, states, actions, self._last_timesteps, before)
        torch.cat((self._tokens[:, 3:], new), dim=1, out=self._spare)
        self._tokens, self._spare = self._spare, self._tokens
        for row, age in enumerate(self._age):
            if age < self.context:
                self._age[row] = age + 1
                if not self._visible:
                    self._open(row, 3 * (age + 1) - 1)
        return _by_row(self.alone, self._actions, self._tokens, self._mask)

    def _pad(self, returns: Tensor, states: Tensor, actions: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Fill the windows of rows that begin with padding; their previous actions and timesteps become padding too."""
        fresh = torch.tensor([age == 0 for age in self._age], device=self.model.device)
        actions = F.pad(actions, (0, self.model.cfg.n_actions - actions.shape[-1]))
        nothing, start = _no_action(self.model.cfg, actions), torch.zeros_like(before)
        # For all rows, like every other step: a batch of another width might round differently.
        padding = _by_row(self.alone, self._enter, returns, torch.zeros_like(states), nothing, start, start)
        self._tokens[fresh] = padding[fresh].repeat(1, self.context, 1)
        return torch.where(fresh[:, None], nothing, actions), torch.where(fresh, start, before)

    def _enter(
        self, returns_to_go: Tensor, states: Tensor, actions: Tensor, timesteps: Tensor, before: Tensor
    ) -> Tensor:
        parts = self.model.embed(returns_to_go, states, actions, timesteps, action_timesteps=before)
        new = torch.stack((parts[2], parts[0], parts[1]), dim=1)
        return torch.cat((new, self.model.first_qkv(new)), dim=-1) if self._slides_qkv else new

    def _actions(self, tokens: Tensor, mask: Tensor) -> Tensor:
        model, d = self.model, self.model.cfg.d_model
        x = model.place(tokens[:, 1:, :d])
        qkv = tokens[:, 1:, d:] if self._slides_qkv else model.first_qkv(x)
        return model.action(model.hidden(x, qkv, mask))

    def _open(self, row: int, n: int) -> None:
        """Unmask the last ``n`` tokens of ``row``."""
        tokens = self._mask.shape[-1]
        real = torch.arange(tokens, device=self._mask.device) >= tokens - n
        self._mask[row] = additive_mask(real[None], self._mask.dtype)[0]


class WindowPolicy:
    """A policy on the whole hooked model: slower than ``SlidingPolicy``, and every hook runs.

    Args:
        model: called with Hugging Face's keywords; its ``action_preds [width, context, act_dim]`` are read.
        cfg: its shape and options.
        context: steps in a window.
        width: rows.
        like: a weight of the model, for its device and type.
        padding: whether the model sees what stands before the first step.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        cfg: HookedDecisionTransformerConfig,
        context: int,
        width: int,
        like: Tensor,
        *,
        padding: Padding = "mask",
    ) -> None:
        self.model, self.cfg, self.width = model, cfg, width
        self._visible = padding == "visible"
        self._fresh = set(range(width)) if self._visible else set[int]()  # rows whose episode begins now
        # The action to come may be left out, and must be where the position table has no row for it.
        self._acted = context - 1 if cfg.position == "learned" and cfg.n_position < 3 * context else context
        self._states = like.new_zeros(width, context, cfg.state_dim)
        self._actions = like.new_zeros(width, context, cfg.n_actions if self._visible else cfg.act_dim)
        self._returns = like.new_zeros(width, context, 1)
        self._timesteps = like.new_zeros(width, context, dtype=torch.long)
        self._mask = like.new_zeros(width, context, dtype=torch.long)

    def _buffers(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self._states, self._actions, self._returns, self._timesteps, self._mask

    def restart(self, row: int, arm: int = 0) -> None:
        """A new episode begins in ``row``; its window is empty."""
        for buffer in self._buffers():
            buffer[row] = 0
        if self._visible:
            self._fresh.add(row)

    def keep(self, rows: Sequence[int]) -> None:
        """Narrow the batch to ``rows``, in that order."""
        index = torch.tensor(rows, device=self._mask.device)
        self._states, self._actions, self._returns, self._timesteps, self._mask = (b[index] for b in self._buffers())
        self._fresh = {new for new, old in enumerate(rows) if old in self._fresh}
        self.width = len(rows)

    @torch.no_grad()
    def act(self, states: Tensor, returns_to_go: Tensor, timesteps: Tensor, previous_actions: Tensor) -> Tensor:
        """The rows' actions ``[width, act_dim]``; arguments as for ``SlidingPolicy.act``."""
        self._actions[:, -1, : self.cfg.act_dim] = previous_actions.to(self._actions)
        self._actions.mul_(self._mask[..., None])  # a new episode has no previous action
        for row in self._fresh:
            self._actions[row] = _no_action(self.cfg, self._actions[row])
            self._returns[row] = returns_to_go[row].to(self._returns)
            self._mask[row] = 1
        self._fresh.clear()
        for buffer in self._buffers():
            buffer.copy_(buffer.roll(-1, dims=1))
        self._states[:, -1] = states.to(self._states)
        self._returns[:, -1] = returns_to_go.to(self._returns)
        self._timesteps[:, -1] = timesteps.to(self._timesteps)
        self._actions[:, -1] = 0  # not taken yet
        self._mask[:, -1] = 1
        out = self.model(
            states=self._states,
            actions=self._actions[:, : self._acted],
            returns_to_go=self._returns,
            timesteps=self._timesteps,
            attention_mask=self._mask,
        )
        prediction: Tensor = out.action_preds[:, -1]
        return prediction
