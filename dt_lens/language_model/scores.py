"""Show what a softmax is given, wherever in Hugging Face's own code it is computed, and let it be replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["held_mask", "scoring", "seeing_scores"]

SOFTMAX = (torch.nn.functional.softmax, torch.softmax, Tensor.softmax)


class seeing_scores(TorchFunctionMode):
    """Within this context ``see(name, scores)`` is called for the first softmax's input, ``[batch, head, query, key]``.

    What is masked is -inf in what ``see`` is given, as in TransformerLens; Hugging Face's masks add the smallest number
    of the type, which is put back for the softmax: a padded query has no other.
    """

    def __init__(self, see: Callable[[str, Tensor], Tensor], name: str) -> None:
        super().__init__()
        self.see, self.name, self.done = see, name, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.done or func not in SOFTMAX or not args:
            return func(*args, **(kwargs or {}))
        self.done = True
        scores = args[0]
        narrow = torch.float32 if scores.dtype == torch.float64 else scores.dtype
        least = torch.finfo(narrow).min
        shown = scores.masked_fill(scores <= least / 2, -torch.inf)
        given = self.see(self.name, shown)
        if given is not shown:
            args = (given.clamp_min(least), *args[1:])
        return func(*args, **(kwargs or {}))


def scoring(module: nn.Module, see: Callable[[str, Tensor], Tensor], name: str) -> list[Any]:
    """Hooks that see the scores inside a module that computes the softmax in its own forward pass."""
    entered: list[Any] = []

    def enter(_module: nn.Module, _inputs: Any) -> None:
        entered.append(seeing_scores(see, name))
        entered[-1].__enter__()

    def leave(_module: nn.Module, _inputs: Any, _out: Any) -> None:
        entered.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def held_mask(mask: Tensor | None) -> Tensor | None:
    """A mask in numbers that single precision holds.

    The softmax of eager attention is in single precision whatever the model's, where float64's smallest number is -inf;
    a padded query, which sees nothing but padding, would be NaN, and from the next block on everything.
    """
    return mask.clamp_min(torch.finfo(torch.float32).min) if mask is not None and mask.dtype == torch.float64 else mask
