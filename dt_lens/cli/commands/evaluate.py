"""The command `evaluate`: measure a model, and an edit of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    Target,
    Text,
    Windows,
    Workers,
    indices,
    load_model,
    number,
    task_options,
)
from dt_lens.cli.output import progress, write_csv


def evaluate(
    model: Model,
    environment: Environment = None,
    episodes: Annotated[
        int | None, typer.Option(min=1, help="Number of episodes, 100 by default; episode i uses seed + i.")
    ] = None,
    seed: Seed = 0,
    target_return: Target = None,
    max_steps: MaxSteps = None,
    failure: Failure = None,
    edit: Annotated[
        str | None, typer.Option(metavar="MATRIX", help="Also measure the model with this matrix edited, and compare.")
    ] = None,
    sv: Annotated[str, typer.Option(help="Indices of the directions to edit, such as 0 or 0,1.")] = "0",
    side: Annotated[str | None, typer.Option(help="The side to edit, read or write, if the matrix has both.")] = None,
    value: Annotated[
        str,
        typer.Option(
            help="What the singular vector becomes: constant, zero, flip, random, or a number that scales sigma."
        ),
    ] = "constant",
    workers: Workers = None,
    text: Text = None,
    context: Context = None,
    windows: Windows = None,
    out: Annotated[Path | None, typer.Option(help="Write a row for each episode or window to this .csv file.")] = None,
    given: Given = None,
) -> None:
    """Measure an agent over many episodes, or a language model over a text.

    With --edit, also measure the edited model, and compare the two.
    """
    require_writable(out)
    loaded = load_model(model, given)
    from dt_lens.behaviour.evaluate import evaluate as run
    from dt_lens.edits.singular import SingularEdit

    options = task_options(
        loaded,
        environment=environment,
        episodes=episodes,
        target_return=target_return,
        max_steps=max_steps,
        failure=failure,
        text=text,
        context=context,
        windows=windows,
    )
    unit = "episodes" if loaded.can_act else "windows"

    def measured(what: str) -> Any:
        with progress() as tell:
            return run(
                loaded,
                **options,
                seed=seed,
                workers=workers,
                progress=lambda done, total: tell(what, done / total),
            )

    change = None
    if edit is not None:
        change = SingularEdit(loaded, edit, indices(sv), side=side, value=number(value), seed=seed)  # type: ignore[arg-type]
    baseline = measured(unit)
    print(baseline)
    frames = {"unedited": baseline.to_frame()}
    if change is not None:
        with change:
            edited = measured(f"edited {unit}")
        print(f"\n{edited.compare(baseline)}")
        if change.note:
            print(change.note)
        frames["edited"] = edited.to_frame()
    if out:
        import pandas as pd

        table = frames["unedited"] if change is None else pd.concat(frames, names=["arm"]).reset_index(level=0)
        write_csv(table, out)
