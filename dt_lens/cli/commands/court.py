"""The command `court`: pre-registered tests of eight claims."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dt_lens.arguments import require_writable
from dt_lens.cli.options import (
    Context,
    Deterministic,
    Environment,
    Failure,
    Given,
    Json,
    MaxSteps,
    Model,
    Seed,
    Target,
    Windows,
    Workers,
    load_model,
    split,
    task_options,
    to_float,
)
from dt_lens.cli.output import print_json, print_table, progress, say

EXAMPLES = (
    "dt-lens court hopper --no-rollouts",
    "dt-lens court hopper --episodes 50 --out runs/court",
)


def court(
    model: Model,
    episodes: Annotated[
        int | None,
        typer.Option(min=2, help="Paired episodes of the unedited agent, each edit and each control; 200 by default."),
    ] = None,
    seed: Seed = 0,
    environment: Environment = None,
    target_return: Target = None,
    max_steps: MaxSteps = None,
    deterministic: Deterministic = None,
    failure: Failure = None,
    sweep: Annotated[
        Path | None, typer.Option(help="Folder of a finished sweep of this model, with controls, for claim 7.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", "--texts", help="For a language model: a text file; its held-out text by default."),
    ] = None,
    context: Context = None,
    windows: Windows = None,
    rollouts: Annotated[bool, typer.Option(help="Run the edits; without, only claims about weights are tried.")] = True,
    claims: Annotated[
        str | None, typer.Option(help="Numbers of the claims to try, such as 8 or 1,2; all by default.")
    ] = None,
    draws: Annotated[int, typer.Option(min=200, help="Number of draws of the nulls.")] = 4000,
    out: Annotated[Path | None, typer.Option(help="Folder for all results; dt-lens-court/MODEL by default.")] = None,
    workers: Workers = None,
    given: Given = None,
    as_json: Json = False,
) -> None:
    """Try eight claims about singular directions, each with a pre-registered test (docs/court.md).

    Each is computed as it should be and as the note's code computed it; verdicts are supported, not supported,
    undecided, or not applicable. An interrupted run resumes when started again with the same options.
    """
    folder = out or Path("dt-lens-court") / Path(model).name
    require_writable(folder / "court.html")
    tried = None if claims is None else [round(to_float(part, "claims")) for part in split(claims, "claims") or []]
    with progress() as tell:
        tell("loading", 0.0)
        loaded = load_model(model, given)
        asked = task_options(
            loaded,
            episodes=episodes,
            environment=environment,
            target_return=target_return,
            max_steps=max_steps,
            deterministic=deterministic,
            failure=failure,
            text=text,
            context=context,
            windows=windows,
        )
        from dt_lens.study.court.court import court as try_claims
        from dt_lens.study.court.page import sentences

        result = try_claims(
            loaded,
            folder,
            name=Path(model).name,
            seed=seed,
            sweep=sweep,
            rollouts=rollouts,
            claims=tried,
            draws=draws,
            workers=workers,
            command=shlex.join(["dt-lens", *sys.argv[1:]]),
            progress=tell,
            **asked,
        )
    said = [sentence.replace("**", "") for sentence in sentences(result)]
    if as_json:
        page = folder / "court.html"
        print_json("court", model=model, facts=result.facts, table=result.table, sentences=said, page=page)
        return
    shown = ["claim", "title", "verdict", "effect", "margin", "p_value", "note_verdict", "note_effect", "note_p_value"]
    print_table(result.table[shown], "Verdicts, as it should be and as the note's code computed it")
    say()
    for sentence in said:
        say(sentence)
    say(f"\nThe page: {folder / 'court.html'}")
