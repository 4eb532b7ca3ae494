"""A policy that takes the shortest plan in a MiniGrid."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from dt_lens.behaviour.agents.minigrid_plans import DONE, ORDER, Plans, World
from dt_lens.errors import DtLensError

__all__ = ["GridPlanner"]


class GridPlanner:
    """Shortest plans for the grids that ``Plans`` knows, planned anew at each step.

    Args:
        waits: whether the environment has MiniGrid's action ``done``, which does nothing.
    """

    def __init__(self, waits: bool = True) -> None:
        self.wait: int | None = DONE if waits else None
        self._plans = Plans()

    def begin(self, env: gym.Env[Any, Any]) -> None:
        self._plans.forget()

    def steps_left(self, env: gym.Env[Any, Any]) -> int | None:
        """The steps of the shortest plan from here; ``None`` if there is none."""
        return self._plans.steps_left(World.of(env))

    def action(self, env: gym.Env[Any, Any]) -> int | None:
        best = self._plans.best(World.of(env))
        return None if best is None else next(action for action in ORDER if best[action])

    def scatter(self, env: gym.Env[Any, Any], rng: np.random.Generator) -> Any:
        raise DtLensError("MiniGrid's episodes start where the environment starts them; record with scattered=0.")
