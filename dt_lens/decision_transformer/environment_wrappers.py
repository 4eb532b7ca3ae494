"""What an environment has besides its id, as plain JSON values: constructor keywords, a time limit, wrappers.

``environment_kwargs`` are the keywords of ``gymnasium.make``. Two of them do not go to the constructor:

- ``max_episode_steps``: the time limit in place of the registered one, as Gymnasium has it; -1 for none;
- ``wrappers``: the innermost first, each as ``{"name": "gymnasium.wrappers.RescaleAction", "kwargs": {...}}``.

A wrapper is looked up by its name in ``gymnasium.wrappers`` or ``minigrid.wrappers``, unless the environment is
registered with it. An entry point that stands in a file is never imported.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeGuard

from dt_lens.arguments import as_json, whole_number
from dt_lens.errors import DtLensError, as_written, because, nearest
from dt_lens.lens.environment_names import FileKeywords, require_registered

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec, WrapperSpec

__all__ = ["APART", "check_environment_kwargs", "describe_environment", "environment_in_words", "specify"]

APART = ("max_episode_steps", "wrappers")  # what does not go to the constructor
PLACES = ("gymnasium.wrappers", "minigrid.wrappers")
# They record, draw or check an episode and leave what happens in it as it is.
WATCHING = {
    "AddWhiteNoise",
    "HumanRendering",
    "ObstructView",
    "OrderEnforcing",
    "PassiveEnvChecker",
    "RecordEpisodeStatistics",
    "RecordVideo",
    "RenderCollection",
}
REFUSED = {
    **dict.fromkeys(WATCHING, "only records, draws or checks episodes; leave it out"),
    **dict.fromkeys(
        ("NormalizeObservation", "NormalizeReward"),
        "has running statistics, which no specification records; register an environment that has them, and pass "
        "environment= (--environment on the command line)",
    ),
    "Autoreset": "starts the next episode by itself; leave it out",
}
MOST = 10_000  # frames, bins, pixels or steps that a wrapper takes: 10**9 frames end the process for want of memory
SIZES = ("tile_size", "agent_view_size", "max_words_in_mission")  # MiniGrid annotates none of its wrappers' arguments


def check_environment_kwargs(kwargs: Mapping[str, Any], name: str = "environment_kwargs") -> None:
    """Raise ``DtLensError`` unless ``max_episode_steps`` and ``wrappers``, if ``kwargs`` has them, have their form."""
    steps = kwargs.get("max_episode_steps")
    if steps is not None and steps != -1:
        whole_number(steps, f"max_episode_steps of {name}", 1)
    wrappers = kwargs.get("wrappers")
    if wrappers is None:
        return
    if not isinstance(wrappers, list | tuple) or not all(map(_is_wrapper, wrappers)):
        shown = repr(wrappers)
        raise DtLensError(
            f"wrappers of {name} is {shown if len(shown) <= 80 else shown[:80] + '...'}; it must be a list such as "
            "[{'name': 'gymnasium.wrappers.RescaleAction', 'kwargs': {'min_action': -1, 'max_action': 1}}]."
        )


def _is_wrapper(value: Any) -> bool:
    if not isinstance(value, Mapping) or not {"name"} <= set(value) <= {"name", "kwargs"}:
        return False
    kwargs = value.get("kwargs")
    named = isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)
    return isinstance(value["name"], str) and (kwargs is None or named)


def describe_environment(spec: EnvSpec) -> tuple[str, dict[str, Any]]:
    """A specification as an id and ``environment_kwargs``: what differs from the environment registered under its id.

    Where the id is not registered, everything is given. The id is ``"package:Id"`` where a package other than Gymnasium
    has the environment's class, since that package must be imported first, and where the id is registered here with a
    class of another package, which is another environment. ``render_mode`` is left out, and so are
    wrappers that only record, draw or check an episode. Arrays become lists.
    """
    import gymnasium as gym

    registered = gym.registry.get(spec.id)
    usual = {} if registered is None else as_json(registered.kwargs)
    kwargs = {name: value for name, value in as_json(spec.kwargs).items() if name not in usual or usual[name] != value}
    kwargs.pop("render_mode", None)
    wrappers = _described(spec.additional_wrappers)
    if registered is None or registered.max_episode_steps != spec.max_episode_steps:
        kwargs["max_episode_steps"] = -1 if spec.max_episode_steps is None else spec.max_episode_steps
    if wrappers != ([] if registered is None else _described(registered.additional_wrappers)):
        kwargs["wrappers"] = wrappers
    if registered is not None and _package(registered) != (package := _package(spec)):
        # Another class than the one that is registered here: its package is named, so that the user is asked.
        return spec.id if package in ("", "gymnasium") else f"{package}:{spec.id}", kwargs
    package = _package(spec) if isinstance(spec.entry_point, str) else ""
    # A package that is not imported, where its environment is registered, is not what registers it.
    unknown = package in ("", "__main__", "gymnasium") or (registered is not None and package not in sys.modules)
    return spec.id if unknown else f"{package}:{spec.id}", kwargs


def _package(spec: EnvSpec) -> str:
    """The first part of the name of the module that has the environment's class or function."""
    entry = spec.entry_point
    module = entry.partition(":")[0] if isinstance(entry, str) else str(getattr(entry, "__module__", ""))
    return module.partition(".")[0]


