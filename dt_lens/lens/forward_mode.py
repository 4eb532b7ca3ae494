"""Run a model the same way every time: without dropout, on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["one_thread", "evaluating"]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model, and the model that it wraps, in eval mode; restore each module's own mode on exit."""
    parts: tuple[Any, Any] = (model, getattr(model, "original", None))
    modules = [module for part in parts if hasattr(part, "modules") for module in part.modules()]
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, as a worker does: a sum that is split over threads rounds differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
