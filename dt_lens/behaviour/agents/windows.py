"""Policies over a batch of episodes: each row keeps its own window of the last ``context`` steps.

Both policies here work on full windows, padded on the left, whatever the rows' ages, so that the arithmetic of a row
does not depend on how old its neighbours are. The padding is masked; or it is visible, as some code bases train: states
of zero after normalisation, the padding action, the episode's first return-to-go, and timestep 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dt_lens.decision_transformer.changes import NONE, Change, Product, RowChanges, Term
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import Padding
from dt_lens.decision_transformer.policy import ActingModel, additive_mask
from dt_lens.lens.forward_mode import flushing_denormals

__all__ = ["SlidingPolicy", "WindowPolicy"]

SLACK = 32  # steps that a window slides on in its memory before it is moved back to the start
ALIGNED = 64  # bytes; a window that begins elsewhere in memory might be rounded otherwise


def _by_row(alone: bool, function: Callable[..., Tensor], changes: RowChanges, *rows: Tensor) -> Tensor:
    """``function`` of all rows at once, or of each alone; in memory of its own, since alignment can change rounding."""
    if not alone:
        return function(changes, *rows)
    each = (function(changes.row(i), *(r[i : i + 1].clone() for r in rows)) for i in range(len(rows[0])))
    return torch.cat(list(each))


def _no_action(cfg: HookedDecisionTransformerConfig, like: Tensor) -> Tensor:
    """``[width, n_actions]``: the padding action for every row, zeros for a model that has none."""
    nothing = torch.zeros_like(like)
    if cfg.action_padding:
        nothing[:, -1] = 1
    return nothing


class SlidingPolicy:
    """A policy on an ``ActingModel``: what a token is before attention is computed once, when it enters the window.

    Each row acts with low-rank changes of the weights of its own, those of the arm that it was restarted with.

    Args:
        model: the weights.
        context: steps in a window.
        width: rows.
        alone: compute each row by itself.
        padding: whether the model sees what stands before the first step.
        arms: the changes of each arm, by its number; without any, arm 0 has none. Read when an arm begins.

    Raises:
        DtLensError: when windows of ``context`` steps do not fit the model's position table.
    """

    def __init__(
        self,
        model: ActingModel,
        context: int,
        width: int,
        *,
        alone: bool = False,
        padding: Padding = "mask",
        arms: Mapping[int, Sequence[Change]] | None = None,
    ) -> None:
        self.model, self.context, self.width, self.alone = model, context, width, alone
        self._visible = padding == "visible"
        # Tokens enter by threes: the action just taken, the return-to-go, the state. The model acts on all but the
        # oldest token. With learned positions what attention reads of a token changes as the token slides.
        self._keeps_first = model.cfg.position != "learned"
        features = model.cfg.d_model + (model.first_width if self._keeps_first else 0)
        self._slack = 0 if features * model.dtype.itemsize % ALIGNED else SLACK
        size = width, 3 * (context + self._slack), features
        self._memory = torch.zeros(size, dtype=model.dtype, device=model.device)
        self._start = 0  # the step of the memory with which the window begins
        self._last_timesteps = torch.zeros(width, dtype=torch.long, device=model.device)
        self._age = [0] * width
        model.place(self._memory[:, 1 : 3 * context, : model.cfg.d_model])  # raises now, not at the first step
        self._by_age = _masks(context, model.dtype, model.device)
        self._full = self._by_age[-1:]
        self._masks = self._full.repeat(width, 1, 1, 1)
        self._arms = {0: ()} if arms is None else arms
        self._terms: list[Mapping[Product, Sequence[Term]]] = [{}] * width
        self._changes: RowChanges | None = NONE

    def restart(self, row: int, arm: int = 0) -> None:
        """A new episode begins in ``row``, with the changes of ``arm``; its window is empty."""
        self._age[row] = 0
        changes = self._arms[arm]
        if changes or self._terms[row]:
            self._terms[row], self._changes = self.model.terms(changes), None

    def keep(self, rows: Sequence[int]) -> None:
        """Narrow the batch to ``rows``, in that order."""
        index = torch.tensor(rows, device=self.model.device)
        self._memory, self._masks = self._memory[index], self._masks[index]
        self._last_timesteps = self._last_timesteps[index]
        self._age = [self._age[row] for row in rows]
        self._terms, self._changes = [self._terms[row] for row in rows], None
        self.width = len(rows)

    @torch.inference_mode()
    @flushing_denormals()
    def act(
        self,
        states: Float[Tensor, "width state_dim"],
        returns_to_go: Float[Tensor, "width 1"],
        timesteps: Int[Tensor, " width"],
        previous_actions: Float[Tensor, "width act_dim"],
    ) -> Float[Tensor, "width act_dim"]:
        """The rows' actions. ``previous_actions`` are those taken one step earlier; ignored in a new episode."""
        model = self.model
        if self._changes is None:
            self._changes = RowChanges(self._terms, stacked=model.device.type != "cpu")
        returns, states, actions = (a.to(model.device, model.dtype) for a in (returns_to_go, states, previous_actions))
        # Not timesteps - 1: beyond the end of the timestep table its last row repeats.
        before, self._last_timesteps = self._last_timesteps, timesteps.to(model.device, copy=True)
        if self._visible and 0 in self._age:
            actions, before = self._pad(returns, states, actions, before)
        self._enter(self._by_row(self._embed, returns, states, actions, self._last_timesteps, before))
        masks = self._full
        if min(self._age) < self.context:
            for row, age in enumerate(self._age):
                if age < self.context:
                    self._age[row] = age + 1
                    if not self._visible:
                        self._masks[row] = self._by_age[age]
            masks = self._masks
        if self.alone:
            masks = masks.expand(self.width, -1, -1, -1)
        return self._by_row(self._actions, self._window, masks)

    @property
    def _window(self) -> Tensor:
        """``[width, 3 * context, features]``, the last ``context`` steps of each row."""
        return self._memory[:, 3 * self._start : 3 * (self._start + self.context)]

    def _enter(self, new: Float[Tensor, "width 3 features"]) -> None:
        """The windows slide on by one step."""
        if self._start == self._slack:
            self._memory[:, : 3 * (self.context - 1)] = self._window[:, 3:].clone()
            self._start = -1
        self._start += 1
        self._window[:, -3:] = new

    def _by_row(self, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        return _by_row(self.alone, function, self._changes or NONE, *rows)

    def _pad(self, returns: Tensor, states: Tensor, actions: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Fill the windows of rows that begin with padding; their previous actions and timesteps become padding too."""
        fresh = torch.tensor([age == 0 for age in self._age], device=self.model.device)
        actions = F.pad(actions, (0, self.model.cfg.n_actions - actions.shape[-1]))
        nothing, start = _no_action(self.model.cfg, actions), torch.zeros_like(before)
        # For all rows, like every other step: a batch of another width might round differently.
        padding = self._by_row(self._embed, returns, torch.zeros_like(states), nothing, start, start)
        self._window[fresh] = padding[fresh].repeat(1, self.context, 1)
        return torch.where(fresh[:, None], nothing, actions), torch.where(fresh, start, before)

    def _embed(
        self,
        changes: RowChanges,
        returns_to_go: Tensor,
        states: Tensor,
        actions: Tensor,
        timesteps: Tensor,
        before: Tensor,
    ) -> Tensor:
        new = self.model.embed(returns_to_go, states, actions, timesteps, action_timesteps=before)
        return torch.cat((new, self.model.first(new, changes)), dim=-1) if self._keeps_first else new

    def _actions(self, changes: RowChanges, tokens: Tensor, masks: Tensor) -> Tensor:
        model, d = self.model, self.model.cfg.d_model
        x = model.place(tokens[:, 1:, :d])
        first = tokens[:, 1:, d:] if self._keeps_first else model.first(x, changes)
        return model.action(model.hidden(x, first, masks, changes))


@functools.lru_cache(maxsize=8)
def _masks(context: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "context 1 token token"]:
    """The masks of windows of which 1, 2, ... ``context`` steps are no padding."""
    tokens = 3 * context - 1
    places, real = (torch.arange(start, stop, device=device) for start, stop in ((0, tokens), (1, context + 1)))
    return additive_mask(places >= tokens - (3 * real[:, None] - 1), dtype)


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
    @flushing_denormals()
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