def _described(specs: Iterable[WrapperSpec]) -> list[dict[str, Any]]:
    found = []
    for spec in specs:
        module = spec.entry_point.partition(":")[0]
        place = next((place for place in PLACES if f"{module}.".startswith(f"{place}.")), module)
        if module.partition(".")[0] == "minari" or (place == PLACES[0] and spec.name in WATCHING):
            continue
        found.append({"name": f"{place}.{spec.name}", "kwargs": as_json(spec.kwargs)})
    return found


def specify(spec: EnvSpec, kwargs: Mapping[str, Any]) -> tuple[EnvSpec, dict[str, Any]]:
    """The specification that ``gymnasium.make`` takes, and the keywords that are left for the constructor.

    Args:
        spec: of the registered environment; it is not changed.
        kwargs: ``environment_kwargs``.

    Raises:
        DtLensError: for a keyword of a file's that the environment is not registered with; for a wrapper that is not in
            ``gymnasium.wrappers`` or ``minigrid.wrappers``, and that the environment is not registered with either, or
            whose arguments are not known.
    """
    check_environment_kwargs(kwargs)
    own = FileKeywords(kwargs) if isinstance(kwargs, FileKeywords) else dict(kwargs)
    steps, wrappers = own.pop("max_episode_steps", None), own.pop("wrappers", None)
    if isinstance(own, FileKeywords):
        own.pop("render_mode", None)  # a window to draw in
    require_registered(spec, own)
    if steps is not None:
        spec = replace(spec, max_episode_steps=None if steps == -1 else int(steps))
    if wrappers:
        if any(wrapper["name"].endswith(".AddRenderObservation") for wrapper in wrappers):
            own.setdefault("render_mode", "rgb_array")
        spec = replace(spec, additional_wrappers=_wrapper_specs(spec, own, wrappers))
    return spec, own


def _wrapper_specs(
    spec: EnvSpec, own: Mapping[str, Any], wrappers: Iterable[Mapping[str, Any]]
) -> tuple[WrapperSpec, ...]:
    """The wrappers that the environment is registered with, and those of ``wrappers`` that are not among them."""
    wanted = list(wrappers)
    has = _made_with(spec, own)
    known = _described(has)
    first = [{"name": wrapper["name"], "kwargs": as_json(wrapper.get("kwargs"))} for wrapper in wanted[: len(known)]]
    rest = wanted[len(known) :] if first == known else wanted
    return (*has, *(_look_up(spec.id, wrapper) for wrapper in rest))


def _made_with(spec: EnvSpec, own: Mapping[str, Any]) -> tuple[WrapperSpec, ...]:
    """The wrappers that the environment has as it is registered; a registered function may wrap what it makes."""
    import gymnasium as gym

    try:
        env: gym.Env[Any, Any] = gym.make(spec, disable_env_checker=True, **own)
    except (Exception, SystemExit):
        return spec.additional_wrappers  # whoever makes it in earnest says why it cannot be made
    try:
        return spec.additional_wrappers if env.spec is None else env.spec.additional_wrappers
    finally:
        env.close()


