"""Many episodes side by side: one forward pass gives every lane its action, then every lane's environment steps.

The protocol is Chen et al.'s (2021): states normalised, the return-to-go starts at the target and falls by each reward,
the last ``context`` steps are visible, padded on the left. What an episode does is a function of its seed alone: the
lane it runs in, the episodes beside it and those before it must not change a single bit of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dt_lens.behaviour.agents.environment import Environment
from dt_lens.errors import DtLensError

__all__ = ["Conditions", "EpisodeCount", "Outcome", "Policy", "Start", "run_episodes"]

ACTIONS = 1954  # apart from other random numbers of the same seed

# Progress: how many episodes have finished, and the running ones' shares of the time limit, summed.
EpisodeCount = Callable[[int, float], None]


class Start(NamedTuple):
    """An episode to run: its seed, and which of the policy's arms (sets of edits) acts in it."""

    seed: int
    arm: int = 0


class Outcome(NamedTuple):
    """How one episode went."""

    seed: int
    total: float  # undiscounted return, in the environment's units
    length: int  # steps
    terminated: bool  # the environment ended it
    truncated: bool  # the time limit cut it
    more: tuple[float, ...] = ()  # what else the environment's ``measure`` gives, in the order of its ``measures``
    arm: int = 0  # which of the policy's arms acted

    @property
    def measures(self) -> tuple[float, ...]:
        """What was measured, in the order of the measures of a task's terms."""
        return (self.total, self.length, self.terminated, self.truncated, *self.more)


class Conditions(NamedTuple):
    """What the episodes of one evaluation share."""

    target_return: float  # in the environment's units
    return_scale: float
    state_mean: NDArray[np.float64]  # [state_dim]
    state_std: NDArray[np.float64]  # [state_dim]
    last_timestep: int  # the timestep table's last row; steps beyond it repeat it
    deterministic: bool = True  # the largest logit is taken; False: actions are sampled, by the episode's seed


class Policy(Protocol):
    """A batch of ``width`` windows; see ``dt_lens.behaviour.agents.windows``."""

    width: int

    def restart(self, row: int, arm: int = 0) -> None: ...

    def keep(self, rows: Sequence[int]) -> None: ...

    def act(self, states: Tensor, returns_to_go: Tensor, timesteps: Tensor, previous_actions: Tensor) -> Tensor: ...


class _Lane:
    """One environment and the episode that runs in it."""

    def __init__(self, made: Environment) -> None:
        self.made, self.env = made, made.make()
        self.seed = self.length = self.arm = 0
        self.total = 0.0
        self.measured: Callable[[], Mapping[str, float]] | None = None
        self.state = np.zeros(made.state_dim)
        self.rng = np.random.default_rng(0)

    def begin(self, seed: int, arm: int = 0) -> NDArray[np.float64]:
        self.seed, self.arm, self.length, self.total = seed, arm, 0, 0.0
        # Not the environment's own numbers: Gymnasium seeds its generator with the bare seed.
        self.rng = np.random.default_rng([ACTIONS, seed])
        observation, _ = self.env.reset(seed=seed)
        self.measured = None if self.made.measure is None else self.made.measure(self.env)
        return self._state(observation)

    def noise(self) -> NDArray[np.float64]:
        """``[act_dim]`` numbers that make the largest logit a sample from the softmax, the next of this episode.

        The Gumbel-max trick (Gumbel 1954; Maddison et al. 2014). An edited agent gets the same numbers at the same step
        as the unedited one, so that they differ only where the edit matters.
        """
        return self.rng.gumbel(size=self.made.act_dim)

    def step(self, action: Any) -> tuple[NDArray[np.float64], bool, bool]:
        observation, reward, terminated, truncated, _ = self.env.step(action)
        self.length += 1
        try:
            self.total += float(reward)
        except (TypeError, ValueError):
            self.total = math.nan
        # Also on the last step, which no action follows: a return of NaN would be ranked among the others.
        if not math.isfinite(self.total):
            raise self.not_finite(f"a reward that is not a finite number, or too large for the return ({reward!r})")
        truncated = bool(truncated) or self.length >= self.made.time_limit
        return self._state(observation), bool(terminated), truncated

    def _state(self, observation: Any) -> NDArray[np.float64]:
        self.state = self.made.state(observation)
        if not np.isfinite(self.state).all():
            raise self.not_finite(f"an observation that is not finite ({_few(self.state)})")
        return self.state

    def not_finite(self, what: str) -> DtLensError:
        return DtLensError(
            f"The environment {self.made.environment} gave {what} at step {self.length} of the episode with seed "
            f"{self.seed}; the episode has no return, so mend the environment or leave out that seed."
        )

    def outcome(self, terminated: bool, truncated: bool) -> Outcome:
        own = {} if self.measured is None else self.measured()
        more = tuple(float(own[name]) for name in self.made.measures)
        return Outcome(self.seed, self.total, self.length, terminated, truncated and not terminated, more, self.arm)


