"""The command `steer`: a direction whose dose moves what a model does."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dt_lens.arguments import require_writable
from dt_lens.cli.options import (
    Context,
    Environment,
    Failure,
    Given,
    MaxSteps,
    Model,
    Seed,
    Text,
    Workers,
    load_model,
    split,
    task_options,
    to_float,
)
from dt_lens.cli.output import print_table, progress


def steer(
    model: Model,
    prompts: Annotated[
        str | None, typer.Option(help="For a language model: a file of prompts, one a line, or the prompts themselves.")
    ] = None,
    answers: Annotated[
        list[str] | None,
        typer.Option(help="For a language model: what is to follow, such as ' the'; one for all prompts, or one each."),
    ] = None,
    text: Text = None,
    context: Context = None,
    episodes: Annotated[
        int | None, typer.Option(min=2, help="Episodes per dose in the report, on fresh seeds; 40 by default.")
    ] = None,
    choosing: Annotated[
        int | None,
        typer.Option(min=2, help="Episodes per dose while choosing, and per target; 8 by default. Or prompts."),
    ] = None,
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
    """Find a direction whose dose moves what a model does: an agent's return, or how likely an answer is.

    An agent must not fail more; a language model must not lose on other text. The direction is chosen on some seeds or
    prompts and reported on others (docs/steering.md). An interrupted run resumes when started again with the same
    options.
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
            choosing=choosing,
            candidates=candidates,
            doses=[to_float(dose, "doses") for dose in split(doses, "doses") or []],
            targets=None if goals is None else [to_float(goal, "targets") for goal in goals],
            seed=seed,
            prompts=prompts,
            answers=answers or None,
            workers=workers,
            **task_options(
                loaded,
                environment=environment,
                episodes=episodes,
                max_steps=max_steps,
                failure=failure,
                text=text,
                context=context,
            ),
            command=shlex.join(["dt-lens", *sys.argv[1:]]),
            progress=tell,
        )
    along = "target" in result.curve
    print_table(result.curve, "The unedited agent at each target" if along else "The unedited model")
    if len(result.table):
        print_table(result.choosing, "Directions that were tried")
        print_table(result.table, "The chosen one, on fresh seeds" if along else "The chosen one, on fresh units")
    print(f"\n{result.sentence}\n\nThe page: {folder / 'steering.html'}")
