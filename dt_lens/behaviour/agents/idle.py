"""Environments that wait for the next run in this process, where making one takes longer than an episode.

A lane runs one episode after the other in the same environment, so one that has been used is as good as a new one if
all that an episode depends on is set by its reset, and if a new one would be made the same way. Both are known of
Gymnasium's own ``TaxiEnv`` alone, so only it is kept: it lists its 3,000 transitions when it is made, which takes as
long as dozens of steps. What another entry point returns may change from call to call, and a class may be patched.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from typing import Any

from dt_lens.behaviour.agents.environment import Env, Environment
from dt_lens.behaviour.agents.physics import bare

__all__ = ["keep", "take"]

MOST = 16  # environments of one kind
_MODULE, _NAME = "gymnasium.envs.toy_text.taxi", "TaxiEnv"
_idle: dict[str, list[Env]] = {}


def take(made: Environment) -> Env:
    """An environment of ``made``: one that waits, or a new one."""
    waiting = _idle.get(_key(made), [])
    return waiting.pop() if waiting else made.make()


def keep(made: Environment, envs: Sequence[Env]) -> None:
    """Keep those of ``envs`` that may be used again, and close the others."""
    key, own = _key(made), _gymnasiums_own()
    for env in envs:
        kept = key and type(bare(env, made.time_limit)) is own
        waiting = _idle.setdefault(key, []) if kept else None
        if waiting is None or len(waiting) >= MOST:
            env.close()
        else:
            waiting.append(env)


def _key(made: Environment) -> str:
    """What decides how an environment is made, as text; empty where it may not be used again."""
    spec = made.spec
    if type(made) is not Environment or made.measure is not None or spec.additional_wrappers:
        return ""
    if spec.entry_point != f"{_MODULE}:{_NAME}" or _gymnasiums_own() is None:
        return ""
    try:
        return json.dumps([spec.max_episode_steps, spec.order_enforce, spec.kwargs, dict(made.kwargs)])
    except (TypeError, ValueError):  # what JSON does not know has no text that repeats
        return ""


def _gymnasiums_own() -> Any:
    """``TaxiEnv`` as Gymnasium wrote it; ``None`` where somebody has replaced it, or a function of it."""
    module = sys.modules.get(_MODULE)
    kind: Any = getattr(module, _NAME, None)
    if module is None or (getattr(kind, "__module__", ""), getattr(kind, "__qualname__", "")) != (_MODULE, _NAME):
        return None
    functions = [kind.__init__, kind.step, kind.reset, *filter(inspect.isfunction, vars(kind).values())]
    # A function's globals say which module's text it is of, whatever name functools.wraps has given it.
    return kind if all(getattr(f, "__globals__", None) is vars(module) for f in functions) else None
