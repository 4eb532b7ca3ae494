"""TransformerLens's hooks, with types (mypy does not follow imports into it), and none that silently never runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dt_lens.arguments import truth_value, whole_number
from dt_lens.errors import DtLensError, a_type, nearest
from dt_lens.lens.activation_cache import ActivationCache, Attribution, broadcast, position_axis
from dt_lens.lens.forward_mode import uncompiled
from dt_lens.lens.stacked_weights import StackedWeights

__all__ = ["BY_CHOICE", "HookPoint", "HookedModule", "copy_edits"]

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
    from dt_lens.lens.transformer_lens_classes import HookedRootModule, HookPoint

BY_CHOICE = (".hook_result", ".hook_attn_in", ".hook_mlp_in")  # cached only when asked for

Names = str | Sequence[str] | Callable[[str], bool]
Hooks = Iterable[tuple[str | Callable[[str], bool], Callable[..., Any]]]


class HookedModule(StackedWeights, Attribution, HookedRootModule):
    """TransformerLens's ``HookedRootModule``, with which every hook runs, or is an error.

    A hook that does not run makes an ablation read "no effect". So a name that the model does not have is refused, a
    pass with hooks runs uncompiled (compiled code lacks hooks that came later), and a hook that did not run, in a pass
    or in a whole ``with model.hooks(...)``, is an error. A name to cache is such a hook.

    Raises:
        DtLensError: in those cases.
    """

    _cached_too: Set[str] = frozenset()

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

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether ``run_with_cache`` without ``names_filter`` caches ``hook_result``, what each head adds.

        It is as large as the stream times the number of heads, so by default it does not. A hook at it, or its name in
        ``names_filter``, works either way.
        """
        self._beside(".hook_result", truth_value(use_attn_result, "use_attn_result"))

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether ``run_with_cache`` without ``names_filter`` caches ``hook_attn_in``.

        It is the stream before the norm, as attention reads it, a copy for each head: ``[batch, pos, head, d_model]``.
        A hook at it, or its name in ``names_filter``, works either way.
        """
        self._beside(".hook_attn_in", truth_value(use_attn_in, "use_attn_in"))

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether ``run_with_cache`` without ``names_filter`` caches ``hook_mlp_in``.

        It is the stream before the norm, as the MLP reads it. A hook at it, or its name in ``names_filter``, works
        either way.
        """
        self._beside(".hook_mlp_in", truth_value(use_hook_mlp_in, "use_hook_mlp_in"))

    def _beside(self, ending: str, wanted: bool) -> None:
        self._cached_too = {*self._cached_too, ending} if wanted else self._cached_too - {ending}

    def run_with_cache(
        self,
        *args: Any,
        names_filter: Names | None = None,
        stop_at_layer: int | None = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        pos_slice: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """One pass: what it gives, and its activations; TransformerLens's ``run_with_cache``.

        Args:
            args: as for a call of the model; ``kwargs`` too.
            names_filter: a name, several, or a function of a name; by default all but ``hook_result``,
                ``hook_attn_in`` and ``hook_mlp_in`` (see ``set_use_attn_result``, ``set_use_attn_in`` and
                ``set_use_hook_mlp_in``).
            stop_at_layer: end before this block, and give the stream ``[batch, pos, d_model]`` that enters it. A
                negative number counts from the last; the number of blocks ends after the last one.
            return_cache_object: an ``ActivationCache``; otherwise a ``dict``.
            remove_batch_dim: of a batch of one.
            pos_slice: which positions to keep: a number, a tuple ``(start, end)`` or a list.
            kwargs: also TransformerLens's ``device``, ``incl_bwd``, ``reset_hooks_end``, ``clear_contexts``.

        Raises:
            DtLensError: for a name that the model, or a pass that stops early, does not have; from a batch of several
                whose dimension is to be removed.
        """
        stop = self._block(stop_at_layer)
        if stop is not None:
            kwargs["stop_at_layer"] = stop
        names = self._reached(names_filter, stop)
        out, found = super().run_with_cache(*args, names_filter=set(names).__contains__ if names else [], **kwargs)
        broadcast(found)
        cache = ActivationCache(found, self)
        if remove_batch_dim:
            cache.remove_batch_dim()
        if pos_slice is not None:
            from transformer_lens.utilities import Slice

            kept = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
            for name, x in found.items():
                found[name] = kept.apply(x, dim=position_axis(name))
        return out, cache if return_cache_object else found

    def _block(self, stop_at_layer: Any) -> int | None:
        """The number of blocks that ``stop_at_layer`` leaves; ``None`` where it is."""
        if stop_at_layer is None:
            return None
        n = int(self.structure.n_layers)
        stop = whole_number(stop_at_layer, "stop_at_layer", -n, n)
        return stop + n if stop < 0 else stop

    def _reached(self, names_filter: Names | None, stop: int | None) -> list[str]:
        """The names to cache in a pass that stops before a block, if it does."""
        chosen = self._filter(names_filter)
        if isinstance(chosen, str):
            chosen = [chosen]
        named = None if callable(chosen) else chosen
        names = [name for name in self.hook_dict if chosen(name)] if named is None else named
        if stop is None:
            return list(names)
        kept = [name for name in names if _precedes(name, stop)]
        missed = [name for name in names if name not in kept]
        if missed and (named is not None or not kept):
            raise DtLensError(
                f"A pass with stop_at_layer={stop} does not reach {_listed(missed)}; stop later, or leave "
                f"{'it' if len(missed) == 1 else 'them'} out."
            )
        return kept

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
        with super().hooks(forward, backward, reset_hooks_end, clear_contexts) as model, self._throughout():
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

    @contextmanager
    def _throughout(self) -> Iterator[None]:
        """Refuse passes of the user's own model while there are hooks: it shares the weights, not the hooks.

        Raises:
            DtLensError: from such a pass.
        """
        handles: list[Any] = []

        def refuse(module: nn.Module, _inputs: Any) -> None:
            raise DtLensError(
                f"Hooks act on the model that dt_lens.wrap or load gave, not on {a_type(module)} that it was made of; "
                "inside 'with model.hooks(...)' call that one."
            )

        with self.tell_original(lambda original: handles.append(original.register_forward_pre_hook(refuse))):
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    @contextmanager
    def tell_original(self, call: Callable[[nn.Module], object]) -> Iterator[None]:
        """Call ``call(original)`` for the user's own model, if this one shares its memory and is another one."""
        original = getattr(self, "original", None)
        if isinstance(original, nn.Module) and original is not getattr(self, "model", None):
            call(original)
        yield

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
        if names is None:
            left_out = tuple(set(BY_CHOICE) - self._cached_too)
            return lambda name: not name.endswith(left_out)
        if isinstance(names, str) or callable(names):
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


def _precedes(name: str, stop: int) -> bool:
    """Whether an activation is computed before this block."""
    parts = name.split(".")
    if parts[0] == "blocks":
        return int(parts[1]) < stop
    return name.startswith(("hook_embed", "hook_pos_embed", "embed"))


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