class _Inputs:
    """The next inputs of the policy, a row per lane."""

    def __init__(self, width: int, made: Environment, conditions: Conditions) -> None:
        self.conditions = conditions
        self.states = np.zeros((width, made.state_dim))
        self.earned = np.zeros((width, 1))
        self.timesteps = np.zeros(width, np.int64)
        self.actions = np.zeros((width, made.act_dim), np.float32)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c = self.conditions
        with np.errstate(over="ignore"):  # see _check_finite
            states = ((self.states - c.state_mean) / c.state_std).astype(np.float32)
        returns_to_go = ((c.target_return - self.earned) / c.return_scale).astype(np.float32)
        timesteps = np.minimum(self.timesteps, c.last_timestep)
        return (
            torch.from_numpy(states),
            torch.from_numpy(returns_to_go),
            torch.from_numpy(timesteps),
            torch.from_numpy(self.actions),
        )

    def keep(self, rows: Sequence[int]) -> None:
        index = np.asarray(rows)
        self.states, self.earned = self.states[index], self.earned[index]
        self.timesteps, self.actions = self.timesteps[index], self.actions[index]


def run_episodes(
    policy: Policy,
    made: Environment,
    conditions: Conditions,
    seeds: Iterator[int | Start],
    *,
    least_width: int | None = None,
    report: EpisodeCount | None = None,
) -> list[Outcome]:
    """Run an episode for every seed, ``policy.width`` at a time; an episode that ends is replaced by the next seed.

    Args:
        policy: fresh, with one row for each lane.
        made: the environment, and when an episode is cut.
        conditions: the target return, and how states and returns are scaled.
        seeds: given in order to lanes as they fall free; a ``Start`` also says which of the policy's arms acts.
        least_width: when the seeds run out the batch narrows as lanes fall free, but not below this; when omitted it
            never narrows and every episode stays in its row. Rows without an episode are computed and thrown away.
        report: called after every step.

    Returns:
        the outcomes, in the order in which the episodes ended.

    Raises:
        DtLensError: for a reward or an observation that is not finite, which names the environment, and for an action
            that is not finite.
    """
    inputs = _Inputs(policy.width, made, conditions)
    lanes: dict[int, _Lane] = {}  # by row
    outcomes: list[Outcome] = []

    def begin(row: int, start: int | Start) -> None:
        seed, arm = start if isinstance(start, Start) else Start(start)
        inputs.states[row] = lanes[row].begin(seed, arm)
        inputs.earned[row] = inputs.timesteps[row] = 0
        policy.restart(row, arm)

    try:
        for row in range(policy.width):
            seed = next(seeds, None)
            if seed is None:
                break
            lanes[row] = _Lane(made)
            begin(row, seed)
        while lanes:
            seen = inputs.tensors()
            predictions = policy.act(*seen).float().cpu().numpy()
            _check_finite(predictions, seen[0], lanes)
            if not conditions.deterministic:
                noise = np.zeros(predictions.shape)
                for row, lane in lanes.items():
                    noise[row] = lane.noise()
                predictions = predictions + noise
            actions, inputs.actions = made.actions(predictions)
            for row, lane in list(lanes.items()):
                state, terminated, truncated = lane.step(actions[row])
                if not (terminated or truncated):
                    inputs.states[row] = state
                    inputs.earned[row] = lane.total
                    inputs.timesteps[row] = lane.length
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
                report(len(outcomes), sum(lane.length for lane in lanes.values()) / made.time_limit)
    finally:
        for lane in lanes.values():
            lane.env.close()
    return outcomes


def _check_finite(predictions: NDArray[np.float32], states: Tensor, lanes: Mapping[int, _Lane]) -> None:
    if np.isfinite(predictions).all():
        return
    for row, lane in lanes.items():
        if not torch.isfinite(states[row]).all():  # a finite observation, divided by a small standard deviation
            raise lane.not_finite(f"an observation that is too large when normalised ({_few(lane.state)})")
        if not np.isfinite(predictions[row]).all():
            raise DtLensError(
                f"The model predicted an action that is not finite ({predictions[row].tolist()}) at step {lane.length} "
                f"of the episode with seed {lane.seed}; look for NaN, infinity or very large numbers in its weights."
            )


def _few(values: NDArray[np.float64]) -> str:
    """The first of the numbers of a state, as text."""
    shown = ", ".join(f"{value:g}" for value in values[:8])
    return f"[{shown}{', ...' if len(values) > 8 else ''}]"


def _narrow(policy: Policy, inputs: _Inputs, lanes: dict[int, _Lane], width: int) -> dict[int, _Lane]:
    """Move the rows with episodes to the front and drop the rows beyond ``width``."""
    rows = [*lanes, *(row for row in range(policy.width) if row not in lanes)][:width]
    policy.keep(rows)
    inputs.keep(rows)
    return dict(enumerate(lanes.values()))
