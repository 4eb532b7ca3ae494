"""TransformerLens's two classes, with types: mypy does not follow imports into TransformerLens."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

__all__ = ["HookPoint", "HookedRootModule", "copy_edits"]

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


def copy_edits(model: Any, copied: Any, memo: dict[int, Any]) -> None:
    """Let the copy of a model know the edits that are in force on it, so that they can be undone and are recorded."""
    state = model.__dict__.get("_edit_state")
    if state is not None:
        memo[id(model)] = copied  # the copy's edits are edits of the copy
        kept = copy.deepcopy(state, memo)
        object.__setattr__(copied, "_edit_state", kept)
        object.__setattr__(copied, "active_edits", kept.edits)
