"""Steps the environments of several lanes, without the wrappers and checks that change no bit of an episode.

``gymnasium.make`` wraps an environment in checks that a finished loop does not need, and in a time limit that the loop
counts itself. Where such a wrapper is outermost it is left out of the steps; resets go through all of them. Hopper,
Walker2d, HalfCheetah and Swimmer also compute rewards, observations and ends in Python, one environment at a time:
``_Runners`` does the same arithmetic for all lanes at once, and leaves out what only ``info`` and contact forces need.

Whatever is not known, such as another wrapper, a subclass, a changed method or another text of Gymnasium's own, runs as
it stands. ``tests/behaviour/agents/test_physics.py`` steps both ways and compares the bits.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from numpy.typing import NDArray

from dt_lens.behaviour.agents.environment import Env, Environment

__all__ = ["Physics", "Steps", "bare", "physics_of"]

# Of each row that was stepped: its reward as the environment gave it, and whether the environment ended or cut it.
Steps = tuple[
    Sequence[Any] | NDArray[np.float64], Sequence[bool] | NDArray[np.bool_], Sequence[bool] | NDArray[np.bool_]
]


def bare(env: Any, time_limit: int) -> Any:
    """``env`` without its outermost wrappers that change nothing of an episode which is cut after ``time_limit``."""
    while True:
        if type(env) is TimeLimit:
            if not env._max_episode_steps >= time_limit:
                return env
        elif type(env) not in (OrderEnforcing, PassiveEnvChecker):
            return env
        if "step" in vars(env):  # somebody has replaced it
            return env
        env = env.env


class Physics:
    """The environments of the rows of a batch, stepped one after the other."""

    def __init__(self, made: Environment, envs: Sequence[Env]) -> None:
        self.made, self.envs = made, list(envs)
        # What measures an episode may look into any wrapper, and may replace ``step``: so none is left out, and
        # ``step`` is looked up each time.
        self._stepped = [env if made.measure is not None else bare(env, made.time_limit) for env in envs]

    def begun(self, row: int) -> None:
        """The environment of ``row`` has been reset."""

    def step(self, rows: Sequence[int], actions: Sequence[Any], states: NDArray[np.float64]) -> Steps:
        """Step the environments of ``rows``, with ``actions[row]``, and write what they are in to ``states[row]``."""
        rewards: list[Any] = []
        terminated, truncated = list[bool](), list[bool]()
        for row in rows:
            observation, reward, ended, cut, _ = self._stepped[row].step(actions[row])
            states[row] = self.made.state(observation)
            rewards.append(reward)
            terminated.append(bool(ended))
            truncated.append(bool(cut))
        return rewards, terminated, truncated

    def keep(self, rows: Sequence[int]) -> None:
        """Keep ``rows``, in that order; a row that never had an environment may be among them."""
        self._stepped = [self._stepped[row] for row in rows if row < len(self._stepped)]
        self.envs = [self.envs[row] for row in rows if row < len(self.envs)]


class _Runners(Physics):
    """MuJoCo's bodies that run along x: Hopper, Walker2d, HalfCheetah and Swimmer (version 5), all of one class."""

    def __init__(self, made: Environment, envs: Sequence[Env]) -> None:
        from mujoco import mj_step

        super().__init__(made, envs)
        self._mj_step = mj_step
        bases: list[Any] = [env.unwrapped for env in envs]
        base = bases[0]
        name = type(base).__name__
        self._constants = constants = {key: getattr(base, key) for key in _CONSTANTS if hasattr(base, key)}
        self._dt, self._frame_skip = base.dt, base.frame_skip
        excluded = bool(constants["_exclude_current_positions_from_observation"])
        self._skipped = (2 if name == "SwimmerEnv" else 1) * excluded
        self._clipped = name in ("HopperEnv", "Walker2dEnv")
        self._arrays = [(b.model, b.data, b.data.ctrl, b.data.qpos, b.data.qvel) for b in bases]
        self._qpos = np.zeros((len(bases), base.model.nq))
        self._qvel = np.zeros((len(bases), base.model.nv))
        for row in range(len(bases)):
            self.begun(row)

    def begun(self, row: int) -> None:
        self._qpos[row], self._qvel[row] = self._arrays[row][3:]

    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        self._arrays = [self._arrays[row] for row in rows if row < len(self._arrays)]
        kept = [row for row in rows if row < len(self._qpos)]
        self._qpos, self._qvel = self._qpos[kept], self._qvel[kept]

    def step(self, rows: Sequence[int], actions: Sequence[Any], states: NDArray[np.float64]) -> Steps:
        before = self._qpos[:, 0].copy()
        for row in rows:
            model, data, ctrl, qpos, qvel = self._arrays[row]
            ctrl[:] = actions[row]
            self._mj_step(model, data, self._frame_skip)
            self._qpos[row] = qpos
            self._qvel[row] = qvel
        index = slice(None) if len(rows) == len(self._qpos) else np.asarray(rows)
        qpos, qvel = self._qpos[index], self._qvel[index]
        positions = qpos[:, self._skipped :]
        written = states[: len(self._qpos)]
        written[index, : positions.shape[1]] = positions
        written[index, positions.shape[1] :] = np.clip(qvel, -10, 10) if self._clipped else qvel
        known, healthy = self._constants, None
        rewards = known["_forward_reward_weight"] * ((qpos[:, 0] - before[index]) / self._dt)
        if self._clipped:
            healthy = self._healthy(qpos, qvel)
            rewards = rewards + healthy * known["_healthy_reward"]
        taken = np.stack([actions[row] for row in rows])  # float32, as the environment squares and weighs them
        rewards = rewards - known["_ctrl_cost_weight"] * np.square(taken).sum(axis=1)
        if healthy is None or not known["_terminate_when_unhealthy"]:
            return rewards, _never(len(rows)), _never(len(rows))
        return rewards, ~healthy, _never(len(rows))

    def _healthy(self, qpos: NDArray[np.float64], qvel: NDArray[np.float64]) -> NDArray[np.bool_]:
        def within(values: NDArray[np.float64], limits: tuple[float, float]) -> NDArray[np.bool_]:
            return (limits[0] < values) & (values < limits[1])

        known = self._constants
        found = within(qpos[:, 1], known["_healthy_z_range"]) & within(qpos[:, 2], known["_healthy_angle_range"])
        if "_healthy_state_range" not in known:
            return found
        limits = known["_healthy_state_range"]
        return found & within(qpos[:, 2:], limits).all(axis=1) & within(qvel, limits).all(axis=1)


