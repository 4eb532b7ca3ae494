"""TransformerLens's classes that a lens stands on, without what importing their whole package takes.

``import transformer_lens`` imports datasets, transformers, pandas and pytest, which takes longer than torch itself; the
classes need torch alone. So its packages are first put into ``sys.modules`` without being run. They run, as usual, the
first time anybody asks them for anything else, or imports another of their modules; nothing else changes, and where
TransformerLens has been imported already, or is laid out in another way, it is imported as usual.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from threading import RLock
from types import ModuleType
from typing import Any

__all__ = ["ActivationCache", "HookPoint", "HookedRootModule"]

ROOT = "transformer_lens"
# Packages that do nothing but import, and what the classes import from them, by the module that it is in.
PACKAGES = (ROOT, f"{ROOT}.conversion_utils", f"{ROOT}.conversion_utils.conversion_steps", f"{ROOT}.utilities")
USED = {"slice": ("Slice", "SliceInput"), "tensors": ("remove_batch_dim",), "devices": ("warn_if_mps",)}

WAIT = 60.0  # seconds that one thread waits for another that runs the packages

_lock = RLock()
_waiting: dict[str, _Unrun] = {}  # not run yet, or not to their end
_running: list[str] = []


class _Unrun(ModuleType):
    """A package that has not been run, and is when something is asked of it that it does not have yet."""

    def __getattr__(self, name: str) -> Any:
        # Tools that look through all modules, such as the warnings module, ask for names of this kind.
        asked = not name.startswith("__") or name == "__all__"
        if asked and _lock.acquire(timeout=WAIT):
            try:
                if self.__name__ not in _running:
                    _run(self.__name__)
                    return getattr(self, name)
            finally:
                _lock.release()
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _OtherModules:
    """A finder that runs the packages before another of their modules is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        # It must not wait: another thread that runs the packages may be waiting for this very import.
        if not name.startswith(f"{ROOT}.") or not _waiting or not _lock.acquire(blocking=False):
            return None
        try:
            if not _running:
                _run(ROOT)
        finally:
            _lock.release()
        # Running them may have imported this very module; a second one would have classes of its own.
        return ModuleSpec(name, _Loaded(sys.modules[name])) if name in sys.modules else None


class _Loaded(Loader):
    """A loader of a module that is there already."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


_finder: Any = _OtherModules()


def _run(asked: str) -> None:
    """Run all packages that wait, the root first, as an import does; while they run, only the one that is asked.

    One that raises, or is stopped by Ctrl-C, waits again.
    """
    for name in (asked,) if _running else (ROOT, asked, *PACKAGES):
        if name not in _waiting or name in _running:
            continue
        package: Any = _waiting[name]
        _running.append(name)
        try:
            package.__spec__.loader.exec_module(package)
        finally:
            _running.remove(name)
        package.__class__ = ModuleType  # what it lacks from now on is an error, as it is of any module
        del _waiting[name]
    if not _waiting and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def _put_unrun(name: str) -> None:
    """Put a package into ``sys.modules`` without running it."""
    spec = find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    made: Any = module_from_spec(spec)
    made.__class__ = _Unrun
    sys.modules[name] = _waiting[name] = made
    parent, _, last = name.rpartition(".")
    if parent:
        vars(sys.modules[parent])[last] = made


def _import_the_classes_alone() -> None:
    """Import the modules of the classes, and leave the packages that they are in to be run when they are needed."""
    before = set(sys.modules)
    try:
        for name in PACKAGES:
            _put_unrun(name)
        utilities = vars(sys.modules[f"{ROOT}.utilities"])
        for module, names in USED.items():
            found = importlib.import_module(f"{ROOT}.utilities.{module}")
            utilities |= {name: getattr(found, name) for name in names}
        for module in ("hook_points", "HookedRootModule", "ActivationCache"):
            importlib.import_module(f"{ROOT}.{module}")
            # In the package these are the names of classes, which running it binds; importing has bound the modules.
            vars(sys.modules[ROOT]).pop(module, None)
        sys.meta_path.insert(0, _finder)
    except Exception:  # another layout, whatever it is
        _waiting.clear()
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == ROOT:
                del sys.modules[name]


if ROOT not in sys.modules:
    _import_the_classes_alone()

# From their own modules: the package would be run for its own name of them.
ActivationCache: Any = importlib.import_module(f"{ROOT}.ActivationCache").ActivationCache
HookPoint: Any = importlib.import_module(f"{ROOT}.hook_points").HookPoint
HookedRootModule: Any = importlib.import_module(f"{ROOT}.HookedRootModule").HookedRootModule
