"""Find the simple mistake that explains why a weight does not reproduce its activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dt_lens.lens.matrices import catalogue

if TYPE_CHECKING:
    from dt_lens.lens.protocol import Lens

__all__ = ["Check", "explain"]

MOST_HEADS = 6  # with more, the orders are too many to try: 6 heads have 720


@dataclass(frozen=True)
class Check:
    """What a part computed from its input, and the cached activation that it should equal, tokens first, in float64.

    If the part is a weight, ``computed`` is ``source @ weight`` plus a bias. ``slack`` is the difference that rounding
    explains. ``weight`` is a function, called only if the part does not fit.
    """

    part: str
    computed: Tensor
    expected: Tensor
    slack: Tensor | float = 0.0
    weight: Callable[[], Tensor] | None = None
    source: Tensor | None = None

    def error(self) -> float:
        """The largest difference beyond the slack, over the root mean square of what was cached."""
        if self.computed.shape != self.expected.shape:
            return float("inf")
        beyond = ((self.computed - self.expected).abs() - self.slack).clamp_min(0)
        return float(beyond.max() / self.expected.pow(2).mean().sqrt().clamp_min(1e-12))


def explain(check: Check, model: Lens, tolerance: float) -> str:
    """``": it looks transposed"`` and the like, or an empty string."""
    x, weight = check.source, check.weight
    if x is None or weight is None or check.computed.shape != check.expected.shape:
        return ""
    W = weight()
    bias = check.computed - x @ W
    target = check.expected - bias

    def fits(candidate: Tensor) -> bool:
        return candidate.shape == W.shape and Check("", x @ candidate, target).error() <= 10 * tolerance

    off = target - x @ W
    if Check("", off, off.mean(0, keepdim=True).expand_as(off)).error() <= 10 * tolerance:
        return ": its matrix fits and its bias does not"
    if fits(W.T):
        return ": it looks transposed"
    factor = float((x @ W * target).sum() / (x @ W).pow(2).sum().clamp_min(1e-30))
    if fits(W * factor):
        return f": it looks rescaled, {factor:.4g} times it fits"
    for other in catalogue(model).values():
        if len(other.factors) == 1 and other.name != check.part and fits(other.dense(model, fold_layernorm=False)):
            return f": what belongs there is called {other.name}"
    heads = model.structure.n_heads
    if ".attn." in check.part and 1 < heads <= MOST_HEADS:
        axis = 0 if check.part.endswith("W_O") else 1
        parts = W.tensor_split(heads, axis)
        for order in permutations(range(heads)):
            if fits(torch.cat([parts[head] for head in order], axis)):
                return f": its heads look exchanged, in the order {list(order)} they fit"
    return ""
