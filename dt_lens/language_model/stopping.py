"""End a forward pass of a live model before one of its modules, with what would have entered it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dt_lens.lens.forward_mode import uncompiled

__all__ = ["entering"]


class _Stopped(Exception):
    """Carries the tensor out of the pass."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


def entering(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """The first input of a module in a pass that ends there."""

    def stop(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        raise _Stopped(inputs[0] if inputs else named["hidden_states"])

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with uncompiled():  # compiled code lacks this hook too
            run()
    except _Stopped as stopped:
        return stopped.x
    finally:
        handle.remove()
    raise AssertionError("a pass comes by every block")
