"""TransformerLens's hooks, with types (mypy does not follow imports into it), and none that silently never runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dt_lens.errors import DtLensError, a_type, nearest
from dt_lens.lens.forward_mode import uncompiled
from dt_lens.lens.stacked_weights import StackedWeights

__all__ = ["HookPoint", "HookedModule", "copy_edits"]

if TYPE_CHECKING:

    class HookPoint:
        """The identity function; a hook on it may read and replace its tensor."""

        def __call__(self, x: Tensor) -> Tensor: ...
        def has_hooks(self) -> bool: ...
        def register_forward_pre_hook(self, hook: Any) -> Any: ...

    class HookedRootModule(nn.Module):
        """A module that finds its hook points by name."""

        hook_dict: Mapping[str, HookPoint]

        def setup(self) -> None: ...
        def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...
        def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...
        def hooks(self, *args: Any, **kwargs: Any) -> Any: ...
        def add_hook(self, *args: Any, **kwargs: Any) -> None: ...
        def add_caching_hooks(self, *args: Any, **kwargs: Any) -> Any: ...
        def get_caching_hooks(self, *args: Any, **kwargs: Any) -> Any: ...
        def reset_hooks(self, *args: Any, **kwargs: Any) -> None: ...

else:
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint

Names = str | Sequence[str] | Callable[[str], bool]
Hooks = Iterable[tuple[str | Callable[[str], bool], Callable[..., Any]]]


class HookedModule(StackedWeights, HookedRootModule):
    """TransformerLens's ``HookedRootModule``, with which every hook runs, or is an error.

    A hook that does not run makes an ablation read "no effect". So a name that the model does not have is refused, a
    pass with hooks runs uncompiled (compiled code lacks hooks that came later), and a hook that did not run, in a pass
    or in a whole ``with model.hooks(...)``, is an error. A name to cache is such a hook.

    Raises:
        DtLensError: in those cases.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass."""
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        with self.all_hooks_run():
            return super().__call__(*args, **kwargs)

    @contextmanager
    def all_hooks_run(self) -> Iterator[None]:
        """Passes inside run uncompiled where there are hooks, and a hook that did not run is an error at the end.

        Raises:
            DtLensError: naming the hooks that none of the passes reached.
        """
        hooked = {name: point for name, point in self.hook_dict.items() if point.has_hooks()}
        if not hooked:
            yield
            return
        ran: set[str] = set()

        def noting(name: str) -> Callable[..., None]:
            return lambda module, inputs: ran.add(name)

        handles = [point.register_forward_pre_hook(noting(name)) for name, point in hooked.items()]
        try:
            with uncompiled():
                yield
        finally:
            for handle in handles:
                handle.remove()
        silent = [name for name in hooked if name not in ran]
        if silent:
            raise DtLensError(
                f"The hooks at {_listed(silent)} did not run: this forward pass does not reach them "
                "(or another thread hooked the model meanwhile; hook one model from one thread at a time)."
            )

    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """TransformerLens's ``run_with_hooks``."""
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*args, **kwargs)

    @contextmanager
    def hooks(
        self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), reset_hooks_end: bool = True, clear_contexts: bool = False
    ) -> Iterator[Any]:
        """TransformerLens's ``hooks``. On leaving, a hook that has never run is an error.

        So is a backward hook if ``backward`` was not called inside. With ``reset_hooks_end=False`` neither is: the
        hooks stay, and may run later. Hook one model from one thread at a time: leaving removes the others' hooks too.
        """
        idle: dict[tuple[str, int], str] = {}

        def counted(hooks: Hooks, kind: str) -> list[tuple[str, Callable[..., Any]]]:
            found = []
            for number, (which, hook) in enumerate(hooks):
                for name in self._names(which):
                    idle[kind + name, number] = name
                    found.append((name, _noting(hook, idle, (kind + name, number))))
            return found

        forward, backward = counted(fwd_hooks, "forward "), counted(bwd_hooks, "backward ")
        with super().hooks(forward, backward, reset_hooks_end, clear_contexts) as model:
            yield model
        if idle and reset_hooks_end:
            where = _listed(list(dict.fromkeys(idle.values())))
            if all(kind.startswith("backward ") for kind, _ in idle):
                raise DtLensError(
                    f"The backward hooks at {where} never ran; call backward inside 'with model.hooks(...)'."
                )
            raise DtLensError(
                f"The hooks at {where} never ran: inside 'with model.hooks(...)' call this model itself, not the model "
                "that it wraps nor a compiled one, and from one thread at a time (another's hooks end with these)."
            )

    def add_hook(self, name: str | Callable[[str], bool], *args: Any, **kwargs: Any) -> None:
        """TransformerLens's ``add_hook``."""
        self._names(name)
        super().add_hook(name, *args, **kwargs)

    def get_caching_hooks(self, names_filter: Names | None = None, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's ``get_caching_hooks``."""
        return super().get_caching_hooks(self._filter(names_filter), *args, **kwargs)

    def add_caching_hooks(self, names_filter: Names | None = None, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's ``add_caching_hooks``."""
        return super().add_caching_hooks(self._filter(names_filter), *args, **kwargs)

    def _filter(self, names: Names | None) -> Any:
        if names is None or isinstance(names, str) or callable(names):
            if names is not None:
                self._names(names)
            return names
        try:
            several = list(names)
        except TypeError:
            raise DtLensError(
                f"names_filter is {a_type(names)}; it must be a name, a list of names or a function of a name."
            ) from None
        for name in several:
            self._names(name)
        return several

    def _names(self, which: Any) -> list[str]:
        """The hook points that a name or a function of names means; at least one."""
        if callable(which):
            found = [name for name in self.hook_dict if which(name)]
            if not found:
                raise DtLensError(
                    f"The function that chooses hook points chooses none of the model's {len(self.hook_dict)}, such as "
                    f"{next(iter(self.hook_dict), 'none')}; list(model.hook_dict) names them."
                )
            return found
        if not isinstance(which, str) or which not in self.hook_dict:
            near = nearest(which, self.hook_dict) if isinstance(which, str) else ""
            raise DtLensError(
                f"The model has no hook point {which!r}." + (near or " list(model.hook_dict) names those that it has.")
            )
        return [which]


def _noting(hook: Callable[..., Any], idle: dict[Any, str], key: Any) -> Callable[..., Any]:
    """The hook, which is no longer idle once it has run."""

    @wraps(hook)
    def noted(*args: Any, **kwargs: Any) -> Any:
        idle.pop(key, None)
        return hook(*args, **kwargs)

    return noted


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def copy_edits(model: Any, copied: Any, memo: dict[int, Any]) -> None:
    """Let the copy of a model know the edits that are in force on it, so that they can be undone and are recorded."""
    state = model.__dict__.get("_edit_state")
    if state is not None:
        memo[id(model)] = copied  # the copy's edits are edits of the copy
        kept = copy.deepcopy(state, memo)
        object.__setattr__(copied, "_edit_state", kept)
        object.__setattr__(copied, "active_edits", kept.edits)
