"""Names of environments: one that the user gives may import a package, one that a file gives is only looked up.

``"module:Id"`` is Gymnasium's way to import the module that registers an id. In a checkpoint's own JSON it would run
whatever file of that name lies beside the weights.
"""

from __future__ import annotations

import importlib
import site
import sys
import sysconfig
from collections.abc import Mapping
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dt_lens.errors import DtLensError, as_written, because, nearest

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec

__all__ = ["FileKeywords", "import_module_of", "require_registered", "same_environment", "specification"]

# An installed package that has an entry point in one of these groups is imported anyway, so a file may name it.
GROUPS = ("gymnasium.envs", "dt_lens.adapters")
# Packages that an extra of dt-lens brings.
EXTRAS = ("minigrid",)
# Two versions of one environment: Gymnasium registers one of them, and without keywords they are the same (Taxi's
# version 4 repairs the rain and the fickle passenger, which are off by default).
VERSIONS = {"Taxi-v3": "Taxi-v4", "Taxi-v4": "Taxi-v3"}
LONGEST = 1_000_000  # steps of an episode that a file may ask for


class FileKeywords(dict[str, Any]):
    """Keyword arguments of an environment that a file gives, and nobody has confirmed."""


def import_module_of(environment: object) -> None:
    """Import the module of ``"module:Id"``, as ``gymnasium.make`` does; only for a name that the user himself gave.

    Raises:
        DtLensError: if the module cannot be imported.
    """
    if not isinstance(environment, str):
        return
    module = environment.rpartition(":")[0]
    if module:
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:  # a relative name, or whatever the module raises
            if module in EXTRAS and isinstance(error, ModuleNotFoundError) and error.name == module:
                raise _lacking(environment, module) from error
            raise DtLensError(
                f"The module {module!r} of the environment {environment!r} cannot be imported: {because(error)}."
            ) from error


def specification(environment: str) -> EnvSpec:
    """The specification that is registered for ``"Id"`` or ``"module:Id"``.

    Nothing is imported that is not imported already, except from installed packages that announce environments to
    Gymnasium or adapters to dt-lens, and from MiniGrid. Where only ``Taxi-v3`` or ``Taxi-v4`` is registered, it is
    found by either name.

    Raises:
        DtLensError: for an id that is not registered, or whose module is not imported.
    """
    if not isinstance(environment, str):
        raise DtLensError(f"environment is {as_written(environment)}; it must be a Gymnasium id, as text.")
    import gymnasium as gym

    module, _, name = environment.rpartition(":")
    if module and module not in sys.modules:
        if not (_announced(module) or _brought_by_an_extra(module, name)):
            raise DtLensError(
                f"The environment {environment!r} comes from a file, and dt-lens imports nothing that a file names; if "
                f"you trust the module {module!r}, import it yourself, or pass environment={environment!r} "
                "(--environment on the command line)."
            )
        import_module_of(environment)
    spec = gym.envs.registry.get(name) or gym.envs.registry.get(VERSIONS.get(name, name))
    if module == "__main__" and not (spec and _of_the_script(spec)):  # always imported, and never the same script
        raise DtLensError(
            f"The environment {environment!r} is of a script's own class, which dt-lens cannot find; register it, and "
            "pass environment= with its id (--environment on the command line)."
        )
    if spec is None:
        raise DtLensError(
            f"There is no Gymnasium environment {environment!r}; import the package that registers it, or pass "
            f"environment='package:{name}' (--environment on the command line)." + nearest(name, gym.envs.registry)
        )
    return spec


def _announced(module: str) -> bool:
    package = module.partition(".")[0]
    return any(package == entry.module.partition(".")[0] for group in GROUPS for entry in entry_points(group=group))


def _brought_by_an_extra(module: str, name: str) -> bool:
    """Whether this is the installed package of an extra, and not a folder of its name beside the weights.

    It must lie where packages are installed: a folder beside the weights can hold metadata of an installation too. One
    that is installed as a link to its source ("editable") is elsewhere, so the user imports it himself.

    Raises:
        DtLensError: if there is no such package.
    """
    if module not in EXTRAS:
        return False
    found = find_spec(module)
    if found is None:
        raise _lacking(name, module)
    return found.origin is not None and Path(found.origin).parent.parent.resolve() in _installed_in()


def _installed_in() -> set[Path]:
    """The folders that packages are installed in; the working directory, first on ``sys.path``, is none of them."""
    kept = [*site.getsitepackages(), site.getusersitepackages(), *map(sysconfig.get_path, ("purelib", "platlib"))]
    return {Path(folder).resolve() for folder in kept}


def _lacking(environment: str, module: str) -> DtLensError:
    return DtLensError(
        f"The environment {environment!r} needs the package {module}, which is not installed; "
        f"pip install 'dt-lens[{module}]'."
    )


def _of_the_script(spec: EnvSpec) -> bool:
    entry = spec.entry_point
    return (entry.partition(":")[0] if isinstance(entry, str) else getattr(entry, "__module__", "")) == "__main__"


def require_registered(spec: EnvSpec, kwargs: Mapping[str, Any]) -> None:
    """Raise ``DtLensError`` if a file gives a keyword that the environment is not registered with.

    Others, such as the path of a file or the name of a class to load, can do anything; the user may pass them himself.
    """
    if not isinstance(kwargs, FileKeywords):
        return
    for name, value in kwargs.items():
        if name not in spec.kwargs and not _is_minigrid_limit(spec, name, value):
            shown = repr(value)
            raise DtLensError(
                f"A file gives the environment {spec.id!r} the keyword {name}={shown[:80]}, which it is not registered "
                "with; if that is right, pass environment_kwargs= yourself (on the command line "
                "-g environment_kwargs=JSON, for train --environment-kwargs JSON)."
            )


def _is_minigrid_limit(spec: EnvSpec, name: str, value: object) -> bool:
    """Whether this is MiniGrid's own time limit, by which it scales rewards: as harmless as ``max_episode_steps``."""
    own = isinstance(spec.entry_point, str) and spec.entry_point.startswith("minigrid.")
    return own and name == "max_steps" and type(value) is int and 1 <= value <= LONGEST


def same_environment(one: str | None, other: str | None) -> bool:
    """Whether two names have one id, with or without the module that registers it.

    >>> same_environment("minigrid:MiniGrid-Empty-5x5-v0", "MiniGrid-Empty-5x5-v0")
    True
    >>> same_environment("Taxi-v3", "Taxi-v4")  # Gymnasium registers one of them
    True
    """
    if one is None or other is None:
        return False
    ids = (one.rpartition(":")[2], other.rpartition(":")[2])
    return ids[0] == ids[1] or VERSIONS.get(ids[0]) == ids[1]