def _look_up(environment: str, wrapper: Mapping[str, Any]) -> WrapperSpec:
    from gymnasium.envs.registration import WrapperSpec

    shown, kwargs = f"The wrapper {wrapper['name']!r} of {environment!r}", wrapper.get("kwargs")
    place, _, name = wrapper["name"].rpartition(".")
    if place not in PLACES:
        raise DtLensError(
            f"{shown} is in neither {' nor '.join(PLACES)}, and dt-lens imports nothing that a file names; register an "
            "environment that has it, and pass environment= (--environment on the command line)."
        )
    if name in REFUSED:
        raise DtLensError(f"{shown} {REFUSED[name]}.")
    try:
        module = importlib.import_module(place)
        kind = getattr(module, name, None)
    except ImportError as error:
        raise DtLensError(f"{shown} cannot be imported ({because(error)}); install what it needs.") from error
    if not _is_of(kind, place):
        known = [known for known, value in vars(module).items() if _is_of(value, place) and known not in REFUSED]
        raise DtLensError(f"{shown} is not a wrapper of {place}.{nearest(name, known)}")
    takes = [p for p in inspect.signature(kind).parameters.values() if p.name != "env"]
    if kwargs is None and takes:
        raise DtLensError(
            f"{shown} was used with arguments that its data set does not record; pass environment_kwargs= with its "
            f"kwargs ({', '.join(p.name for p in takes)}), or register an environment that has it and pass "
            "environment= (--environment on the command line)."
        )
    given = dict(kwargs or {})
    given |= {p.name: _taken(shown, p, given[p.name]) for p in takes if p.name in given}
    return WrapperSpec(name, f"{kind.__module__}:{kind.__name__}", given)


def _is_of(kind: Any, place: str) -> TypeGuard[type[Any]]:
    """Whether this is a wrapper that ``place`` itself has, not one that it imports."""
    import gymnasium as gym

    return isinstance(kind, type) and issubclass(kind, gym.Wrapper) and f"{kind.__module__}.".startswith(f"{place}.")


def _taken(shown: str, parameter: inspect.Parameter, value: Any) -> Any:
    """An argument as the wrapper takes it: a function, an array or a tuple, which JSON has as text or as lists."""
    import numpy as np

    kind = str(parameter.annotation)
    if "Callable" in kind and isinstance(value, str):
        raise DtLensError(
            f"{shown} takes a function as {parameter.name}, which no file records; pass environment_kwargs= with it in "
            "Python, or register an environment that has it and pass environment= (--environment on the command line)."
        )
    if (kind.startswith(("int", "tuple[int")) or parameter.name in SIZES) and parameter.name != APART[0]:
        for size in value if isinstance(value, list | tuple) else [value]:
            if isinstance(size, int) and size > MOST:
                raise DtLensError(f"{shown} has {parameter.name}={as_written(size)}; it must be at most {MOST:,}.")
    if isinstance(value, list):
        tuples = "tuple" in kind or isinstance(parameter.default, tuple)
        return np.asarray(value) if "ndarray" in kind else tuple(value) if tuples else value
    return value


def environment_in_words(kwargs: Mapping[str, Any]) -> str:
    """``environment_kwargs`` as one line, empty if there are none.

    >>> environment_in_words({"g": 5.0, "wrappers": [{"name": "gymnasium.wrappers.RescaleAction",
    ...     "kwargs": {"min_action": -1, "max_action": 1}}], "max_episode_steps": 40})
    'g=5.0, max_episode_steps=40, RescaleAction(min_action=-1, max_action=1)'
    """
    shown = {name: value for name, value in kwargs.items() if name != "wrappers" and (name, value) != (APART[0], None)}
    parts = [f"{name}={value}" for name, value in shown.items()]
    for wrapper in kwargs.get("wrappers") or ():
        given = ", ".join(f"{name}={value}" for name, value in (wrapper.get("kwargs") or {}).items())
        parts.append(f"{wrapper['name'].rpartition('.')[2]}({given})")
    return ", ".join(parts)
