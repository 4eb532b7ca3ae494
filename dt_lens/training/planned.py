"""Record a data set with a planner that knows the environment, and store it with Minari.

A decision transformer obeys its target only if targets distinguish the training episodes, and it errs less where its
data have been. So the planner is disturbed: by noise at several levels, by waiting on purpose where the environment has
an action that does nothing (noise alone leaves the planner's action the likeliest one, and an agent that takes the
likeliest never learns to be slow), and by starts in states that a planner which never errs does not see.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from dt_lens.arguments import LAST_SEED, atomic_write, finite_numbers, is_finite_number, local_path, whole_number
from dt_lens.behaviour.agents.tabular import Tabular
from dt_lens.decision_transformer.environment_wrappers import specify
from dt_lens.errors import DtLensError, as_written, because
from dt_lens.lens.environment_names import import_module_of, specification
from dt_lens.training.planners import Planner, planner_for
from dt_lens.training.recorded import in_chunks, store
from dt_lens.training.recording import CHUNK, PhaseReport, require_new_dataset

__all__ = ["acts_discretely", "record_planned"]

NOISES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7)


class PlannedEpisode(NamedTuple):
    """One episode of ``T`` steps: the parts of its observations (a single one has the name ``""``), and the rest."""

    observations: Any  # [T + 1, ...] by name
    actions: np.ndarray[Any, Any]
    rewards: np.ndarray[Any, Any]
    terminated: bool


class _Job(NamedTuple):
    spec: str  # JSON: what registers the environment may not be imported in a worker
    seed: int
    noise: float  # the share of steps with a random action
    wait: float  # the share of the time limit that is waited at the start
    scattered: bool


def record_planned(
    environment_id: str,
    dataset_id: str,
    *,
    environment_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    episodes: int = 1_500,
    noises: Sequence[float] = NOISES,
    waiting: float = 0.0,
    longest_wait: float = 0.8,
    scattered: float = 0.0,
    workers: int | None = None,
    folder: str | Path | None = None,
    report: PhaseReport | None = None,
) -> str:
    """Record episodes of a disturbed planner and store them with Minari.

    The planner takes best actions by value iteration (discount 0.99) where the environment has a table of its dynamics,
    as toy-text environments do, and the shortest plan in a MiniGrid. All state is saved in ``folder``, from which the
    same call resumes after an interruption. The data set depends neither on ``workers`` nor on interruptions.

    Args:
        environment_id: a Gymnasium id, of a toy-text environment or a MiniGrid.
        dataset_id: the Minari id to store it under, ``name-v0`` or ``namespace/name-v0``.
        environment_kwargs: keywords of ``gymnasium.make``, with time limit and wrappers as in ``RunFacts``.
        seed: of episodes, noise, waiting and starts.
        episodes: how many.
        noises: shares of steps whose action is drawn from all actions alike, used in turn.
        waiting: the share of episodes that begin with a wait, of 0 to ``longest_wait`` of the time limit.
        longest_wait: a share of the time limit.
        scattered: the share of episodes that start in any state that an episode can be in, all equally likely.
        workers: number of processes; one per core by default.
        folder: for the state; ``runs/record/<dataset id>`` by default.
        report: called often; see ``PhaseReport``.

    Returns:
        The data set's id; ``minari.load_dataset`` reads it.

    Raises:
        DtLensError: if Gymnasium or Minari cannot use an id, the data set exists already, or no planner knows the
            environment, finds a way to its goal, or can do what is asked.
    """
    report = report or (lambda *_: None)
    workers = (os.cpu_count() or 1) if workers is None else whole_number(workers, "workers", 1)
    seed, episodes = whole_number(seed, "seed", 0, LAST_SEED), whole_number(episodes, "episodes", 1)
    require_new_dataset(dataset_id)
    where = local_path(folder, "folder") if folder is not None else Path("runs", "record", dataset_id.replace("/", "-"))
    levels = [_share(noise, "noises") for noise in finite_numbers(noises, "noises")]
    if not levels:
        raise DtLensError("noises is empty; give at least one share of random actions, such as 0.")
    if environment_kwargs is not None and not isinstance(environment_kwargs, Mapping):
        raise DtLensError(
            f"environment_kwargs is {as_written(environment_kwargs)}; it must be a dictionary of keywords."
        )
    recipe = {
        "environment": environment_id,
        "environment_kwargs": dict(environment_kwargs or {}),
        "seed": seed,
        "episodes": episodes,
        "noises": levels,
        "waiting": _share(waiting, "waiting"),
        "longest_wait": _share(longest_wait, "longest_wait"),
        "scattered": _share(scattered, "scattered"),
    }
    spec = _spec(environment_id, environment_kwargs or {})
    _rehearse(spec, waiting > 0, scattered > 0)
    played = _play_all(_jobs(spec, recipe), where, recipe, workers, report)
    report("store", 0, 1, f"{len(played)} episodes, {sum(len(e.rewards) for e in played)} steps")
    env, _ = _environment(spec.to_json())
    store(
        [episode._replace(observations=episode.observations.get("", episode.observations)) for episode in played],
        dataset_id,
        env=spec,
        observation_space=env.observation_space,
        action_space=env.action_space,
        algorithm_name="a planner, disturbed",
        description=f"A planner with noise, waits and scattered starts. Made by dt-lens: {json.dumps(recipe)}",
    )
    for chunk in where.glob("planned-*.npz"):
        chunk.unlink()
    report("store", 1, 1, dataset_id)
    return dataset_id


def acts_discretely(environment_id: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether an environment's actions are Discrete.

    Raises:
        DtLensError: if it is not registered or cannot be made.
    """
    import_module_of(environment_id)
    spec, own = specify(specification(environment_id), kwargs)
    env = _made(spec, own)
    try:
        return isinstance(env.action_space, gym.spaces.Discrete)
    finally:
        env.close()


