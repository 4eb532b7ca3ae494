"""The command `steer`: a direction that moves the return as the target does."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dt_lens.arguments import require_writable
from dt_lens.cli.options import (
    Agent,
    Environment,
    Failure,
    Given,
    MaxSteps,
    Seed,
    Workers,
    failure_rule,
    load_model,
    split,
    to_float,
)
from dt_lens.cli.output import print_table, progress


def steer(
    model: Agent,
    episodes: Annotated[int, typer.Option(min=2, help="Episodes per dose in the report, on fresh seeds.")] = 40,
    choosing: Annotated[int, typer.Option(min=2, help="Episodes per dose while choosing, and per target.")] = 8,
    candidates: Annotated[int, typer.Option(min=1, help="How many directions are tried.")] = 8,
    doses: Annotated[str, typer.Option(help="Comma-separated factors to multiply sigma by.")] = "0,0.5,1.5,2",
    targets: Annotated[
        str | None, typer.Option(help="Comma-separated target returns of the curve; the agent's own by default.")
    ] = None,
    seed: Seed = 0,
    environment: Environment = None,
    max_steps: MaxSteps = None,
    failure: Failure = None,
    out: Annotated[Path | None, typer.Option(help="Folder for all results; dt-lens-steer/MODEL by default.")] = None,
    workers: Workers = None,
    given: Given = None,
) -> None:
    """Find a direction whose dose moves the return as the target does, without making the agent fail.

    It is chosen on some seeds and reported on others (docs/steering.md). An interrupted run resumes when
    started again with the same options.
    """
    folder = out or Path("dt-lens-steer") / Path(model).name
    goals = split(targets, "targets")
    require_writable(folder / "steering.html")
    with progress() as tell:
        tell("loading", 0.0)
        loaded = load_model(model, given)
        from dt_lens.study.steering.steering import steer as find_direction

        result = find_direction(
            loaded,
            folder,
            name=Path(model).name,
            episodes=episodes,
            choosing=choosing,
            candidates=candidates,
            doses=[to_float(dose, "doses") for dose in split(doses, "doses") or []],
            targets=None if goals is None else [to_float(goal, "targets") for goal in goals],
            seed=seed,
            environment=environment,
            max_steps=max_steps,
            failure=failure_rule(failure),
            workers=workers,
            command=shlex.join(["dt-lens", *sys.argv[1:]]),
            progress=tell,
        )
    print_table(result.curve, "The unedited agent at each target")
    if len(result.table):
        print_table(result.choosing, "Directions that were tried")
        print_table(result.table, "The chosen one, on fresh seeds")
    print(f"\n{result.sentence}\n\nThe page: {folder / 'steering.html'}")
