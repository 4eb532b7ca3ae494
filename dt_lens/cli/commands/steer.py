"""The command `steer`: a direction whose dose moves what a model does."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dt_lens.arguments import require_writable
from dt_lens.cli.completion import complete_matrix
from dt_lens.cli.options import (
    Context,
    Deterministic,
    EditsFrom,
    EditSide,
    EditSv,
    Environment,
    Failure,
    Given,
    Json,
    MaxSteps,
    Model,
    Seed,
    Text,
    Workers,
    edits_of,
    load_model,
    split,
    task_options,
    to_float,
)
from dt_lens.cli.output import print_json, print_table, progress, say

EXAMPLES = (
    "dt-lens steer hopper --episodes 20 --choosing 4",
    "dt-lens steer tiny-gpt2 --prompts prompts.txt --answers ' the'",
)


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
    candidates: Annotated[int | None, typer.Option(min=1, help="How many directions are tried; 8 by default.")] = None,
    edit: Annotated[
        list[str] | None,
        typer.Option(
            "--edit",
            metavar="MATRIX",
            help="Try directions of this matrix, not those that are found; may be repeated.",
            autocompletion=complete_matrix,
        ),
    ] = None,
    sv: EditSv = None,
    side: EditSide = None,
    value: Annotated[list[str] | None, typer.Option(hidden=True, help="Refused: the dose is the value.")] = None,
    edits_from: EditsFrom = None,
    raw: Annotated[bool, typer.Option("--raw", hidden=True, help="Refused: directions are of folded weights.")] = False,
    doses: Annotated[str, typer.Option(help="Comma-separated factors to multiply sigma by.")] = "0,0.5,1.5,2",
    targets: Annotated[
        str | None, typer.Option(help="Comma-separated target returns of the curve; the agent's own by default.")
    ] = None,
    seed: Seed = 0,
    environment: Environment = None,
    max_steps: MaxSteps = None,
    deterministic: Deterministic = None,
    failure: Failure = None,
    out: Annotated[Path | None, typer.Option(help="Folder for all results; dt-lens-steer/MODEL by default.")] = None,
    workers: Workers = None,
    given: Given = None,
    as_json: Json = False,
) -> None:
    """Find a direction whose dose moves what a model does: an agent's return, or how likely an answer is.

    An agent must not fail more; a language model must not lose on other text. The direction is chosen on some seeds or
    prompts and reported on others (docs/steering.md). With --edit or --edits-from the directions of these edits are
    tried, each by itself, and a dose takes the place of a value. An interrupted run resumes when started again with the
    same options.
    """
    folder = out or Path("dt-lens-steer") / Path(model).name
    goals = split(targets, "targets")
    require_writable(folder / "steering.html")
    with progress() as tell:
        tell("loading", 0.0)
        loaded = load_model(model, given)
        from dt_lens.study.steering.steering import steer as find_direction

        edits = edits_of(loaded, edit, sv, side, value, edits_from, raw=raw, seed=seed)
        result = find_direction(
            loaded,
            folder,
            name=Path(model).name,
            choosing=choosing,
            candidates=candidates,
            edits=edits or None,
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
                deterministic=deterministic,
                failure=failure,
                text=text,
                context=context,
            ),
            command=shlex.join(["dt-lens", *sys.argv[1:]]),
            progress=tell,
        )
    if as_json:
        kept = ("verdict", "sentence", "best", "curve", "choosing", "table", "randoms", "numbers")
        found = {name: getattr(result, name) for name in kept}
        found["best"] = None if result.best is None else result.best._asdict()
        print_json("steer", model=model, **found, page=folder / "steering.html")
        return
    n = result.numbers
    print_table(result.curve, f"The unedited {n['actor']}" + (f" at each {n['point']}" if "point" in n else ""))
    if len(result.table):
        print_table(result.choosing, "Directions that were tried")
        print_table(result.table, f"The chosen one, on fresh {n['lasting_unit']}")
    say(f"\n{result.sentence}\n\nThe page: {folder / 'steering.html'}")
