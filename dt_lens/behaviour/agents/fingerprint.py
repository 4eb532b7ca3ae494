"""How an environment is registered: the same id may be registered for another environment elsewhere."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec

__all__ = ["registration"]


def registration(spec: EnvSpec) -> dict[str, Any]:
    """How ``spec`` makes its environment, as JSON values: the same id may be registered for another environment."""
    known = {
        "entry_point": spec.entry_point,
        "package": _package(_named(spec.entry_point)),
        "kwargs": spec.kwargs,
        "max_episode_steps": spec.max_episode_steps,
        "order_enforce": spec.order_enforce,
        "wrappers": [[wrapper.entry_point, wrapper.kwargs] for wrapper in spec.additional_wrappers],
    }
    found: dict[str, Any] = json.loads(json.dumps(known, default=_plain, skipkeys=True))
    return found


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else _named(value)


def _named(value: Any) -> str:
    """Where a class or function is defined; for any other object its class, since its text need not repeat."""
    if isinstance(value, str):
        return value
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}:{kind.__qualname__}"


def _package(entry_point: str) -> str | None:
    """Name and version of the distribution of an entry point; ``None`` if it belongs to none."""
    module = entry_point.partition(":")[0].partition(".")[0]
    with suppress(PackageNotFoundError, ValueError):
        return f"{module} {version(module)}"
    # The distribution has another name than its module, which takes longer to find out.
    names = sorted(set(packages_distributions().get(module, ())))
    return ", ".join(f"{name} {version(name)}" for name in names) or None
