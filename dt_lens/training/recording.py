"""Record a data set that covers every return, from the simulator alone, and store it with Minari.

A decision transformer obeys its target only if targets distinguish the training episodes. So this module records all
stages of a search from a random policy to an expert, then episodes of the expert slowed down to several paces, with
several levels of exploration noise (so that past actions do not reveal the policy), and keeps equally many episodes of
every return.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dt_lens.arguments import LAST_SEED, atomic_write, finite_numbers, local_path, require_writable, whole_number
from dt_lens.errors import DtLensError, because, unwritable
from dt_lens.training.expert import (
    Episode,
    LinearPolicy,
    Searcher,
    SearchSettings,
    environment,
    evenly,
    require_search,
    rollout,
    time_limit,
)
from dt_lens.training.minari_episodes import require_dataset_id
from dt_lens.training.recorded import in_chunks, store

__all__ = ["PhaseReport", "balanced", "record", "require_new_dataset"]

PhaseReport = Callable[[str, int, int, str], None]
"""Called with the name of a phase, the amount done, the total, and a short text on the state of the phase."""

CHUNK = 50  # candidate episodes in one file of the resumable state


def record(
    environment_id: str = "Hopper-v5",
    dataset_id: str = "hopper/climb-v0",
    *,
    seed: int = 0,
    steps: int = 2_500_000,
    paces: Sequence[float] = (0.75, 0.55, 0.35, 0.15),
    pace_steps: int = 400_000,
    candidates: int = 3_000,
    episodes: int = 1_500,
    noises: Sequence[float] = (0.0, 0.1, 0.2),
    bins: int = 33,
    workers: int | None = None,
    folder: str | Path | None = None,
    report: PhaseReport | None = None,
) -> str:
    """Record a data set from random to expert and store it with Minari; the defaults are the bundled Hopper's.

    First, augmented random search finds an expert. Then each pace continues from the search before it, towards
    episodes that last the whole time limit at that fraction of the expert's forward reward per step. Then policies
    spread evenly over all of these searches are rolled out, and ``balanced`` keeps some of their episodes.

    All state is saved in ``folder``, from which the same call resumes after an interruption. The data set depends
    neither on ``workers`` nor on interruptions.

    Args:
        environment_id: any Gymnasium id with a flat Box observation, a Box action and a time limit.
        dataset_id: the Minari id to store it under, ``name-v0`` or ``namespace/name-v0``.
        seed: of searches, episodes and noise.
        steps: environment steps of the search for the expert.
        paces: decreasing fractions of the expert's forward reward per step; empty for an environment whose ``info``
            has no ``"reward_forward"``.
        pace_steps: environment steps of the search for each pace.
        candidates: episodes to roll out.
        episodes: how many of them to keep at most.
        noises: standard deviations of the Gaussian noise on the actions, used in turn.
        bins: return bins of equal width to balance over.
        workers: number of processes; one per core by default.
        folder: for the state; ``runs/record/<dataset id>`` by default.
        report: called often; see ``PhaseReport``.

    Returns:
        The data set's id; ``minari.load_dataset`` reads it.

    Raises:
        DtLensError: if Gymnasium or Minari cannot use an id, the data set exists already, paces are asked of an
            environment without forward reward, or the folder holds the state of other settings.
    """
    report = report or (lambda *_: None)
    workers = (os.cpu_count() or 1) if workers is None else whole_number(workers, "workers", 1)
    where = local_path(folder, "folder") if folder is not None else Path("runs", "record", dataset_id.replace("/", "-"))
    # NumPy's integers cannot be stored in the recipe.
    seed = whole_number(seed, "seed", 0, LAST_SEED)
    steps, pace_steps = whole_number(steps, "steps", 1), whole_number(pace_steps, "pace_steps", 1)
    candidates, episodes = whole_number(candidates, "candidates", 1), whole_number(episodes, "episodes", 1)
    bins = whole_number(bins, "bins", 1)
    require_new_dataset(dataset_id)
    noises, paces = finite_numbers(noises, "noises"), finite_numbers(paces, "paces")
    if not noises or min(noises) < 0:
        raise DtLensError(f"noises is {tuple(noises)!r}; give at least one standard deviation, none negative.")
    if any(pace <= 0 for pace in paces) or paces != sorted(set(paces), reverse=True):
        raise DtLensError(f"paces is {tuple(paces)!r}; give falling fractions of the expert's speed, all above 0.")
    settings = SearchSettings(environment=environment_id, seed=seed)
    _rehearse(environment_id, seed, forward=bool(paces))
    for file in (where / "expert.npz", *(where / f"pace-{pace:g}.npz" for pace in paces)):
        require_writable(file)
        require_search(file, settings)
    expert = Searcher(settings)
    _search(expert, where / "expert.npz", "expert", steps, workers, report)
    searches = [expert]
    speed = _speed(environment_id, expert.policy) if paces else 0.0
    for pace in paces:
        slower = Searcher(replace(settings, pace=pace * speed), start=searches[-1].policy)
        _search(slower, where / f"pace-{pace:g}.npz", f"pace {pace:g}", pace_steps, workers, report)
        searches.append(slower)

    jobs = _jobs(environment_id, [search.snapshots for search in searches], candidates, tuple(noises), seed)
    recipe = {
        "environment": environment_id,
        "seed": seed,
        "steps": steps,
        "paces": list(paces),
        "pace_steps": pace_steps,
        "candidates": candidates,
        "episodes": episodes,
        "noises": list(noises),
        "bins": bins,
    }
    rolled = _roll_all(jobs, where, recipe, workers, report)
    returns = np.array([episode.rewards.sum() for episode in rolled])
    lengths = np.array([episode.length for episode in rolled])
    kept = [rolled[i] for i in balanced(returns, lengths, episodes, bins)]
    report("store", 0, 1, f"{len(kept)} episodes, {sum(e.length for e in kept)} steps")
    store(
        kept,
        dataset_id,
        env=environment(environment_id),  # Gymnasium's registry does not know "module:Id"
        algorithm_name="augmented random search V2-t, every stage of it",
        description=f"From random to expert, balanced over the return. Made by dt-lens: {json.dumps(recipe)}",
    )
    for chunk in where.glob("episodes-*.npz"):
        chunk.unlink()
    report("store", 1, 1, dataset_id)
    return dataset_id


def balanced(returns: NDArray[np.float64], lengths: NDArray[np.int64], keep: int, bins: int) -> list[int]:
    """Choose at most ``keep`` episodes, equally many from every bin of the return as far as possible.

    From a full bin the longest episodes are kept: if a complete slow episode and a fast one that fell early have the
    same return, a target of that return should mean the slow one.

    Args:
        returns: ``[n]``.
        lengths: ``[n]``, in steps.
        keep: the largest number of episodes to keep.
        bins: number of bins of equal width between the lowest and the highest return.

    Returns:
        Indices, ascending.

    >>> balanced(np.array([0.0, 0.1, 0.2, 5.0]), np.array([9, 3, 7, 2]), keep=3, bins=2)
    [0, 2, 3]
    """
    edges = np.linspace(returns.min(), returns.max(), bins + 1)
    place = np.clip(np.searchsorted(edges, returns, side="right") - 1, 0, bins - 1)
    members = [sorted(np.flatnonzero(place == b), key=lambda i: (-lengths[i], i)) for b in range(bins)]
    cap = max(c for c in range(keep + 1) if sum(min(len(m), c) for m in members) <= keep)
    kept = [int(i) for m in members for i in m[: max(cap, 1)]]
    # With fewer than one episode for each bin, take bins spread evenly from the lowest to the highest.
    return sorted(
        kept if len(kept) <= keep else (kept[i] for i in np.linspace(len(kept) - 1, 0, keep).round().astype(int))
    )


def _rehearse(environment_id: str, seed: int, forward: bool) -> None:
    """Run one step of the environment: what does not work is found before hours of training.

    Raises:
        DtLensError: if the environment does not run, cannot be stored, or has no forward reward although ``forward``
            asks for it.
    """
    env, _ = environment(environment_id), time_limit(environment_id)
    try:
        if env.spec is not None:  # refused by time_limit
            env.spec.to_json()
    except (ValueError, TypeError) as error:
        raise DtLensError(
            f"Minari cannot store the specification of {environment_id!r} ({because(error)}); register it with "
            "an entry point as text ('module:Class') and arguments that JSON can hold."
        ) from error
    try:
        observation, _ = env.reset(seed=seed)
        _, reward, _, _, info = env.step(np.zeros(env.action_space.shape or (), env.action_space.dtype))
        whole = np.isfinite(np.asarray(observation, dtype=np.float64)).all() and np.isfinite(float(reward))
    except Exception as error:  # an environment may raise anything
        raise DtLensError(f"{environment_id!r} cannot be run: {because(error)}; try it in Gymnasium.") from error
    if not whole:
        raise DtLensError(f"{environment_id!r} gives states or rewards that are not finite; repair it.")
    if forward and "reward_forward" not in info:
        raise DtLensError(
            f"{environment_id!r} has no info['reward_forward'] to set a pace by; record without paces (--paces '')."
        )


def require_new_dataset(dataset_id: str) -> None:
    """Raise ``DtLensError`` unless Minari can store a new data set under this id."""
    try:
        import h5py  # noqa: F401
    except ImportError as error:
        raise DtLensError("Minari stores data sets with h5py, which is not installed; pip install h5py.") from error
    import minari
    from minari.storage.datasets_root_dir import get_dataset_path

    require_dataset_id(dataset_id)
    try:
        stored = Path(get_dataset_path(dataset_id))  # makes the folder of all data sets
    except OSError as error:
        raise unwritable("Minari's folder of data sets", error) from error
    require_writable(stored / "data" / "main_data.hdf5")
    if stored.exists():
        raise DtLensError(
            f"Minari {minari.__version__} has a data set {dataset_id!r} already; delete it or choose another version."
        )


def _search(searcher: Searcher, file: Path, name: str, steps: int, workers: int, report: PhaseReport) -> None:
    if file.exists():
        searcher.load(file)
    searcher.run(steps, workers, file, lambda done, score: report(name, min(done, steps), steps, f"score {score:,.0f}"))


def _speed(environment_id: str, policy: LinearPolicy) -> float:
    """The forward reward per step over four episodes without noise."""
    rolled = [rollout(environment(environment_id), policy, seed) for seed in range(4)]
    speed = sum(e.forward for e in rolled) / sum(e.length for e in rolled)
    if not speed > 0:
        raise DtLensError(
            f"{environment_id!r} has no info['reward_forward'] to set a pace by, or an expert that does not move; "
            "record without paces."
        )
    return speed


_Job = tuple[str, LinearPolicy, float, int]  # environment, policy, noise, seed


def _jobs(
    environment_id: str, phases: list[list[LinearPolicy]], count: int, noises: tuple[float, ...], seed: int
) -> list[_Job]:
    """``count`` rollouts, divided equally between the phases and spread evenly within each."""
    jobs: list[_Job] = []
    for phase, snapshots in enumerate(phases):
        wanted = count * (phase + 1) // len(phases) - len(jobs)
        policies = list(evenly(snapshots, max(1, wanted // len(noises))))
        for k in range(wanted):
            policy, noise = policies[k // len(noises) % len(policies)], noises[k % len(noises)]
            jobs.append(
                (environment_id, policy, noise, int(np.random.default_rng([seed, 4, len(jobs)]).integers(2**31)))
            )
    return jobs


def _roll(job: _Job) -> Episode:
    name, policy, noise, seed = job
    return rollout(environment(name), policy, seed, noise)


def _roll_all(
    jobs: list[_Job], where: Path, recipe: dict[str, Any], workers: int, report: PhaseReport
) -> list[Episode]:
    """Roll out all episodes in order; files of ``CHUNK`` episodes that exist already are read instead."""
    return in_chunks(
        jobs,
        _roll,
        workers,
        CHUNK,
        recipe=recipe,
        kept=where / "recipe.json",
        file=lambda first: where / f"episodes-{first:05d}.npz",
        stale=where.glob("episodes-*.npz"),
        read=_read,
        write=_write,
        told=lambda done, episode: report("episodes", done, len(jobs), f"return {episode.rewards.sum():,.0f}"),
    )


def _write(file: Path, episodes: list[Episode]) -> None:
    with atomic_write(file) as part:
        np.savez(
            part,
            lengths=np.array([e.length for e in episodes]),
            observations=np.concatenate([e.observations for e in episodes]),
            actions=np.concatenate([e.actions for e in episodes]),
            rewards=np.concatenate([e.rewards for e in episodes]),
            sums=np.array([[e.forward, e.survive] for e in episodes]),
            terminated=np.array([e.terminated for e in episodes]),
        )


def _read(file: Path) -> list[Episode] | None:
    """The episodes in ``file``; ``None`` if it does not exist, or is damaged: then they are rolled out again."""
    try:
        with np.load(file) as kept:  # compares the archive's checksums
            lengths = kept["lengths"]
            observations = np.split(kept["observations"], np.cumsum(lengths + 1)[:-1])
            actions, rewards = (np.split(kept[name], np.cumsum(lengths)[:-1]) for name in ("actions", "rewards"))
            sums, terminated = kept["sums"], kept["terminated"]
    except Exception:  # a damaged archive may raise anything
        return None
    return [
        Episode(o, a, r, float(f), float(s), bool(t))
        for o, a, r, (f, s), t in zip(observations, actions, rewards, sums, terminated, strict=True)
    ]
