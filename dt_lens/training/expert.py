"""Augmented random search: find an expert, and every policy on the way to it, from the simulator alone.

Mania, Guy and Recht, "Simple random search provides a competitive approach to reinforcement learning" (2018),
version V2-t: a linear policy on running-normalised observations, antithetic perturbations, only the best directions
used for the step. Its iterates span the returns from random to expert, which return conditioning needs.

A second objective, the *pace*, continues from the expert towards episodes that last the whole time limit and earn a
given forward return. Without it almost no episode lies between "fell early" and "ran to the end", and a decision
transformer learns to ignore its target.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from dt_lens.arguments import atomic_write
from dt_lens.behaviour.agents.workers import interrupts_blocked
from dt_lens.errors import DtLensError, as_written, because

__all__ = [
    "Episode",
    "LinearPolicy",
    "SearchSettings",
    "Searcher",
    "environment",
    "evenly",
    "in_order",
    "require_search",
    "rollout",
]

Job = TypeVar("Job")
Result = TypeVar("Result")
Float = NDArray[np.float64]


@dataclass(frozen=True)
class LinearPolicy:
    """``action = weight @ ((observation - mean) / std)``, clipped to the action box by the caller."""

    weight: Float  # [n_action, n_observation]
    mean: Float  # [n_observation]
    std: Float  # [n_observation]

    def act(self, observation: Float) -> Float:
        """The action for one observation ``[n_observation]``: ``[n_action]``."""
        return self.weight @ ((observation - self.mean) / self.std)


class Episode(NamedTuple):
    """One episode: observations ``[T + 1, n]``, actions ``[T, m]``, rewards ``[T]``, and whether it terminated."""

    observations: Float
    actions: Float
    rewards: Float
    forward: float  # sum of the environment's own "reward_forward"
    survive: float  # sum of its "reward_survive"
    terminated: bool

    @property
    def length(self) -> int:
        return len(self.rewards)


def rollout(env: gym.Env[Any, Any], policy: LinearPolicy, seed: int, noise: float = 0.0) -> Episode:
    """Run one episode with Gaussian action noise of standard deviation ``noise``; ``seed`` decides everything."""
    space = env.action_space
    assert isinstance(space, gym.spaces.Box)
    rng = np.random.default_rng([seed, 1])
    observation, _ = env.reset(seed=seed)
    observations, actions, rewards = [observation], [], []
    forward = survive = 0.0
    terminated = truncated = False
    while not (terminated or truncated):
        action = policy.act(observation)
        if noise:
            action = action + noise * rng.standard_normal(action.shape)
        action = np.clip(action, space.low, space.high).astype(space.dtype)
        observation, reward, terminated, truncated, info = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(float(reward))
        forward += float(info.get("reward_forward", 0.0))
        survive += float(info.get("reward_survive", 0.0))
    return Episode(np.asarray(observations), np.asarray(actions), np.asarray(rewards), forward, survive, terminated)


@dataclass(frozen=True)
class SearchSettings:
    """The settings of an augmented random search; the defaults are the paper's for Hopper, version V2-t."""

    environment: str = "Hopper-v5"
    directions: int = 16
    best: int = 8
    step: float = 0.02
    noise: float = 0.03
    seed: int = 0
    pace: float | None = None  # wanted forward reward per step; None maximises the return

    def score(self, episode: Episode, limit: int) -> float:
        """The score of one episode, which the search maximises.

        Without a pace: the return without the survival bonus, which would reward standing still. With a pace: the
        number of steps survived, minus the distance between the forward return and ``pace * limit``.
        """
        if self.pace is None:
            return float(episode.rewards.sum()) - episode.survive
        return episode.length - abs(episode.forward - self.pace * limit)


_worker_env: dict[str, gym.Env[Any, Any]] = {}


def environment(name: str) -> gym.Env[Any, Any]:
    """Make an environment once per process, without Gymnasium's per-step checker.

    Raises:
        DtLensError: if Gymnasium cannot make it, or its spaces are not Boxes.
    """
    if not isinstance(name, str):
        raise DtLensError(f"The environment is {as_written(name)}; it must be a Gymnasium id, as text.")
    if name not in _worker_env:
        try:
            made = gym.make(name, disable_env_checker=True)
        except (Exception, SystemExit) as error:  # whatever its constructor raises
            raise DtLensError(
                f"Gymnasium cannot make the environment {name!r}: {because(error)}; give the id of one that is "
                "installed, such as 'Hopper-v5'."
            ) from error
        spaces = (made.action_space, made.observation_space)
        if not all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces):
            raise DtLensError(
                f"{name!r} does not have flat continuous observations and actions, which recording needs."
            )
        _worker_env[name] = made
    return _worker_env[name]


