"""The command `evaluate`: measure a model, and an edit of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dt_lens.arguments import require_writable
from dt_lens.cli.options import (
    Environment,
    Failure,
    Given,
    Model,
    Seed,
    Target,
    Workers,
    failure_rule,
    indices,
    load_model,
    number,
)
from dt_lens.cli.output import progress, write_csv
from dt_lens.errors import DtLensError

EPISODES = 100


def evaluate(
    model: Model,
    environment: Environment = None,
    episodes: Annotated[int, typer.Option(min=1, help="Number of episodes; episode i uses seed + i.")] = EPISODES,
    seed: Seed = 0,
    target_return: Target = None,
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
    text: Annotated[
        Path | None, typer.Option(help="For a language model: a text file; its held-out text by default.")
    ] = None,
    context: Annotated[int | None, typer.Option(min=2, help="For a language model: tokens in a window.")] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="For a language model: the largest number of windows.")
    ] = None,
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

    options: dict[str, Any] = {"episodes": episodes, "target_return": target_return, "workers": workers}
    options["failure"] = failure_rule(failure)
    options |= {"texts": text, "context": context, "windows": windows}
    reads = not loaded.can_act
    unit = "windows" if reads else "episodes"
    if not reads:
        options["seed"] = seed
    _require_fit(
        reads,
        {
            "--environment": environment is not None,
            "--episodes": episodes != EPISODES,
            "--target-return": target_return is not None,
            "--failure": failure is not None,
            "--workers": workers is not None,
        },
        {"--text": text is not None, "--context": context is not None, "--windows": windows is not None},
    )

    def measured(what: str) -> Any:
        with progress() as tell:
            return run(
                loaded,
                environment,
                **options,
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


def _require_fit(reads: bool, of_agents: dict[str, bool], of_readers: dict[str, bool]) -> None:
    """Raise ``DtLensError`` for options that were given and belong to the other kind of model."""
    wrong = [name for name, given in (of_agents if reads else of_readers).items() if given]
    if not wrong:
        return
    what = "a language model, which reads --text" if reads else "an agent, which runs in an environment"
    raise DtLensError(f"The model is {what}; leave out {' and '.join(wrong)}.")
