"""How many episodes run side by side, and the guarantee that it does not show in their numbers.

A matrix product may round differently when the batch has another width: libraries choose their kernels by shape. A row
that acted among 8 must do to the last bit what it does among 13, or an outcome would depend on how many episodes were
asked for. So the width is only ever changed where this machine has just been seen not to care.
"""

from __future__ import annotations

import functools
import math

import torch

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.policy import ActingModel, full_mask

__all__ = ["CUDA_LANES", "LEAST_LANES", "MOST_LANES", "plan_lanes", "width_is_free"]

LEAST_LANES = 8  # narrower batches meet other kernels, and pay nearly as much
MOST_LANES = 16  # wider ones leave the processor's cache and gain nothing
CUDA_LANES = 128  # one width for everything: a GPU does not mind empty rows


def plan_lanes(episodes: int) -> int:
    """Lanes for ``episodes`` in one process, so that the last wave is as full as the others.

    >>> [plan_lanes(n) for n in (1, 8, 16, 25, 50, 1000)]
    [8, 8, 16, 13, 13, 16]
    """
    waves = math.ceil(episodes / MOST_LANES)
    return max(LEAST_LANES, math.ceil(episodes / waves))


def width_is_free(model: ActingModel, context: int, most: int) -> bool:
    """Whether a row's action has the same bits in every row of every batch from ``LEAST_LANES`` to ``most`` rows.

    Tried, not assumed: random windows go through every width once per process and shape, a few milliseconds each.
    """
    return _width_is_free(model.cfg, model.dtype, context, most)


@functools.lru_cache(maxsize=32)
def _width_is_free(cfg: HookedDecisionTransformerConfig, dtype: torch.dtype, context: int, most: int) -> bool:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    # Any weights of the same shapes meet the same kernels; these keep the residual stream near unit scale.
    model = ActingModel.random(cfg, dtype, generator)
    d, n = cfg.d_model, 3 * context - 1
    returns, states, actions = random(1, 1), random(1, cfg.state_dim), random(1, cfg.act_dim)
    x = random(1, n, d)
    seen: torch.Tensor | None = None
    with torch.inference_mode():
        for width in range(LEAST_LANES, most + 1):
            tokens = torch.stack(
                model.embed(
                    returns.expand(width, -1).contiguous(),
                    states.expand(width, -1).contiguous(),
                    actions.expand(width, -1).contiguous(),
                    torch.zeros(width, dtype=torch.long),
                ),
                dim=1,
            )
            new = model.first_qkv(tokens).flatten(1)
            window = x.expand(width, -1, -1).contiguous()
            acted = model.act(window, model.first_qkv(window), full_mask(width, n, dtype))
            both = torch.cat((new, acted), dim=1)
            seen = both[:1] if seen is None else seen
            if not torch.equal(both, seen.expand_as(both)):
                return False
    return True
