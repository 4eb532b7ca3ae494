"""Many episodes side by side: one forward pass gives every lane its action, then every lane's environment steps.

The protocol is Chen et al.'s (2021): states normalised, the return-to-go starts at the target and falls by each reward,
the last ``context`` steps are visible, padded on the left. What an episode does is a function of its seed alone: the
lane it runs in, the episodes beside it and those before it must not change a single bit of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dt_lens.behaviour.agents.environment import Env, Environment
from dt_lens.behaviour.agents.idle import keep, take
from dt_lens.behaviour.agents.physics import physics_of
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


class _Lanes:
    """The episodes that run side by side, a row each, and the next inputs of the policy."""

    def __init__(self, width: int, made: Environment, conditions: Conditions, envs: Sequence[Env]) -> None:
        self.made, self.conditions = made, conditions
        self.physics = physics_of(made, envs)
        self.running: list[int] = []  # rows with an episode
        self.starts = [Start(0)] * width
        self.states = np.zeros((width, made.state_dim))
        self.totals = np.zeros(width)
        self.lengths = np.zeros(width, np.int64)
        self.actions = np.zeros((width, made.act_dim), np.float32)
        self._measured: dict[int, Callable[[], Mapping[str, float]]] = {}
        self._rngs: dict[int, np.random.Generator] = {}
        # Dividing by one changes no bit.
        self._as_they_are = not np.any(conditions.state_mean) and bool(np.all(conditions.state_std == 1))

    def begin(self, row: int, start: Start) -> None:
        self.starts[row], self.lengths[row], self.totals[row] = start, 0, 0.0
        if not self.conditions.deterministic:
            # Not the environment's own numbers: Gymnasium seeds its generator with the bare seed.
            self._rngs[row] = np.random.default_rng([ACTIONS, start.seed])
        env = self.physics.envs[row]
        observation, _ = env.reset(seed=start.seed)
        if self.made.measure is not None:
            self._measured[row] = self.made.measure(env)
        self.physics.begun(row)
        self.states[row] = self.made.state(observation)
        self._check_observations([row])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What ``Policy.act`` takes."""
        c, states = self.conditions, self.states
        with np.errstate(over="ignore"):  # see _check_predictions
            states = (states if self._as_they_are else (states - c.state_mean) / c.state_std).astype(np.float32)
        returns_to_go = ((c.target_return - self.totals[:, None]) / c.return_scale).astype(np.float32)
        timesteps = np.minimum(self.lengths, c.last_timestep)
        return (
            torch.from_numpy(states),
            torch.from_numpy(returns_to_go),
            torch.from_numpy(timesteps),
            torch.from_numpy(self.actions),
        )

    def choose(self, predictions: NDArray[np.float32], states: Tensor) -> Sequence[Any]:
        """The rows' actions, as ``env.step`` takes them; ``states`` are those that were predicted from."""
        self._check_predictions(predictions, states)
        chosen: NDArray[Any] = predictions
        if self._rngs:
            # The Gumbel-max trick (Gumbel 1954; Maddison et al. 2014) makes the largest logit a sample from the
            # softmax. An edited agent gets the same numbers at the same step as the unedited one, so that they differ
            # only where the edit matters.
            noise = np.zeros(predictions.shape)
            for row in self.running:
                noise[row] = self._rngs[row].gumbel(size=self.made.act_dim)
            chosen = predictions + noise
        actions, self.actions = self.made.actions(chosen)
        return actions

    def step(self, actions: Sequence[Any]) -> list[tuple[int, bool, bool]]:
        """Step the environments; gives the rows whose episode has ended, and whether it was terminated or cut."""
        rows = self.running
        rewards, terminated, truncated = self.physics.step(rows, actions, self.states)
        self.lengths[rows] += 1
        with np.errstate(over="ignore", invalid="ignore"):
            self.totals[rows] += _numbers(rewards)
        # Also on the last step, which no action follows: a return of NaN would be ranked among the others.
        if not np.isfinite(self.totals[rows]).all():
            place = int(np.argmin(np.isfinite(self.totals[rows])))
            self._check_observations(rows[:place])
            what = f"a reward that is not a finite number, or too large for the return ({rewards[place]!r})"
            raise self._not_finite(rows[place], what)
        self._check_observations(rows)
        cut = np.asarray(truncated) | (self.lengths[rows] >= self.made.time_limit)
        ended = np.asarray(terminated) | cut
        return [(rows[i], bool(terminated[i]), bool(cut[i])) for i in map(int, np.flatnonzero(ended))]

    def outcome(self, row: int, terminated: bool, truncated: bool) -> Outcome:
        own = self._measured[row]() if row in self._measured else {}
        more = tuple(float(own[name]) for name in self.made.measures)
        total, length = float(self.totals[row]), int(self.lengths[row])
        seed, arm = self.starts[row]
        return Outcome(seed, total, length, terminated, truncated and not terminated, more, arm)

    def keep(self, rows: Sequence[int]) -> None:
        """Narrow the batch to ``rows``, in that order: those with an episode come first."""
        index = np.asarray(rows)
        self.states, self.totals, self.lengths = self.states[index], self.totals[index], self.lengths[index]
        self.actions, self.starts = self.actions[index], [self.starts[row] for row in rows]
        self._measured = {new: self._measured[old] for new, old in enumerate(rows) if old in self._measured}
        self._rngs = {new: self._rngs[old] for new, old in enumerate(rows) if old in self._rngs}
        self.running = list(range(len(self.running)))
        self.physics.keep(rows)

    def _check_observations(self, rows: Sequence[int]) -> None:
        states = self.states[rows]
        if not np.isfinite(states).all():
            place = int(np.argmin(np.isfinite(states).all(axis=1)))
            raise self._not_finite(rows[place], f"an observation that is not finite ({_few(states[place])})")

    def _check_predictions(self, predictions: NDArray[np.float32], states: Tensor) -> None:
        if np.isfinite(predictions).all():
            return
        for row in self.running:
            if not torch.isfinite(states[row]).all():  # a finite observation, divided by a small standard deviation
                what = f"an observation that is too large when normalised ({_few(self.states[row])})"
                raise self._not_finite(row, what)
            if not np.isfinite(predictions[row]).all():
                raise DtLensError(
                    f"The model predicted an action that is not finite ({predictions[row].tolist()}) at step "
                    f"{self.lengths[row]} of the episode with seed {self.starts[row].seed}; look for NaN, infinity or "
                    "very large numbers in its weights."
                )

    def _not_finite(self, row: int, what: str) -> DtLensError:
        return DtLensError(
            f"The environment {self.made.environment} gave {what} at step {self.lengths[row]} of the episode with seed "
            f"{self.starts[row].seed}; the episode has no return, so mend the environment or leave out that seed."
        )