def time_limit(name: str) -> int:
    """The step at which Gymnasium cuts an episode of ``name``.

    Raises:
        DtLensError: if it has no time limit.
    """
    spec = environment(name).spec
    if spec is None or spec.max_episode_steps is None:
        raise DtLensError(f"{name!r} has no time limit (max_episode_steps), which recording needs.")
    return spec.max_episode_steps


class _Probe(NamedTuple):
    plus: float
    minus: float
    seen: int
    total: Float
    square: Float
    steps: int


def _perturbation(settings: SearchSettings, iteration: int, k: int, shape: tuple[int, ...]) -> Float:
    return np.random.default_rng([settings.seed, 2, iteration, k]).standard_normal(shape)


_ProbeJob = tuple[SearchSettings, LinearPolicy, int, int]


def _probe(job: _ProbeJob) -> _Probe:
    """Run both antithetic episodes of one perturbation; a pure function of its arguments."""
    settings, policy, iteration, k = job
    env, limit = environment(settings.environment), time_limit(settings.environment)
    delta = settings.noise * _perturbation(settings, iteration, k, policy.weight.shape)
    seed = int(np.random.default_rng([settings.seed, 3, iteration, k]).integers(2**31))
    pair = [rollout(env, replace(policy, weight=policy.weight + sign * delta), seed) for sign in (1, -1)]
    seen = np.concatenate([episode.observations for episode in pair])
    plus, minus = (settings.score(episode, limit) for episode in pair)
    return _Probe(plus, minus, len(seen), seen.sum(0), (seen**2).sum(0), sum(e.length for e in pair))


class _State(NamedTuple):
    """A search without its snapshots; replaced as a whole, so that an interruption cannot split an iteration."""

    iteration: int
    steps: int
    seen: float  # observations in the running normalisation, their sum and their sum of squares
    total: Float
    square: Float


