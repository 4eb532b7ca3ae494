"""The whole model as a rollout's policy: slower than the lean one, and everything that is hooked happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["WindowPolicy"]


class WindowPolicy:
    """A batch of windows of raw inputs, given whole to the model at every step.

    Args:
        model: called with Hugging Face's keywords; its ``action_preds [width, context, act_dim]`` are read.
        context: steps looked back; windows are padded on the left and masked.
        width: rows.
        sizes: ``(state_dim, act_dim)``.
        like: a weight of the model, for its device and type.
    """

    def __init__(
        self, model: Callable[..., Any], context: int, width: int, sizes: tuple[int, int], like: Tensor
    ) -> None:
        self.model, self.context, self.width = model, context, width
        state_dim, act_dim = sizes
        self._states = like.new_zeros(width, context, state_dim)
        self._actions = like.new_zeros(width, context, act_dim)
        self._returns = like.new_zeros(width, context, 1)
        self._timesteps = like.new_zeros(width, context, dtype=torch.long)
        self._mask = like.new_zeros(width, context, dtype=torch.long)

    def _buffers(self) -> tuple[Tensor, ...]:
        return self._states, self._actions, self._returns, self._timesteps, self._mask

    def restart(self, row: int) -> None:
        """A new episode begins in ``row``; its window is empty."""
        for buffer in self._buffers():
            buffer[row] = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Narrow the batch to ``rows``, in that order."""
        index = torch.tensor(rows, device=self._mask.device)
        self._states, self._actions, self._returns, self._timesteps, self._mask = (b[index] for b in self._buffers())
        self.width = len(rows)

    @torch.no_grad()
    def act(self, states: Tensor, returns_to_go: Tensor, timesteps: Tensor, previous_actions: Tensor) -> Tensor:
        """The rows' actions ``[width, act_dim]``; arguments as for ``SlidingPolicy.act``."""
        self._actions[:, -1] = previous_actions.to(self._actions)
        self._actions.mul_(self._mask[..., None].to(self._actions.dtype))  # a new episode has no previous action
        for buffer in self._buffers():
            buffer.copy_(buffer.roll(-1, dims=1))
        self._states[:, -1] = states.to(self._states)
        self._returns[:, -1] = returns_to_go.to(self._returns)
        self._timesteps[:, -1] = timesteps.to(self._timesteps)
        self._actions[:, -1] = 0  # not taken yet
        self._mask[:, -1] = 1
        out = self.model(
            states=self._states,
            actions=self._actions,
            returns_to_go=self._returns,
            timesteps=self._timesteps,
            attention_mask=self._mask,
        )
        prediction: Tensor = out.action_preds[:, -1]
        return prediction
