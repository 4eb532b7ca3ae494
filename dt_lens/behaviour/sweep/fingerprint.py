"""Whether an agent acts to the same bits elsewhere: versions of software, the environment, and its first steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec
from safetensors.torch import load

from dt_lens.behaviour.agents.running import Job
from dt_lens.behaviour.sweep.plan import SOFTWARE
from dt_lens.behaviour.sweep.units import Unit, run_unit
from dt_lens.errors import DtLensError
from dt_lens.version import __version__

__all__ = ["fingerprint", "first_steps", "registration", "software"]

STEPS = 20


def software() -> dict[str, str]:
    """The versions of the packages on which the bits of an outcome depend."""
    return {f"version of {name}": version(name) for name in SOFTWARE}


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


def first_steps(job: Job) -> str | None:
    """A hash of the unedited agent's first steps in two episodes; ``None`` if they do not repeat even here."""
    one, other = _steps(job), _steps(job)
    return one if one == other else None


def _steps(job: Job) -> str:
    short = replace(job, made=replace(job.made, time_limit=min(STEPS, job.made.time_limit)))
    try:
        outcomes = repr([(o.total.hex(), o.length) for o in run_unit(short, load(job.weights), Unit(0, b"", 0, 2))])
    except DtLensError as error:
        outcomes = str(error)
    except Exception as error:  # an environment may raise anything, with another message each time
        outcomes = type(error).__name__
    return hashlib.sha256(outcomes.encode()).hexdigest()


def fingerprint(job: Job) -> Mapping[str, str | None]:
    """What must be equal on two machines before one may run units of the other's sweep."""
    package = registration(job.made.spec)["package"]
    versions = {"version of dt-lens": __version__, **software(), "package of the environment": package}
    return {**versions, "steps": first_steps(job)}
