"""The command `record`: a Minari data set of every stage from random to expert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dt_lens.arguments import require_writable
from dt_lens.cli.options import Seed, Workers, to_float
from dt_lens.cli.output import progress


def record(
    environment: Annotated[
        str, typer.Argument(help="Id of a Gymnasium environment with flat continuous states and actions.")
    ] = "Hopper-v5",
    dataset: Annotated[str, typer.Option(help="The Minari id to store the data set under.")] = "hopper/climb-v0",
    steps: Annotated[int, typer.Option(min=1, help="Environment steps of the search for the expert.")] = 2_500_000,
    pace_steps: Annotated[int, typer.Option(min=1, help="Environment steps of the search for each pace.")] = 400_000,
    paces: Annotated[
        str, typer.Option(help="Comma-separated fractions of the expert's speed to record too; empty for none.")
    ] = "0.75,0.55,0.35,0.15",
    candidates: Annotated[int, typer.Option(min=1, help="Episodes to roll out.")] = 3_000,
    episodes: Annotated[int, typer.Option(min=1, help="Largest number of episodes to keep.")] = 1_500,
    seed: Seed = 0,
    workers: Workers = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the state, from which an interrupted recording resumes; runs/record/DATASET by default."
        ),
    ] = None,
) -> None:
    """Train an expert by random search, and store episodes from random to expert as a Minari data set."""
    if folder is not None:
        require_writable(folder / "recipe.json")
    from dt_lens.training.recording import record as make

    fractions = [to_float(p, "paces") for p in paces.split(",") if p.strip()]
    with progress() as tell:
        stored = make(
            environment,
            dataset,
            seed=seed,
            steps=steps,
            paces=fractions,
            pace_steps=pace_steps,
            candidates=candidates,
            episodes=episodes,
            workers=workers,
            folder=folder,
            report=lambda phase, done, total, words: tell(f"{phase}: {words}", min(1.0, done / max(total, 1))),
        )
    print(f"The data set: {stored}")
