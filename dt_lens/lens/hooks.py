"""TransformerLens's two classes, with types: mypy does not follow imports into TransformerLens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

__all__ = ["HookPoint", "HookedRootModule"]

if TYPE_CHECKING:

    class HookPoint:
        """The identity function; a hook on it may read and replace its tensor."""

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
