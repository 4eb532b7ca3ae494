"""Find the adapter for a checkpoint or a live model, through the entry-point group ``dt_lens.adapters``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from dt_lens.errors import DtLensError, because, nearest

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from dt_lens.lens.checkpoints import Checkpoint
    from dt_lens.lens.protocol import Lens
    from dt_lens.lens.shards import Shards

__all__ = [
    "GROUP",
    "Adapter",
    "Unrecognised",
    "adapter_names",
    "adapter_suffixes",
    "choose",
    "choose_for",
    "named_adapter",
    "opener",
    "read_own_form",
    "unpack",
]

GROUP = "dt_lens.adapters"


class Unrecognised(DtLensError):
    """No adapter recognises a model."""


@runtime_checkable
class Adapter(Protocol):
    """One code base's checkpoints: how they are recognised, and how they become a lens.

    Adapters fail closed: they raise a ``DtLensError`` for a key or an option that they neither handle nor knowingly
    ignore, and name it. One that reads weights in place is an ``Opener`` too, and one whose code base saves pickled
    dicts of plain values with a file of torch's inside is an ``Unpacker``; one whose code base has a binary form of its
    own is a ``Reader``.
    """

    name: str

    def recognises(self, source: Checkpoint | nn.Module) -> bool:
        """Whether this checkpoint (by its keys and config, not its file name) or live model is of this kind."""
        ...

    def load(self, checkpoint: Checkpoint, **given: Any) -> Lens:
        """The model of a checkpoint; ``given`` is what the user passed because the file does not say it."""
        ...

    def wrap(self, model: nn.Module, **given: Any) -> Lens:
        """The lens on a live model, sharing its storage where the layout allows."""
        ...


@runtime_checkable
class Opener(Adapter, Protocol):
    """An adapter that can also read a checkpoint's weights in place, without loading the model."""

    def opens(self, shards: Shards) -> bool:
        """Whether these files are of this kind."""
        ...

    def open(self, shards: Shards, **given: Any) -> Lens:
        """The lens on the files, for weights only."""
        ...


@runtime_checkable
class Unpacker(Adapter, Protocol):
    """An adapter that can also read a pickled file of its code base's own form.

    Its attribute ``suffixes``, such as ``(".d3",)``, names those files, if it has one: a name that ends so is a file's.
    """

    def unpack(self, values: Mapping[str, Any], file: Path) -> tuple[bytes, Mapping[str, Any]] | None:
        """The bytes of a file of torch's, and a configuration, from a pickled dict; ``None`` if it is another's."""
        ...


@runtime_checkable
class Reader(Adapter, Protocol):
    """An adapter that can also read a file of its code base's own binary form."""

    def read(self, file: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any]] | None:
        """Tensors by key, and what else the file says (``Checkpoint.extra``); ``None`` if it begins like another's."""
        ...


def _entries() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if entry.name in found and found[entry.name].value != entry.value:
            raise DtLensError(
                f"Two installed packages both have an adapter {entry.name!r} ({found[entry.name].value} and "
                f"{entry.value}); uninstall one."
            )
        found[entry.name] = entry
    return found


def adapter_names() -> list[str]:
    """The names of all installed adapters, sorted."""
    return sorted(_entries())


def adapter_suffixes() -> set[str]:
    """The suffixes of files that only an adapter can read."""
    found: set[str] = set()
    for name in adapter_names():
        with suppress(DtLensError):  # one that cannot be imported is reported where it is needed
            found |= set(getattr(named_adapter(name), "suffixes", ()))
    return found


def named_adapter(adapter: str | Adapter | type) -> Adapter:
    """An adapter from its registered name, from ``module:Class``, or from the class or object itself.

    Raises:
        DtLensError: for an unknown name, or an object that is not an adapter.
    """
    found: Any = adapter
    if isinstance(adapter, str):
        known = _entries()
        if ":" in adapter:
            module, _, name = adapter.partition(":")
            found = _imported(adapter, lambda: getattr(importlib.import_module(module), name))
        elif adapter in known:
            found = _imported(adapter, known[adapter].load)
        else:
            raise DtLensError(
                f"No adapter is called {adapter!r}; installed are {', '.join(sorted(known))}." + nearest(adapter, known)
            )
    return _made(adapter, found)


def _made(adapter: str | Adapter | type, found: Any) -> Adapter:
    if isinstance(found, type):
        try:
            found = found()
        except TypeError as error:
            raise DtLensError(f"The adapter {adapter!r} cannot be made without arguments: {because(error)}.") from error
    if not isinstance(found, Adapter):
        raise DtLensError(f"{adapter!r} is not an adapter: it needs a name and the methods recognises, load and wrap.")
    return found


def _imported(name: str, find: Callable[[], Any]) -> Any:
    try:
        return find()
    except Exception as error:  # a third party's module may fail in any way
        raise DtLensError(f"The adapter {name!r} cannot be imported: {because(error)}.") from error