def _share(value: Any, name: str) -> float:
    if not is_finite_number(value) or not 0 <= value <= 1:
        raise DtLensError(f"{name} is {value!r}; it must be a share, from 0 to 1.")
    return float(value)


def _spec(environment_id: str, kwargs: Mapping[str, Any]) -> EnvSpec:
    """The specification with all keywords and wrappers in it.

    Raises:
        DtLensError: if it is not registered, or JSON cannot hold it, so that Minari cannot store it.
    """
    import_module_of(environment_id)
    spec, own = specify(specification(environment_id), kwargs)
    spec = replace(spec, kwargs={**spec.kwargs, **own})
    try:
        return EnvSpec.from_json(spec.to_json())
    except (ValueError, TypeError) as error:
        raise DtLensError(
            f"Minari cannot store the specification of {environment_id!r} ({because(error)}); register it with "
            "an entry point as text ('module:Class') and arguments that JSON can hold."
        ) from error


def _made(spec: EnvSpec, kwargs: Mapping[str, Any]) -> gym.Env[Any, Any]:
    try:
        env: gym.Env[Any, Any] = gym.make(spec, disable_env_checker=True, **kwargs)
    except (Exception, SystemExit) as error:  # whatever its constructor raises
        raise DtLensError(f"Gymnasium cannot make the environment {spec.id!r}: {because(error)}.") from error
    return env


@cache
def _environment(spec: str) -> tuple[gym.Env[Any, Any], Planner]:
    """An environment and its planner, made once in each process.

    Raises:
        DtLensError: if it cannot be made, has other actions than Discrete ones, or no planner knows it.
    """
    told = EnvSpec.from_json(spec)
    env = _made(told, {})
    planner = planner_for(env) if isinstance(env.action_space, gym.spaces.Discrete) else None
    if planner is None:
        raise DtLensError(
            f"No planner knows {told.id!r}: planners know environments with a table of their dynamics (Taxi, "
            "FrozenLake, CliffWalking) and MiniGrid's; for continuous actions there is dt_lens.training.record."
        )
    return env, planner


def _limit(env: gym.Env[Any, Any]) -> int:
    """The steps after which an episode is cut."""
    own = None if env.spec is None else env.spec.max_episode_steps
    limits = [n for n in (own, getattr(env.unwrapped, "max_steps", None)) if n is not None]
    if not limits:
        raise DtLensError(
            f"{getattr(env.spec, 'id', env)!r} has no time limit, and a disturbed episode may never end; give one "
            "(environment_kwargs={'max_episode_steps': 200})."
        )
    return int(min(limits))


def _rehearse(spec: EnvSpec, waits: bool, scatters: bool) -> None:
    """Play a step, so that what does not work is found before the work."""
    from minari.serialization import serialize_space

    env, planner = _environment(spec.to_json())
    _limit(env)
    if waits and planner.wait is None:
        raise DtLensError(f"{spec.id!r} has no action that does nothing; record with waiting=0 (--waiting 0).")
    try:
        serialize_space(env.observation_space)
    except NotImplementedError as error:
        raise DtLensError(
            f"Minari cannot store the observations of {spec.id!r} ({env.observation_space}); leave out what it cannot "
            "with the wrapper gymnasium.wrappers.FilterObservation in environment_kwargs."
        ) from error
    _require_same_dynamics(env, spec)
    env.reset(seed=0)
    planner.begin(env)
    if scatters:
        planner.scatter(env, np.random.default_rng(0))
    _require_plan(env, planner)


def _require_same_dynamics(env: gym.Env[Any, Any], spec: EnvSpec) -> None:
    """Raise ``DtLensError`` if each process would have a table of its own, as of a map drawn when the world is made."""
    table = Tabular.of(env)
    if table is None:
        return
    other_env = _made(spec, {})
    try:
        other = Tabular.of(other_env)
    finally:
        other_env.close()
    if other is None or any(not np.array_equal(getattr(table, f.name), getattr(other, f.name)) for f in fields(table)):
        raise DtLensError(
            f"{spec.id!r} has other dynamics each time it is made, so that one data set would be of several worlds; "
            "fix them with environment_kwargs (--environment-kwargs), in FrozenLake with map_name='4x4' or a map, desc."
        )