class Searcher:
    """An augmented random search that can be stopped after any iteration and continued from its file.

    The sequence of policies depends only on the settings, not on the number of worker processes.
    """

    def __init__(self, settings: SearchSettings, start: LinearPolicy | None = None) -> None:
        env = environment(settings.environment)
        assert isinstance(env.action_space, gym.spaces.Box) and isinstance(env.observation_space, gym.spaces.Box)
        n_action, n_observation = env.action_space.shape[0], env.observation_space.shape[0]
        self.settings = settings
        # A starting policy keeps its normalisation: its weights mean nothing under another one.
        self._frozen = start is not None
        self._state = _State(0, 0, 0.0, np.zeros(n_observation), np.zeros(n_observation))
        still = LinearPolicy(np.zeros((n_action, n_observation)), np.zeros(n_observation), np.ones(n_observation))
        self._snapshots: list[LinearPolicy] = [start or still]

    @property
    def iteration(self) -> int:
        """The number of iterations done."""
        return self._state.iteration

    @property
    def steps(self) -> int:
        """The number of environment steps used."""
        return self._state.steps

    @property
    def snapshots(self) -> list[LinearPolicy]:
        """The starting policy and the policy after each iteration."""
        return self._snapshots[: self.iteration + 1]

    @property
    def policy(self) -> LinearPolicy:
        """The newest policy."""
        return self._snapshots[self.iteration]

    def run(
        self,
        steps: int,
        workers: int = 1,
        file: Path | None = None,
        report: Callable[[int, float], None] | None = None,
    ) -> None:
        """Search until ``steps`` environment steps are used, saving to ``file`` every ten iterations and at the end.

        ``report`` is called after each iteration with the steps used so far and the mean score of its probes.
        """
        if self.steps >= steps:
            return
        with in_order(_probe, workers) as run_all:
            try:
                while self.steps < steps:
                    score = self._iterate(run_all)
                    if report:
                        report(self.steps, score)
                    if file and self.iteration % 10 == 0:
                        self.save(file)
            finally:
                if file:
                    self.save(file)

    def _iterate(self, run_all: Callable[[list[_ProbeJob]], Iterable[_Probe]]) -> float:
        settings, policy, state = self.settings, self.policy, self._state
        probes = list(run_all([(settings, policy, state.iteration, k) for k in range(settings.directions)]))
        ranked = sorted(range(len(probes)), key=lambda k: -max(probes[k].plus, probes[k].minus))[: settings.best]
        used = np.array([(probes[k].plus, probes[k].minus) for k in ranked])
        step = sum(
            (probes[k].plus - probes[k].minus) * _perturbation(settings, state.iteration, k, policy.weight.shape)
            for k in ranked
        )
        weight = policy.weight + settings.step / (len(ranked) * (used.std() + 1e-8)) * step
        count, total, square = state.seen, state.total, state.square
        for probe in probes:
            count, total, square = count + probe.seen, total + probe.total, square + probe.square
        if self._frozen:
            new = replace(policy, weight=weight)
        else:
            mean = total / count
            new = LinearPolicy(weight, mean, np.sqrt(np.maximum(square / count - mean**2, 1e-8)))
        self._snapshots[state.iteration + 1 :] = [new]
        self._state = _State(
            state.iteration + 1, state.steps + sum(probe.steps for probe in probes), count, total, square
        )
        return float(np.mean([(p.plus + p.minus) / 2 for p in probes]))

    def save(self, file: Path) -> None:
        """Write the whole state of the search, from which ``load`` resumes exactly."""
        state, snapshots = self._state, self.snapshots
        with atomic_write(file) as part:
            np.savez_compressed(
                part,
                settings=np.array(json.dumps(asdict(self.settings))),
                counters=np.array([state.iteration, state.steps]),
                count=state.seen,
                sum=state.total,
                square=state.square,
                weights=np.array([p.weight for p in snapshots]),
                means=np.array([p.mean for p in snapshots]),
                stds=np.array([p.std for p in snapshots]),
            )

    def load(self, file: Path) -> None:
        """Resume from a file that ``save`` wrote.

        Raises:
            DtLensError: if the file is not a saved search, or one with other settings.
        """
        require_search(file, self.settings)
        try:
            with np.load(file) as kept:
                settings = json.loads(str(kept["settings"]))
                iteration, steps = (int(n) for n in kept["counters"])
                state = _State(iteration, steps, float(kept["count"]), kept["sum"], kept["square"])
                parts = zip(kept["weights"], kept["means"], kept["stds"], strict=True)
                snapshots = [LinearPolicy(*three) for three in parts]
        except Exception as error:  # a damaged archive may raise anything
            raise _damaged(file, error) from error
        if settings["pace"] != self.settings.pace:
            raise _another(file, ["pace"])
        self._state, self._snapshots = state, snapshots


def require_search(file: Path, settings: SearchSettings) -> None:
    """Raise ``DtLensError`` if ``file`` exists and is not a saved search with these settings, at any pace."""
    if not file.exists():
        return
    try:
        with np.load(file) as kept:
            saved = dict(json.loads(str(kept["settings"])))
    except Exception as error:  # a damaged archive may raise anything
        raise _damaged(file, error) from error
    other = [name for name, value in asdict(settings).items() if name != "pace" and saved.get(name) != value]
    if other:
        raise _another(file, other)


def _damaged(file: Path, error: Exception) -> DtLensError:
    return DtLensError(f"{file} is damaged or not a saved search ({because(error)}); delete it to start again.")


def _another(file: Path, names: list[str]) -> DtLensError:
    return DtLensError(
        f"{file} was written by a search with another {', '.join(names)}; delete it or use another folder."
    )


@contextmanager
def in_order(work: Callable[[Job], Result], workers: int) -> Iterator[Callable[[list[Job]], Iterable[Result]]]:
    """``map`` over worker processes, with results in the order of the jobs; one worker runs in this process."""
    if workers <= 1:
        yield lambda jobs: map(work, jobs)
        return
    # Ctrl-C reaches the whole process group; only the parent reacts to it.
    with interrupts_blocked():
        pool = mp.get_context("spawn").Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield lambda jobs: pool.imap(work, jobs, chunksize=1)
    finally:
        pool.terminate()
        pool.join()


def evenly(snapshots: list[LinearPolicy], count: int) -> Iterator[LinearPolicy]:
    """Yield up to ``count`` policies spread evenly over a search, including the first and the last."""
    for index in np.unique(np.linspace(0, len(snapshots) - 1, count).round().astype(int)):
        yield snapshots[index]
