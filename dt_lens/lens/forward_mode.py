"""Evaluation mode for a moment: without dropout, and as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["one_thread", "evaluating"]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside ``with``, of the wrapped model too, and each module's own mode afterwards."""
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
    """torch on one thread, as in a worker: a sum split over threads rounds differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
