"""The command `record`: a Minari data set from random to expert, or of a disturbed planner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dt_lens.arguments import require_writable
from dt_lens.cli.options import Seed, Workers, json_object, to_float
from dt_lens.cli.output import print_next, progress, say
from dt_lens.errors import DtLensError
from dt_lens.progress import ProgressCallback

EPISODE = 500  # steps of an episode, roughly: for the progress
# Which options belong to which way of recording; the others belong to both.
SEARCH = ("steps", "pace_steps", "paces", "candidates")
PLANNER = ("noises", "waiting", "longest_wait", "scattered", "max_steps", "environment_kwargs")

EXAMPLES = (
    "dt-lens record Taxi-v4 --dataset taxi/mixed-v0 --episodes 200",
    "dt-lens record Hopper-v5 --dataset hopper/climb-v0",
)


def record(
    ctx: typer.Context,
    environment: Annotated[
        str,
        typer.Argument(
            help="Id of a Gymnasium environment: with flat continuous states and actions, with a table of its dynamics "
            "(Taxi-v4, FrozenLake-v1), or of MiniGrid (minigrid:MiniGrid-DoorKey-8x8-v0)."
        ),
    ] = "Hopper-v5",
    dataset: Annotated[str, typer.Option(help="The Minari id to store the data set under.")] = "hopper/climb-v0",
    steps: Annotated[int, typer.Option(min=1, help="Environment steps of the search for the expert.")] = 2_500_000,
    pace_steps: Annotated[int, typer.Option(min=1, help="Environment steps of the search for each pace.")] = 400_000,
    paces: Annotated[
        str, typer.Option(help="Comma-separated fractions of the expert's speed to record too; empty for none.")
    ] = "0.75,0.55,0.35,0.15",
    candidates: Annotated[int, typer.Option(min=1, help="Episodes to roll out after a search.")] = 3_000,
    episodes: Annotated[int, typer.Option(min=1, help="Largest number of episodes to keep.")] = 1_500,
    noises: Annotated[
        str, typer.Option(help="Of a planner: comma-separated shares of random actions, used in turn.")
    ] = "0,0.05,0.1,0.2,0.35,0.5,0.7",
    waiting: Annotated[float, typer.Option(help="Of a planner: share of the episodes that begin with a wait.")] = 0.0,
    longest_wait: Annotated[
        float, typer.Option(help="Of a planner: the longest wait, as a share of the time limit.")
    ] = 0.8,
    scattered: Annotated[
        float, typer.Option(help="Of a planner: share of the episodes that start in any state of a table.")
    ] = 0.0,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Of a planner: cut episodes after this many steps.")
    ] = None,
    environment_kwargs: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Of a planner: the environment's keyword arguments, with its wrappers."),
    ] = None,
    seed: Seed = 0,
    workers: Workers = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the state, from which an interrupted recording resumes; runs/record/DATASET by default."
        ),
    ] = None,
) -> None:
    """Store a Minari data set of every level of skill: all stages of a random search, or of a disturbed planner.

    Where actions are continuous, random search finds an expert. A planner knows Gymnasium's toy-text environments and
    MiniGrid's; it is disturbed by noise, waits and scattered starts.
    """
    if folder is not None:
        require_writable(folder / "recipe.json")
    from dt_lens.training.planned import acts_discretely, record_planned
    from dt_lens.training.recording import record as search

    kwargs = None if environment_kwargs is None else json_object(environment_kwargs, "environment-kwargs")
    if max_steps is not None:
        if "max_episode_steps" in (kwargs or {}):
            raise DtLensError("--max-steps and max_episode_steps in --environment-kwargs are the same; give one.")
        kwargs = {**(kwargs or {}), "max_episode_steps": max_steps}
    planned = acts_discretely(environment, kwargs or {})
    for name in SEARCH if planned else PLANNER:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise DtLensError(
                f"--{name.replace('_', '-')} is an option of {'a search' if planned else 'a planner'}, and "
                f"{environment} is recorded by {'a planner' if planned else 'a search'}; leave it out."
            )
    options: dict[str, Any] = {"seed": seed, "episodes": episodes, "workers": workers, "folder": folder}
    if planned:
        options |= {"noises": _numbers(noises, "noises"), "waiting": waiting, "longest_wait": longest_wait}
        options |= {"scattered": scattered, "environment_kwargs": kwargs}
    else:
        options |= {"steps": steps, "pace_steps": pace_steps, "paces": _numbers(paces, "paces")}
        options |= {"candidates": candidates}
    sizes: dict[str, float] = {"expert": steps}
    sizes |= {f"pace {pace:g}": pace_steps for pace in _numbers(paces, "paces")}
    sizes = {"episodes": 1.0} if planned else sizes | {"episodes": candidates * EPISODE}
    with progress() as tell:
        stored = (record_planned if planned else search)(
            environment,
            dataset,
            report=_in_order(tell, sizes),
            **options,
        )
    say(f"The data set: {stored}")
    print_next("train", stored, "--out", Path("runs") / stored.replace("/", "-"))


def _in_order(tell: ProgressCallback, sizes: Mapping[str, float]) -> Callable[[str, int, int, str], None]:
    """Report phases that follow one another as shares of the whole; ``sizes`` says how long each takes."""
    whole, starts, begun = sum(sizes.values()) * 1.01, dict[str, float](), 0.0  # storing is what is left
    for phase, size in sizes.items():
        starts[phase], begun = begun, begun + size

    def report(phase: str, done: int, total: int, words: str) -> None:
        start, size = starts.get(phase, begun), sizes.get(phase, whole - begun)
        share = (start + size * min(1.0, done / max(total, 1))) / whole
        tell(f"{phase}  {done:,} of {total:,}: {words}" if total > 1 else f"{phase}  {words}", share)

    return report


def _numbers(text: str, option: str) -> list[float]:
    return [to_float(part, option) for part in text.split(",") if part.strip()]
