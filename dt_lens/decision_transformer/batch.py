"""Batches for a decision transformer: a check that one fits the model, and a random one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.errors import DtLensError

__all__ = ["random_batch", "require_batch"]


def require_batch(
    cfg: HookedDecisionTransformerConfig,
    states: Tensor | None,
    actions: Tensor,
    returns_to_go: Tensor,
    timesteps: Tensor,
    attention_mask: Tensor | None = None,
    normalised: bool = False,
) -> None:
    """Raise ``DtLensError`` for a tensor whose shape does not fit the others or the model, or an index beyond a table.

    Pass ``states=None`` for a model with a state encoder, which knows its own shapes. ``actions`` may lack the last
    step's action, which has not been taken yet. Whole numbers as ``states`` stand for one-hot ones, which a model that
    reads ``normalised`` states does not read.
    """
    if timesteps.ndim != 2:
        raise DtLensError(f"timesteps has shape {list(timesteps.shape)}; this model wants [batch, step].")
    batch_step = list(timesteps.shape)
    by_id = not actions.is_floating_point()
    states_by_id = states is not None and not states.is_floating_point()
    if states_by_id and normalised:
        raise DtLensError(
            "states are whole numbers, which stand for one-hot states as they are, and this model reads normalised "
            "states (its facts have a state_mean); give vectors, normalised as in training."
        )
    acted = batch_step
    if actions.ndim > 1 and actions.shape[1] == batch_step[1] - 1:
        acted = [batch_step[0], batch_step[1] - 1]
    width = cfg.n_actions if list(actions.shape[2:]) == [cfg.n_actions] else cfg.act_dim  # one-hot padding, or none
    shapes = {
        "states": (states, batch_step if states_by_id else [*batch_step, cfg.state_dim]),
        "actions": (actions, acted if by_id else [*acted, width]),
        "returns_to_go": (returns_to_go, [*batch_step, 1]),
        "attention_mask": (attention_mask, batch_step),
    }
    for name, (tensor, wanted) in shapes.items():
        if tensor is not None and list(tensor.shape) != wanted:
            raise DtLensError(
                f"{name} has shape {list(tensor.shape)}; with timesteps of shape {batch_step} this model wants "
                f"{wanted}."
            )
    _require_rows("timesteps", timesteps, cfg.max_ep_len)
    if by_id:
        _require_rows("action ids", actions, cfg.n_actions)
    if states is not None and states_by_id:
        _require_rows("state ids", states, cfg.state_dim)


def _require_rows(what: str, index: Tensor, rows: int) -> None:
    # An index beyond a table fails differently on every device, and on some of them late.
    if index.is_floating_point():
        raise DtLensError(f"{what} are {str(index.dtype).removeprefix('torch.')}; they must be whole numbers.")
    if index.numel() and not torch.compiler.is_compiling():
        low, high = (int(i) for i in index.aminmax())
        if low < 0 or high >= rows:
            raise DtLensError(f"{what} run from {low} to {high}; this model has rows 0 to {rows - 1} for them.")


def random_batch(
    cfg: HookedDecisionTransformerConfig, state_shape: tuple[int, ...], like: Tensor, seed: int
) -> dict[str, Any]:
    """Four windows of up to eight steps, one with padding: standard normal inputs at random times of an episode.

    One window is at the start of the longest episode and one at its end.

    Tensors have ``like``'s type and device. Actions of a discrete model are one-hot; where the model has a padding
    action, some are that. Where positions are so few that one more step fits without its action, the last action is
    left out, and so is the mask, since no step could be padding.
    """
    generator = torch.Generator().manual_seed(seed)
    most = min(cfg.n_ctx, cfg.max_ep_len, 8, cfg.n_position if cfg.position == "step" else cfg.n_ctx)
    steps = min(most, cfg.n_position // 3) if cfg.position == "learned" else most
    short = steps < min(3, most) and steps < (cfg.n_position + 1) // 3
    steps += short

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(like.device, like.dtype)

    actions = normal(4, steps, cfg.n_actions)
    if cfg.discrete_actions:
        actions = F.one_hot(actions.argmax(-1), cfg.n_actions).to(like.dtype)
    starts = torch.randint(cfg.max_ep_len - steps + 1, (4, 1), generator=generator)
    # The ends of the table, where an adapter that counts from 1, or backwards, errs.
    starts[0], starts[2] = 0, cfg.max_ep_len - steps
    mask = torch.ones(4, steps, dtype=torch.long)
    mask[1, : steps // 3] = 0
    batch = {
        "states": normal(4, steps, *state_shape),
        "actions": actions[:, : steps - short],
        "returns_to_go": normal(4, steps, 1),
        "timesteps": (starts + torch.arange(steps)).to(like.device),
        "attention_mask": mask.to(like.device),
    }
    if short:
        del batch["attention_mask"]
    return batch