@functools.lru_cache(maxsize=32)
def _never(n: int) -> NDArray[np.bool_]:
    return np.zeros(n, dtype=bool)


def physics_of(made: Environment, envs: Sequence[Env]) -> Physics:
    """What steps ``envs``, all made by ``made``."""
    return (_Runners if made.measure is None and _all_known(made, envs) else Physics)(made, envs)


# All that Gymnasium's classes compute a step from, by the class: a digest of these methods' texts.
_METHODS = (
    ("step", "_get_obs", "_get_rew", "control_cost", "healthy_reward", "is_healthy"),
    ("do_simulation", "_step_mujoco_simulation", "state_vector", "dt"),
)
_CONSTANTS = (
    "_forward_reward_weight",
    "_ctrl_cost_weight",
    "_exclude_current_positions_from_observation",
    "_healthy_reward",
    "_terminate_when_unhealthy",
    "_healthy_state_range",
    "_healthy_z_range",
    "_healthy_angle_range",
    "frame_skip",
    "dt",
)
_KNOWN = {
    "gymnasium.envs.mujoco.half_cheetah_v5.HalfCheetahEnv": "c3465cf5cba2e8ce",
    "gymnasium.envs.mujoco.hopper_v5.HopperEnv": "dc454d8463f531ac",
    "gymnasium.envs.mujoco.swimmer_v5.SwimmerEnv": "231ded46de85a534",
    "gymnasium.envs.mujoco.walker2d_v5.Walker2dEnv": "97ea9d0097931d46",
}


def _all_known(made: Environment, envs: Sequence[Env]) -> bool:
    """Whether ``_Runners`` computes what the steps of these environments do."""
    bases: list[Any] = [bare(env, made.time_limit) for env in envs]
    kind: Any = type(bases[0])
    named = f"{kind.__module__}.{kind.__qualname__}"
    if named not in _KNOWN or _digest(kind) != _KNOWN[named] or any(type(base) is not kind for base in bases):
        return False
    first = _constants(bases[0])
    own = {*_METHODS[0], *_METHODS[1]}
    return (
        first is not None
        and all(_constants(base) == first for base in bases)
        and not any(own & vars(base).keys() or base.render_mode is not None for base in bases)
        and made.action_space.dtype == np.float32
        and len(made.states.parts) == 1
    )


def _constants(base: Any) -> list[Any] | None:
    """What the arithmetic reads of one environment; ``None`` unless these are Python's own numbers, or pairs of them.

    A NumPy number would make other numbers of ``float32`` actions.
    """
    found = [getattr(base, name, None) for name in _CONSTANTS]
    plain = (float, int, bool, type(None))
    flat = [number for value in found for number in (value if type(value) is tuple else (value,))]
    return found if all(type(number) in plain for number in flat) else None


@functools.lru_cache(maxsize=32)
def _digest(kind: Any) -> str:
    """A digest of the text of the methods that a step of this class runs; empty where it has none to read."""
    texts = []
    try:
        for name in (*_METHODS[0], *_METHODS[1]):
            method = inspect.getattr_static(kind, name, None)
            function = method.fget if isinstance(method, property) else method
            if hasattr(function, "__wrapped__"):  # the text is not that of what runs
                return ""
            texts.append("" if function is None else inspect.getsource(function))
    except (OSError, TypeError):
        return ""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
