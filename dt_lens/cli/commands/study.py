"""The command `study`: scan, edit, measure, report."""

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
    Workers,
    edits_of,
    load_model,
    number,
    split,
    task_options,
)
from dt_lens.cli.output import print_json, print_table, progress, say

EXAMPLES = (
    "dt-lens study hopper",
    "dt-lens study tiny-gpt2 --edits 1 --windows 32 --out runs/study",
    "dt-lens study hopper --edit blocks.0.mlp.W_in --sv 0 --value zero",
)


def study(
    model: Model,
    environment: Environment = None,
    episodes: Annotated[
        int | None,
        typer.Option(min=2, help="Paired episodes of the unedited agent, each edit and each control; 50 by default."),
    ] = None,
    matrices: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated matrices to choose directions from; '*.W_in,*.W_out,*.OV.*' by default.",
            autocompletion=complete_matrix,
        ),
    ] = None,
    edits: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of strong directions to edit, each with a weak one for contrast; the first of each kind of "
            "matrix is edited too.",
        ),
    ] = 2,
    value: EditValue = None,
    edit: EditMatrices = None,
    sv: EditSv = None,
    side: EditSide = None,
    edits_from: EditsFrom = None,
    raw: Raw = False,
    target_return: Target = None,
    max_steps: MaxSteps = None,
    deterministic: Deterministic = None,
    failure: Failure = None,
    text: Text = None,
    context: Context = None,
    windows: Annotated[
        int | None,
        typer.Option(min=2, help="For a language model: paired windows of each arm; 128, if there are so many."),
    ] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the report; dt-lens-study/MODEL by default.")] = None,
    workers: Workers = None,
    video: Annotated[
        bool, typer.Option(help="For an agent: draw it under the worst edit beside the unedited one.")
    ] = True,
    given: Given = None,
    as_json: Json = False,
) -> None:
    """Scan a model, choose directions, edit them beside controls, measure, and write a report.

    An interrupted run resumes when started again with the same options.
    """
    folder = out or Path("dt-lens-study") / Path(model).name
    require_writable(folder / "report.html")
    with progress() as tell:
        tell("loading", 0.0)
        loaded = load_model(model, given)
        from dt_lens.study.page import sentences
        from dt_lens.study.study import Study

        # Without --edit, --value is of the directions that the study chooses.
        own = value if edit or edits_from else None
        given_edits = edits_of(loaded, edit, sv, side, own, edits_from, raw=raw, seed=seed)
        command = shlex.join(["dt-lens", *sys.argv[1:]])
        result = Study(
            loaded,
            folder,
            name=model,
            matrices=split(matrices, "matrices"),
            edits=given_edits or edits,
            value=number((value or ["constant"])[0]),
            seed=seed,
            workers=workers,
            command=command,
            **task_options(
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
                video=None if video else False,
            ),
        ).run(tell)
    said = [sentence.replace("**", "") for sentence in sentences(result)]
    if as_json:
        print_json(
            "study",
            model=model,
            unedited=result.baseline.summary(),
            verdicts=result.verdicts,
            strongest=result.strongest,
            spearman=result.spearman._asdict(),
            sentences=[*said, *result.missing],
            report=result.report,
        )
        return
    shown = ["role", "matrix", "side", "sv", "label", "cosine"]
    shown += ["energy", "difference", "control_difference", "q", "verdict"]
    terms = result.baseline.terms
    print_table(result.verdicts[shown], f"Edits and their controls: mean paired difference of the {terms.outcome}")
    for sentence in said:
        say(sentence)
    for reason in result.missing:
        say(reason)
    say(f"\nThe report: {result.report}")
