"""The command `record`: a Minari data set from random to expert, or of a disturbed planner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dt_lens.arguments import require_writable
from dt_lens.cli.options import Seed, Workers, json_object, to_float
from dt_lens.cli.output import progress
from dt_lens.errors import DtLensError

# Which options belong to which way of recording; the others belong to both.
SEARCH = ("steps", "pace_steps", "paces", "candidates")
PLANNER = ("noises", "waiting", "longest_wait", "scattered", "environment_kwargs")


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
    with progress() as tell:
        stored = (record_planned if planned else search)(
            environment,
            dataset,
            report=lambda phase, done, total, words: tell(f"{phase}: {words}", min(1.0, done / max(total, 1))),
            **options,
        )
    print(f"The data set: {stored}")


def _numbers(text: str, option: str) -> list[float]:
    return [to_float(part, option) for part in text.split(",") if part.strip()]
