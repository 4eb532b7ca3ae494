"""MiniGrid's environments with the agent's view as one flat vector, which is what MiniGrid decision transformers read.

Importing this registers ``Flat/<id>`` for every id that MiniGrid registers, and the memory task of fixed start that
jbloomAus/DecisionTransformerInterpretability trains in, which MiniGrid does not have. So an environment is made by
``gymnasium.make("dt_lens_adapters.minigrid_environments:Flat/MiniGrid-Empty-5x5-v0", one_hot=True)``.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from einops import rearrange
from numpy.typing import NDArray

try:
    from minigrid.envs import MemoryEnv
    from minigrid.wrappers import FullyObsWrapper, OneHotPartialObsWrapper, ViewSizeWrapper
except ImportError as error:
    raise ImportError("it needs the package minigrid, which pip install 'dt-lens[minigrid]' brings") from error

__all__ = ["FixedStartMemory", "FlatView", "make"]

FIXED_START = "MiniGrid-MemoryS7FixedStart-v0"


class FixedStartMemory(MemoryEnv):  # type: ignore[misc]  # untyped
    """MiniGrid's memory task with the agent always at the far left of its hallway, looking down it."""

    def _gen_grid(self, width: int, height: int) -> None:
        super()._gen_grid(width, height)
        self.agent_pos, self.agent_dir = np.array((1, height // 2)), 0


class FlatView(gym.ObservationWrapper[NDArray[np.uint8], int, dict[str, Any]], gym.utils.RecordConstructorArgs):
    """The view ``image [x, y, channel]`` as a vector in the order (channel, x, y); direction and mission are dropped.

    In the agent's own view it stands at the middle of the largest y, and looks towards smaller ones.
    """

    def __init__(self, env: gym.Env[dict[str, Any], int]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        space = env.observation_space
        assert isinstance(space, gym.spaces.Dict)
        size = int(np.prod(space["image"].shape or ()))
        self.observation_space = gym.spaces.Box(0, 255, (size,), np.uint8)

    def observation(self, observation: dict[str, Any]) -> NDArray[np.uint8]:
        flat: NDArray[np.uint8] = rearrange(observation["image"], "x y channel -> (channel x y)")
        return flat


def make(
    env_id: str,
    *,
    one_hot: bool = False,
    fully_observed: bool = False,
    view_size: int = 7,
    max_steps: int | None = None,
    **options: Any,
) -> gym.Env[NDArray[np.uint8], int]:
    """A MiniGrid environment with a flat view.

    Args:
        env_id: MiniGrid's own id.
        one_hot: 20 channels (11 objects, 6 colours, 3 door states) instead of 3 numbers.
        fully_observed: the whole grid instead of what the agent sees.
        view_size: cells on a side of the view.
        max_steps: MiniGrid's own time limit, by which a success' reward is scaled; the environment's by default.
        options: MiniGrid's own, such as ``render_mode``.
    """
    if max_steps is not None:
        options["max_steps"] = max_steps
    # Looked up, not named: a checkpoint's own options may name another id, and "module:Id" would import the module.
    if env_id not in gym.registry:
        raise ValueError(f"there is no environment {env_id!r} of MiniGrid's")
    env: Any = gym.make(gym.registry[env_id], disable_env_checker=True, **options)
    if fully_observed:
        env = FullyObsWrapper(env)
    if view_size != 7:
        env = ViewSizeWrapper(env, agent_view_size=view_size)
    if one_hot:
        env = OneHotPartialObsWrapper(env)
    return FlatView(env)


def _register() -> None:
    if FIXED_START not in gym.envs.registry:
        gym.register(FIXED_START, f"{__name__}:FixedStartMemory", kwargs={"size": 7, "max_steps": 50})
    for env_id in [name for name in gym.envs.registry if name.startswith("MiniGrid-")]:
        if f"Flat/{env_id}" not in gym.envs.registry:
            # All options of ``make``: a checkpoint may set those with which the environment is registered.
            options = {"one_hot": False, "fully_observed": False, "view_size": 7, "max_steps": None}
            gym.register(f"Flat/{env_id}", f"{__name__}:make", kwargs={"env_id": env_id, **options})


_register()
