"""Many episodes side by side: one forward pass gives every lane its action, then every lane's environment steps.

The protocol is Chen et al.'s (2021): states normalised, the return-to-go starts at the target and falls by each reward,
the last ``context`` steps are in view, padded on the left. What an episode does is a function of its seed alone; which
lane it ran in, beside whom and after whom, must not show in a single bit of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dt_lens.behaviour.environment import Task
from dt_lens.errors import DtLensError

__all__ = ["Conditions", "Outcome", "Policy", "run_episodes"]


class Outcome(NamedTuple):
    """How one episode went."""

    seed: int
    total: float  # undiscounted return, in the environment's units
    length: int  # steps
    terminated: bool  # the environment ended it
    truncated: bool  # the time limit cut it


class Conditions(NamedTuple):
    """What the episodes of one evaluation share."""

    target_return: float  # in the environment's units
    return_scale: float
    state_mean: NDArray[np.float64]  # [state_dim]
    state_std: NDArray[np.float64]  # [state_dim]
    last_timestep: int  # rows of the timestep table, less one: later steps repeat it


class Policy(Protocol):
    """A batch of ``width`` windows; see ``dt_lens.behaviour.windows``."""

    width: int

    def restart(self, row: int) -> None: ...

    def keep(self, rows: Sequence[int]) -> None: ...

    def act(self, states: Tensor, returns_to_go: Tensor, timesteps: Tensor, previous_actions: Tensor) -> Tensor: ...


class _Lane:
    """One environment and the episode that runs in it."""

    def __init__(self, task: Task) -> None:
        self.task, self.env = task, task.make()
        self.seed = self.length = 0
        self.total = 0.0

    def begin(self, seed: int) -> NDArray[np.float64]:
        self.seed, self.length, self.total = seed, 0, 0.0
        observation, _ = self.env.reset(seed=seed)
        return self.task.state(self.env, observation)

    def step(self, action: Any) -> tuple[NDArray[np.float64], bool, bool]:
        observation, reward, terminated, truncated, _ = self.env.step(action)
        self.length += 1
        self.total += float(reward)
        truncated = bool(truncated) or self.length >= self.task.time_limit
        return self.task.state(self.env, observation), bool(terminated), truncated

    def outcome(self, terminated: bool, truncated: bool) -> Outcome:
        return Outcome(self.seed, self.total, self.length, terminated, truncated and not terminated)


class _Inputs:
    """What the policy is fed next, a row per lane, in arrays that torch shares."""

    def __init__(self, width: int, task: Task) -> None:
        self.states = np.zeros((width, task.state_dim), np.float32)
        self.returns_to_go = np.zeros((width, 1), np.float32)
        self.timesteps = np.zeros(width, np.int64)
        self.actions = np.zeros((width, task.act_dim), np.float32)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            torch.from_numpy(self.states),
            torch.from_numpy(self.returns_to_go),
            torch.from_numpy(self.timesteps),
            torch.from_numpy(self.actions),
        )

    def keep(self, rows: Sequence[int]) -> None:
        index = np.asarray(rows)
        self.states, self.returns_to_go = self.states[index], self.returns_to_go[index]
        self.timesteps, self.actions = self.timesteps[index], self.actions[index]


def run_episodes(
    policy: Policy,
    task: Task,
    conditions: Conditions,
    seeds: Iterator[int],
    *,
    least_width: int | None = None,
    report: Callable[[int, float], None] | None = None,
) -> list[Outcome]:
    """Run an episode for every seed, ``policy.width`` at a time; an episode that ends is replaced by the next seed.

    Args:
        policy: fresh, with one row for each lane.
        task: where.
        conditions: the target return and the units.
        seeds: handed out in order to lanes as they fall free.
        least_width: when the seeds run out the batch narrows as lanes fall free, but not below this; when omitted it
            never narrows and every episode stays in its row. Rows without an episode are computed and thrown away.
        report: called after every step with the number of episodes finished and the sum of the running ones' shares
            of the time limit.

    Returns:
        the outcomes, in the order in which the episodes ended.

    Raises:
        DtLensError: for an action that is not finite.
    """
    inputs = _Inputs(policy.width, task)
    lanes: dict[int, _Lane] = {}  # by row
    outcomes: list[Outcome] = []

    def begin(row: int, seed: int) -> None:
        _set_state(inputs, row, lanes[row].begin(seed), conditions)
        inputs.returns_to_go[row] = conditions.target_return / conditions.return_scale
        inputs.timesteps[row] = 0
        inputs.actions[row] = 0.0
        policy.restart(row)

    try:
        for row in range(policy.width):
            seed = next(seeds, None)
            if seed is None:
                break
            lanes[row] = _Lane(task)
            begin(row, seed)
        while lanes:
            predictions = policy.act(*inputs.tensors()).float().cpu().numpy()
            for row, lane in list(lanes.items()):
                action, taken = task.action(lane.env, _finite(predictions[row], lane))
                state, terminated, truncated = lane.step(action)
                if not (terminated or truncated):
                    _set_state(inputs, row, state, conditions)
                    left = (conditions.target_return - lane.total) / conditions.return_scale
                    inputs.returns_to_go[row] = left
                    inputs.timesteps[row] = min(lane.length, conditions.last_timestep)
                    inputs.actions[row] = taken
                    continue
                outcomes.append(lane.outcome(terminated, truncated))
                seed = next(seeds, None)
                if seed is None:
                    lanes.pop(row).env.close()
                else:
                    begin(row, seed)
            if lanes and least_width is not None and max(len(lanes), least_width) < policy.width:
                lanes = _narrow(policy, inputs, lanes, max(len(lanes), least_width))
            if report is not None:
                report(len(outcomes), sum(lane.length for lane in lanes.values()) / task.time_limit)
    finally:
        for lane in lanes.values():
            lane.env.close()
    return outcomes


def _set_state(inputs: _Inputs, row: int, state: NDArray[np.float64], conditions: Conditions) -> None:
    inputs.states[row] = (state - conditions.state_mean) / conditions.state_std


def _finite(prediction: NDArray[np.float32], lane: _Lane) -> NDArray[np.float32]:
    if not np.isfinite(prediction).all():
        raise DtLensError(
            f"The model predicted an action that is not finite ({prediction.tolist()}) at step {lane.length} of the "
            f"episode with seed {lane.seed}; look for NaN or infinity in its weights or in the states."
        )
    return prediction


def _narrow(policy: Policy, inputs: _Inputs, lanes: dict[int, _Lane], width: int) -> dict[int, _Lane]:
    """Move the busy rows up to the first ones and drop what lies beyond ``width``."""
    rows = [*lanes, *(row for row in range(policy.width) if row not in lanes)][:width]
    policy.keep(rows)
    inputs.keep(rows)
    return dict(enumerate(lanes.values()))
