"""TransformerLens's two classes with types, which mypy is told not to look for in TransformerLens itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

__all__ = ["HookPoint", "HookedRootModule"]

if TYPE_CHECKING:

    class HookPoint:
        """The identity, where a hook may read and replace a tensor."""

        def __call__(self, x: Tensor) -> Tensor: ...
        def has_hooks(self) -> bool: ...

    class HookedRootModule(nn.Module):
        """A module that finds its hook points by name."""

        def setup(self) -> None: ...
        def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...
        def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...
        def hooks(self, *args: Any, **kwargs: Any) -> Any: ...
        def add_hook(self, *args: Any, **kwargs: Any) -> None: ...
        def reset_hooks(self, *args: Any, **kwargs: Any) -> None: ...

else:
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint
