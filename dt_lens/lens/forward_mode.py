"""Run a model the same way every time: without dropout, on one thread, and with its hooks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = [
    "evaluating",
    "flushing_denormals",
    "measuring",
    "one_thread",
    "original_at_hand",
    "uncompiled",
    "usable_cores",
]

_COUNTING = threading.Lock()
_eager: list[Any] = []  # the compiler's stance, once for every pass that runs uncompiled now


def original_at_hand(model: Any) -> Any:
    """The model that a lens shares its memory with; ``None`` where there is none, or it has not been made yet."""
    own = getattr(model, "__dict__", {})
    return own["_original"] if "_original" in own else getattr(model, "original", None)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model, and the model that it wraps, in eval mode; restore each module's own mode on exit."""
    parts: tuple[Any, Any] = (model, original_at_hand(model))
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


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """Run a model as everything that is measured runs: in eval mode, without gradients, on one thread."""
    with one_thread(), evaluating(model), torch.no_grad():
        yield


@contextmanager
def flushing_denormals() -> Iterator[None]:
    """Take numbers below 1.2e-38 for zero in this thread's products.

    Weight decay leaves such weights behind in what is not used, and a processor takes a hundred times as long with
    them. Physics keeps them: it must have the bits that it has elsewhere.
    """
    kept = bool(torch.full((1,), 1e-40).mul(1.0).item())  # the setting cannot be read
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(not kept)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run modules as they were written, also those that ``torch.compile`` has compiled.

    Compiled code lacks the hooks that came after compilation, and does not say so.
    """
    if "torch._dynamo" not in sys.modules:  # then nothing has been compiled, and importing it takes a second
        yield
        return
    with _COUNTING:
        # The stance is one for all threads: the first pass sets it, and the last one sets it back.
        _eager.append(None if _eager else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _COUNTING:
            stance = next((one for one in _eager if one is not None), None)
            _eager.remove(None if None in _eager else stance)
            if not _eager and stance is not None:
                stance.__exit__(None, None, None)


def usable_cores() -> int:
    """Processor cores that this process may use, container limits included."""
    from loky import cpu_count

    return int(cpu_count())
