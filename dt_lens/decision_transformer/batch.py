"""What a decision transformer takes: a check that a batch fits, and a random one."""

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
    attention_mask: Tensor | None,
) -> None:
    """Raise ``DtLensError`` for a tensor whose shape does not fit the others or the model, or an index beyond a table.

    ``states`` are not looked at when ``None``: a state encoder knows its own.
    """
    if timesteps.ndim != 2:
        raise DtLensError(f"timesteps has shape {list(timesteps.shape)}; this model wants [batch, step].")
    batch_step = list(timesteps.shape)
    by_id = not actions.is_floating_point()
    shapes = {
        "states": (states, [*batch_step, cfg.state_dim]),
        "actions": (actions, batch_step if by_id else [*batch_step, cfg.act_dim]),
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
        _require_rows("action ids", actions, cfg.act_dim)


def _require_rows(what: str, index: Tensor, rows: int) -> None:
    # A row that a table has not is an error of its own kind on each device, and on some a late one.
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

    Tensors have ``like``'s type and device; actions of a discrete model are one-hot.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = min(cfg.n_ctx, cfg.max_ep_len, cfg.n_position // 3 if cfg.position == "learned" else cfg.n_ctx, 8)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(like.device, like.dtype)

    actions = normal(4, steps, cfg.act_dim)
    if cfg.discrete_actions:
        actions = F.one_hot(actions.argmax(-1), cfg.act_dim).to(like.dtype)
    starts = torch.randint(cfg.max_ep_len - steps + 1, (4, 1), generator=generator)
    mask = torch.ones(4, steps, dtype=torch.long)
    mask[1, : steps // 3] = 0
    return {
        "states": normal(4, steps, *state_shape),
        "actions": actions,
        "returns_to_go": normal(4, steps, 1),
        "timesteps": (starts + torch.arange(steps)).to(like.device),
        "attention_mask": mask.to(like.device),
    }
