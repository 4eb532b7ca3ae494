"""Environments that wait for the next run in this process, where making one takes longer than an episode.

A lane runs one episode after the other in the same environment, so one that has been used is as good as a new one: all
that an episode depends on is set by its reset. Only ``TaxiEnv`` is kept: it lists its 3,000 transitions when it is
made, which takes as long as dozens of steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from dt_lens.behaviour.agents.environment import Env, Environment
from dt_lens.behaviour.agents.physics import bare

__all__ = ["keep", "take"]

MOST = 16  # environments of one kind
_KEPT = "gymnasium.envs.toy_text.taxi.TaxiEnv"
_idle: dict[str, list[Env]] = {}


def take(made: Environment) -> Env:
    """An environment of ``made``: one that waits, or a new one."""
    waiting = _idle.get(_key(made), [])
    return waiting.pop() if waiting else made.make()


def keep(made: Environment, envs: Sequence[Env]) -> None:
    """Keep those of ``envs`` that may be used again, and close the others."""
    key = _key(made)
    for env in envs:
        kind = type(bare(env, made.time_limit))
        waiting = _idle.setdefault(key, []) if key and f"{kind.__module__}.{kind.__qualname__}" == _KEPT else None
        if waiting is None or len(waiting) >= MOST:
            env.close()
        else:
            waiting.append(env)


def _key(made: Environment) -> str:
    """What decides how an environment is made, as text; empty where it may not be used again."""
    spec = made.spec
    if type(made) is not Environment or made.measure is not None or spec.additional_wrappers:
        return ""
    try:
        return json.dumps(
            [spec.entry_point, spec.max_episode_steps, spec.order_enforce, spec.kwargs, dict(made.kwargs)]
        )
    except (TypeError, ValueError):  # what JSON does not know has no text that repeats
        return ""
