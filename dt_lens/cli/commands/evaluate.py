"""The command `evaluate`: measure a model, and an edit of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dt_lens.cli.options import (
    Context,
    Deterministic,
    EditMatrices,
    EditsFrom,
    EditSide,
    EditSv,
    EditValue,
    Environment,
    Failure,
    Given,
    Json,
    MaxSteps,
    Model,
    Raw,
    Seed,
    Target,
    Text,
    Windows,
    Workers,
    edits_of,
    load_model,
    task_options,
)
from dt_lens.cli.output import print_json, progress, require_file, say, write_csv

EXAMPLES = (
    "dt-lens evaluate hopper --episodes 20",
    "dt-lens evaluate hopper --edit blocks.0.mlp.W_in --sv 0 --episodes 20",
    "dt-lens evaluate tiny-gpt2 --edit blocks.3.mlp.W_out --value zero --json",
)


def evaluate(
    model: Model,
    environment: Environment = None,
    episodes: Annotated[
        int | None, typer.Option(min=1, help="Number of episodes, 100 by default; episode i uses seed + i.")
    ] = None,
    seed: Seed = 0,
    target_return: Target = None,
    max_steps: MaxSteps = None,
    deterministic: Deterministic = None,
    failure: Failure = None,
    edit: EditMatrices = None,
    sv: EditSv = None,
    side: EditSide = None,
    value: EditValue = None,
    edits_from: EditsFrom = None,
    raw: Raw = False,
    workers: Workers = None,
    text: Text = None,
    context: Context = None,
    windows: Windows = None,
    out: Annotated[Path | None, typer.Option(help="Write a row for each episode or window to this .csv file.")] = None,
    given: Given = None,
    as_json: Json = False,
) -> None:
    """Measure an agent over many episodes, or a language model over a text.

    With --edit or --edits-from, also measure the model with these edits in force, and compare the two.
    """
    require_file(out, ".csv")
    with progress() as tell:
        tell("loading", 0.0)
        loaded = load_model(model, given)
    from dt_lens.behaviour.evaluate import evaluate as run

    options = task_options(
        loaded,
        environment=environment,
        episodes=episodes,
        target_return=target_return,
        max_steps=max_steps,
        deterministic=deterministic,
        failure=failure,
        text=text,
        context=context,
        windows=windows,
        workers=workers,
    )
    unit = "episodes" if loaded.can_act else "windows"

    def measured(what: str) -> Any:
        with progress() as tell:
            tell(what, 0.0)
            return run(
                loaded,
                **options,
                seed=seed,
                progress=lambda done, total: tell(what, done / total),
            )

    edits = edits_of(loaded, edit, sv, side, value, edits_from, raw=raw, seed=seed)
    baseline = measured(unit)
    if not as_json:
        say(baseline)
    comparison = None
    frames = {"unedited": baseline.to_frame()}
    if edits:
        from dt_lens.edits.several import in_force

        with in_force(edits):
            edited = measured(f"edited {unit}")
        comparison = edited.compare(baseline)
        frames["edited"] = edited.to_frame()
    notes = list(dict.fromkeys(change.note for change in edits if change.note))
    import pandas as pd

    table = frames["unedited"] if not edits else pd.concat(frames, names=["arm"]).reset_index(level=0)
    if as_json:
        print_json(
            "evaluate",
            model=model,
            unedited=baseline.summary(),
            edited=edited.summary() if edits else None,
            comparison=None if comparison is None else comparison.to_dict(),
            notes=notes,
            table=table,
        )
    elif comparison is not None:
        say(f"\n{comparison}")
        for note in notes:
            say(note)
    if out:
        write_csv(table, out)