def _numbers(rewards: Sequence[Any] | NDArray[np.float64]) -> NDArray[np.float64]:
    """``rewards`` as numbers, NaN for what is none."""
    if isinstance(rewards, np.ndarray):
        return rewards
    found = np.empty(len(rewards))
    for place, reward in enumerate(rewards):
        try:
            found[place] = float(reward)
        except (TypeError, ValueError):
            found[place] = math.nan
    return found


def run_episodes(
    policy: Policy,
    made: Environment,
    conditions: Conditions,
    seeds: Iterator[int | Start],
    *,
    least_width: int | None = None,
    report: EpisodeCount | None = None,
    ended: Callable[[Outcome], None] | None = None,
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
        ended: called with the outcome of each episode as it ends.

    Returns:
        the outcomes, in the order in which the episodes ended.

    Raises:
        DtLensError: for a reward or an observation that is not finite, which names the environment, and for an action
            that is not finite.
    """
    first = list(islice(seeds, policy.width))
    envs: list[Env] = []
    outcomes: list[Outcome] = []
    try:
        for _ in first:
            envs.append(take(made))
        if not envs:
            return outcomes
        lanes = _Lanes(policy.width, made, conditions, envs)

        def begin(row: int, seed: int | Start) -> None:
            start = seed if isinstance(seed, Start) else Start(seed)
            lanes.begin(row, start)
            policy.restart(row, start.arm)

        for row, seed in enumerate(first):
            begin(row, seed)
        lanes.running = list(range(len(first)))
        while lanes.running:
            seen = lanes.tensors()
            predictions = policy.act(*seen).float().cpu().numpy()
            over = lanes.step(lanes.choose(predictions, seen[0]))
            for row, terminated, truncated in over:
                outcomes.append(lanes.outcome(row, terminated, truncated))
                if ended is not None:
                    ended(outcomes[-1])
                following = next(seeds, None)
                if following is None:
                    lanes.running.remove(row)
                else:
                    begin(row, following)
            width = max(len(lanes.running), least_width or 0)
            if lanes.running and least_width is not None and width < policy.width:
                idle = [row for row in range(policy.width) if row not in lanes.running]
                rows = [*lanes.running, *idle][:width]
                policy.keep(rows)
                lanes.keep(rows)
            if report is not None:
                report(len(outcomes), int(lanes.lengths[lanes.running].sum()) / made.time_limit)
    except BaseException:
        for env in envs:
            env.close()
        raise
    keep(made, envs)
    return outcomes


def _few(values: NDArray[np.float64]) -> str:
    """The first of the numbers of a state, as text."""
    shown = ", ".join(f"{value:g}" for value in values[:8])
    return f"[{shown}{', ...' if len(values) > 8 else ''}]"