def opener(shards: Shards, adapter: str | Adapter | type | None) -> Opener:
    """The one adapter that reads the weights of these files in place.

    Raises:
        DtLensError: if none or several do, or the one that was asked for cannot.
    """
    if adapter is not None:
        found = named_adapter(adapter)
        if not isinstance(found, Opener):
            raise DtLensError(f"The adapter {found.name!r} cannot read weights in place; use dt_lens.load.")
        return found
    known = _entries()
    made = [_made(name, _imported(name, known[name].load)) for name in sorted(known)]
    able = [found for found in made if isinstance(found, Opener)]
    matches = [found for found in able if found.opens(shards)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(found.name for found in matches)
        raise DtLensError(
            f"Several adapters recognise this model ({names}); pass adapter= with one of these names "
            "(-g adapter=NAME on the command line)."
        )
    kind = shards.config.get("model_type", "not said in a config.json")
    raise DtLensError(
        f"No adapter reads the weights of this model in place (its model_type is {kind}); those that can are "
        f"{', '.join(found.name for found in able)}, and dt_lens.load may know it."
    )


def read_own_form(
    file: Path, adapter: str | Adapter | type | None = None
) -> tuple[Mapping[str, Tensor], Mapping[str, Any]] | None:
    """What the given adapter, or the first installed one that can, reads from a file of a binary form of its own."""
    names: list[Any] = [adapter] if adapter is not None else adapter_names()
    able = [found for found in map(named_adapter, names) if isinstance(found, Reader)]
    read = (found.read(file) for found in able)
    return next((one for one in read if one is not None), None)


def unpack(
    values: Mapping[str, Any], file: Path, adapter: str | Adapter | type | None = None
) -> tuple[bytes, Mapping[str, Any]] | None:
    """What the given adapter, or the first installed one that can, unpacks from a pickled dict of plain values."""
    names: list[Any] = [adapter] if adapter is not None else adapter_names()
    able = [found for found in map(named_adapter, names) if isinstance(found, Unpacker)]
    unpacked = (found.unpack(values, file) for found in able)
    return next((one for one in unpacked if one is not None), None)


def choose_for(checkpoint: Checkpoint, adapter: str | Adapter | type | None) -> tuple[Adapter, Checkpoint]:
    """The one adapter that recognises a checkpoint, and the checkpoint, with the configuration that it needs.

    A file of any name may be one of a folder in Hugging Face's form, so where no adapter knows the tensors alone, or
    the one that does needs it, they get the ``config.json`` beside them.
    """
    try:
        chosen = choose(checkpoint, adapter, sorted(checkpoint.tensors))
        if adapter is not None and not checkpoint.config and not chosen.recognises(checkpoint):
            full = replace(checkpoint, config=checkpoint.config_beside())
            return chosen, full if chosen.recognises(full) else checkpoint
        return chosen, checkpoint
    except Unrecognised as error:
        config = checkpoint.config_beside()
        if config and not checkpoint.config:
            full = replace(checkpoint, config=config)
            return choose(full, adapter, sorted(full.tensors)), full
        if not checkpoint.config and ".safetensors" in _suffixes(checkpoint.path):
            raise DtLensError(
                f"No adapter recognises this model, which holds {', '.join(sorted(checkpoint.tensors)[:3])}, ..., and "
                f"{checkpoint.path} has no config.json beside it, which a model in Hugging Face's form needs; put the "
                "two into one folder, or see docs/adapters.md for how to add an adapter."
            ) from error
        raise


def _suffixes(path: Path) -> set[str]:
    """The suffixes of a checkpoint's files, in the folder or the file that it was read from."""
    return {file.suffix for file in (path.iterdir() if path.is_dir() else [path])}


def choose(source: Checkpoint | nn.Module, adapter: str | Adapter | type | None, seen: Iterable[str]) -> Adapter:
    """The one adapter that recognises ``source``.

    ``seen`` is what the model holds, for the error if no adapter or several recognise it.
    """
    if adapter is not None:
        return named_adapter(adapter)
    known = _entries()
    adapters = [_made(name, _imported(name, known[name].load)) for name in sorted(known)]
    matches = [found for found in adapters if found.recognises(source)]
    if len(matches) == 1:
        return matches[0]
    what = ", ".join(list(seen)[:4])
    if matches:
        raise DtLensError(
            f"Several adapters recognise this model ({', '.join(m.name for m in matches)}); pass adapter= with one of "
            "these names (-g adapter=NAME on the command line)."
        )
    raise Unrecognised(
        f"No adapter recognises this model, which holds {what}, ...; dt-lens knows {', '.join(sorted(known))} (pass "
        "adapter=, or -g adapter=NAME on the command line, to insist on one; docs/adapters.md shows how to add one)."
    )
