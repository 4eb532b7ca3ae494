"""Evaluation mode for a moment: without dropout, and as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["evaluating"]


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