def _require_plan(env: gym.Env[Any, Any], planner: Planner) -> None:
    """Raise ``DtLensError`` if an episode that begins here could only be noise."""
    if planner.action(env) is None:
        raise DtLensError(
            f"The planner finds no way to a goal in {getattr(env.spec, 'id', env)!r}: in a MiniGrid it needs a cell "
            "'goal', or an object to pick up (env.unwrapped.obj), that can be reached; record another environment, or "
            "record this one with a policy of your own and minari.DataCollector."
        )


def _jobs(spec: EnvSpec, recipe: Mapping[str, Any]) -> list[_Job]:
    text, jobs = spec.to_json(), []
    for k in range(recipe["episodes"]):
        rng = np.random.default_rng([recipe["seed"], 5, k])
        seed, wait, waits, scatters = int(rng.integers(2**31)), rng.random(), rng.random(), rng.random()
        length = wait * recipe["longest_wait"] if waits < recipe["waiting"] else 0.0
        noise = recipe["noises"][k % len(recipe["noises"])]
        jobs.append(_Job(text, seed, noise, length, bool(scatters < recipe["scattered"])))
    return jobs


def _play(job: _Job) -> PlannedEpisode:
    """One episode; a pure function of the job."""
    env, planner = _environment(job.spec)
    assert isinstance(env.action_space, gym.spaces.Discrete)
    rng, waits = np.random.default_rng([job.seed, 1]), round(job.wait * _limit(env))
    first, count = int(env.action_space.start), int(env.action_space.n)
    observation, _ = env.reset(seed=job.seed)
    planner.begin(env)
    if job.scattered:
        observation = planner.scatter(env, rng)
    _require_plan(env, planner)
    seen: list[Any] = [observation]
    actions: list[int] = []
    rewards: list[float] = []
    terminated = truncated = False
    while not (terminated or truncated):
        best = planner.wait if len(actions) < waits else planner.action(env)
        # Drawn at every step, so that levels of noise disturb the same steps.
        disturbed, other = rng.random() < job.noise, int(rng.integers(count))
        action = first + (other if disturbed or best is None else best)
        observation, reward, terminated, truncated, _ = env.step(action)
        seen.append(observation)
        actions.append(action)
        rewards.append(float(reward))
    return PlannedEpisode(_parts(seen), np.array(actions), np.array(rewards), terminated)


def _parts(observations: Sequence[Any]) -> dict[str, np.ndarray[Any, Any]]:
    if not isinstance(observations[0], Mapping):
        return {"": np.array(observations)}
    return {name: np.array([seen[name] for seen in observations]) for name in observations[0]}


def _play_all(
    jobs: list[_Job], where: Path, recipe: dict[str, Any], workers: int, report: PhaseReport
) -> list[PlannedEpisode]:
    """Play all episodes in order; files of ``CHUNK`` episodes that exist already are read instead."""
    return in_chunks(
        jobs,
        _play,
        workers,
        CHUNK,
        recipe=recipe,
        kept=where / "planned.json",
        file=lambda first: where / f"planned-{first:06d}.npz",
        stale=where.glob("planned-*.npz"),
        read=_read,
        write=_write,
        told=lambda done, episode: report("episodes", done, len(jobs), f"return {episode.rewards.sum():,.2f}"),
    )


def _write(file: Path, episodes: list[PlannedEpisode]) -> None:
    arrays: dict[str, Any] = {
        "lengths": np.array([len(e.rewards) for e in episodes]),
        "actions": np.concatenate([e.actions for e in episodes]),
        "rewards": np.concatenate([e.rewards for e in episodes]),
        "terminated": np.array([e.terminated for e in episodes]),
    }
    for name in episodes[0].observations:
        arrays[f"observation/{name}"] = np.concatenate([e.observations[name] for e in episodes])
    with atomic_write(file) as part:
        np.savez_compressed(part, **arrays)


def _read(file: Path) -> list[PlannedEpisode] | None:
    """The episodes in ``file``; ``None`` if it does not exist, or is damaged: then they are played again."""
    try:
        with np.load(file) as kept:  # compares the archive's checksums
            lengths, ends = kept["lengths"], kept["terminated"]
            actions, rewards = (np.split(kept[name], np.cumsum(lengths)[:-1]) for name in ("actions", "rewards"))
            parts = {
                name.partition("/")[2]: np.split(kept[name], np.cumsum(lengths + 1)[:-1])
                for name in kept.files
                if name.startswith("observation/")
            }
    except Exception:  # a damaged archive may raise anything
        return None
    return [
        PlannedEpisode({name: rows[k] for name, rows in parts.items()}, actions[k], rewards[k], bool(ends[k]))
        for k in range(len(lengths))
    ]
