"""Sweeps: many edits, each with its controls, over the same seeds, in worker processes, kept in one SQLite file.

Names are imported when first used: a worker process has no use for the driver's imports.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dt_lens.behaviour.sweep.sweep import Sweep
    from dt_lens.behaviour.sweep.results import SweepResults

__all__ = ["Sweep", "SweepResults"]

_HOMES = {"Sweep": "driver", "SweepResults": "results"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
