"""How many episodes run side by side, and the guarantee that this does not change their numbers.

A matrix product may round differently when the batch has another width, and even from row to row of one batch:
libraries choose their kernels by shape and treat the edges of a matrix apart. An episode must do among 8 what it does
among 13, and in the first row what it does in the last, to the last bit; otherwise its outcome would depend on the
number of episodes. So the shapes that a batch may have are tried on the machine before the first step, not assumed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import repeat

from dt_lens.decision_transformer.changes import NONE, Change, RowChanges
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.policy import ActingModel, acting_shapes, additive_mask

__all__ = ["CUDA_LANES", "LEAST_LANES", "MOST_LANES", "Arrangement", "arrange", "plan_lanes"]

LEAST_LANES = 8  # narrower batches use other kernels, and take nearly as long
MOST_LANES = 16  # wider ones leave the processor's cache and gain nothing
CUDA_LANES = 128  # one width for everything: a GPU does not mind empty rows
SMALL = 64  # below this d_model a window has so few numbers that rounding may agree by luck: try more of them
STREAMS = 1024  # residual streams whose actions are tried


def plan_lanes(episodes: int) -> int:
    """Lanes for ``episodes`` in one process, so that the last wave is as full as the others.

    >>> [plan_lanes(n) for n in (1, 8, 16, 25, 50, 1000)]
    [8, 8, 16, 13, 13, 16]
    """
    waves = math.ceil(episodes / MOST_LANES)
    return max(LEAST_LANES, math.ceil(episodes / waves))


class Arrangement(NamedTuple):
    """The shapes that a batch may have without changing any row's bits."""

    width: int
    least_width: int | None  # how narrow it may become at the end; never narrower than ``width`` where ``None``
    alone: bool  # whether every row must be computed by itself


def arrange(model: ActingModel, context: int, lanes: int) -> Arrangement:
    """The fastest arrangement of at most ``lanes`` rows in which no row's bits depend on the others.

    On a CPU any width from ``LEAST_LANES`` to ``lanes`` where the rows agree in all of them; else ``LEAST_LANES`` rows
    always; else, as with an odd ``d_model``, each row alone. On other devices ``lanes`` rows always, or each alone.
    Tried with random weights of the model's shape once per process: a forward pass for each width.
    """
    agree = functools.partial(_rows_agree, model.cfg, model.dtype, model.device.type, context)
    if model.device.type != "cpu":
        return Arrangement(lanes, None, alone=not agree((lanes,)))
    if agree(tuple(range(LEAST_LANES, lanes + 1))):
        return Arrangement(lanes, LEAST_LANES, alone=False)
    if agree((LEAST_LANES,)):
        return Arrangement(LEAST_LANES, None, alone=False)
    return Arrangement(lanes, 1, alone=True)


@functools.lru_cache(maxsize=64)
def _rows_agree(
    cfg: HookedDecisionTransformerConfig, dtype: torch.dtype, device: str, context: int, widths: Sequence[int]
) -> bool:
    """Whether one window gives the same bits in every row of batches of all these widths."""
    generator = torch.Generator(device).manual_seed(0)
    # Any weights of the same shapes use the same kernels; these keep the residual stream near unit scale.
    model = ActingModel.random(cfg, dtype, generator)
    changed = model.terms(_some_changes(cfg))
    n = 3 * context - 1

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def rows(x: torch.Tensor, width: int) -> torch.Tensor:
        return repeat(x, "... -> row ...", row=width).contiguous()

    with torch.inference_mode():
        for _ in range(1 if cfg.d_model >= SMALL else 4):
            inputs = random(1), random(cfg.state_dim), random(cfg.n_actions), torch.tensor(0, device=device)
            window, seen = random(n, cfg.d_model), None
            for width in widths:
                tokens = model.embed(*(rows(x, width) for x in inputs))
                x, real = rows(window, width), torch.ones(width, n, dtype=torch.bool, device=device)
                found = []
                # With and without changes, and whether rows share a mask or have one each.
                for terms, mask in ((NONE, real), (RowChanges([changed] * width), real[:1])):
                    hidden = model.hidden(x, model.first(x, terms), additive_mask(mask, dtype), terms)
                    found += [model.first(tokens, terms).flatten(1), hidden, model.action(hidden)]
                bits = torch.cat(found, dim=1)
                seen = bits[:1] if seen is None else seen
                if not torch.equal(bits, seen.expand_as(bits)):
                    return False
        return _actions_agree(model, random(STREAMS, cfg.d_model), widths)


def _some_changes(cfg: HookedDecisionTransformerConfig) -> list[Change]:
    """A change of rank one of each weight of the first block, and one of rank three of each of the others."""
    generator = torch.Generator().manual_seed(1)
    changes = []
    for name, shape in acting_shapes(cfg).items():
        if name.startswith("blocks.") and ".W_" in name:
            rank = 1 if name.startswith("blocks.0.") else 3
            # Weights of heads are [head, in, out]: their first one.
            parts = [
                torch.randn(size, generator=generator).double() / max(size)
                for size in ((shape[-2], rank), (rank, shape[-1]))
            ]
            changes.append(Change(name, 0 if len(shape) == 3 else None, *parts))
    return changes


def _actions_agree(model: ActingModel, streams: torch.Tensor, widths: Sequence[int]) -> bool:
    """Whether the action of each of ``streams [n, d_model]`` has the same bits in batches of all these widths.

    The action is the narrowest result: where it is a single number, another kernel's rounding shows in one window of
    three, and a few windows would agree by luck.
    """
    n, expected = len(streams), None
    for width in widths:
        for shift in (0, 3):  # the same streams in other rows
            rolled = streams.roll(shift, 0)
            # Each batch in memory of its own: alignment can change rounding.
            found = torch.cat([model.action(rolled[i : i + width].clone()) for i in range(0, n - width + 1, width)])
            found = torch.cat((found, streams.new_full((n - len(found), found.shape[1]), torch.nan))).roll(-shift, 0)
            expected = found if expected is None else expected
            both = ~(found.isnan() | expected.isnan())
            if not torch.equal(found[both], expected[both]):
                return False
    return True
