"""An environment of somebody's own: a cart on a rail. docs/own_environment.md explains it."""

import gymnasium
import numpy as np


class Rail(gymnasium.Env):
    """A cart on a rail: stay near the middle."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # results repeat only if all chance comes from this seed
        self.state = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.state.copy(), {}

    def step(self, action):
        position, speed = self.state
        speed = np.clip(speed + 0.2 * float(action[0]), -2, 2)
        position = position + 0.1 * speed
        self.state = np.array([position, speed], np.float32)
        return self.state.copy(), float(1 - abs(position)), bool(abs(position) > 2), False, {}


gymnasium.register("Rail-v0", entry_point="rail:Rail", max_episode_steps=60)
