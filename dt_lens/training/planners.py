"""Policies that know their environment: the best actions of a table, or the shortest plan in a MiniGrid."""

from __future__ import annotations

from typing import Any, Protocol

import gymnasium as gym
import numpy as np

from dt_lens.behaviour.agents.minigrid_plans import DONE, is_minigrid
from dt_lens.behaviour.agents.tabular import Tabular
from dt_lens.errors import DtLensError

__all__ = ["Planner", "TablePlanner", "planner_for"]

Env = gym.Env[Any, Any]


class Planner(Protocol):
    """Says what to do in an environment, from all that the environment knows of itself."""

    wait: int | None
    """An action that does nothing but let a step pass; ``None`` if there is none."""

    def begin(self, env: Env) -> None:
        """Take note of a new episode; called after each reset."""

    def action(self, env: Env) -> int | None:
        """The action to take now; ``None`` if nothing leads to the goal any more."""

    def scatter(self, env: Env, rng: np.random.Generator) -> Any:
        """Move a new episode to a random state from which it goes on, and return its observation there."""


class TablePlanner:
    """The best actions by value iteration, in an environment whose dynamics are a table.

    Args:
        table: the dynamics; of equally good actions the first is taken.
    """

    wait: int | None = None

    def __init__(self, table: Tabular) -> None:
        self.policy = table.optimal_actions().argmax(1)
        # Not only where episodes start: a policy that never errs visits few of the others.
        self.states = np.flatnonzero(table.reachable)

    def begin(self, env: Env) -> None:
        if not hasattr(env.unwrapped, "s"):
            raise DtLensError(
                f"{getattr(env.spec, 'id', env)} does not say which state it is in (env.unwrapped.s, as Gymnasium's "
                "toy-text environments do), which its planner needs."
            )

    def action(self, env: Env) -> int:
        bare: Any = env.unwrapped
        return int(self.policy[bare.s])

    def scatter(self, env: Env, rng: np.random.Generator) -> int:
        if env.observation_space != env.unwrapped.observation_space:
            raise DtLensError(
                "scattered starts need the observations of the environment itself; leave out the wrappers that change "
                "them, or record with scattered=0 (--scattered 0)."
            )
        bare: Any = env.unwrapped
        bare.s = int(rng.choice(self.states))
        return int(bare.s)


def planner_for(env: Env) -> Planner | None:
    """A planner that knows the environment; ``None`` if there is none."""
    table = Tabular.of(env)
    if table is not None:
        return TablePlanner(table)
    if is_minigrid(env):
        from dt_lens.training.minigrid_planner import GridPlanner

        return GridPlanner(waits=getattr(env.action_space, "n", 0) > DONE)
    return None
