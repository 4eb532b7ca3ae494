"""The command `atlas`: which directions matter, from a sweep that removed them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dt_lens.arguments import require_writable
from dt_lens.cli.options import Failure, Given, Json, Model, Seed, failure_rule, load_model
from dt_lens.cli.output import print_json, print_table, progress, say

EXAMPLES = (
    "dt-lens atlas hopper --sweep dt-lens-sweep/hopper",
    "dt-lens atlas tiny-gpt2 --sweep dt-lens-sweep/tiny-gpt2 --json",
)


def atlas(
    model: Model,
    sweep: Annotated[
        Path, typer.Option(help="Folder of a sweep that removed directions (--value zero), or edited them otherwise.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for atlas.html and its tables; the sweep's by default.")
    ] = None,
    activations: Annotated[
        Path | None, typer.Option(help="The model's real inputs, for output energies; the sweep's by default.")
    ] = None,
    value: Annotated[
        str | None,
        typer.Option(
            help="Which of the sweep's edits: zero, the removals, by default; where it has none and one other value, "
            "that."
        ),
    ] = None,
    seed: Seed = 0,
    failure: Failure = None,
    given: Given = None,
    as_json: Json = False,
) -> None:
    """Make an atlas of a sweep of removals: which directions matter, and what predicts it."""
    require_writable((out or (sweep if sweep.is_dir() else sweep.parent)) / "atlas.html")
    with progress() as tell:
        tell("loading", 0.0)
        loaded = load_model(model, given)
        from dt_lens.behaviour.sweep.results import SweepResults
        from dt_lens.lens.activations import Activations
        from dt_lens.study.atlas.atlas import make_atlas
        from dt_lens.study.atlas.page import table_of, write_atlas
        from dt_lens.study.atlas.sentences import sentences

        results = SweepResults(sweep)
        inputs = None if activations is None else Activations.load(activations)
        tell("comparing", 0.2)
        found = make_atlas(loaded, results, inputs, value=value, seed=seed, failure=failure_rule(failure))
        folder = out or results.file.parent
        page = write_atlas(found, folder, Path(model).name, shlex.join(["dt-lens", *sys.argv[1:]]))
    said = [sentence.replace("**", "") for sentence in sentences(found)]
    if found.terms.failure_note:
        said.append(f"Failures ({found.terms.failure_rule}): {found.terms.failure_note}.")
    if as_json:
        frames = ("directions", "shares", "correlations", "reliability", "predictors", "weighted")
        tables = {name: getattr(found, name) for name in frames}
        print_json("atlas", model=model, value=found.value, large=found.large, **tables, sentences=said, page=page)
        return
    print_table(table_of(found), f"Directions whose {found.words[0]} matters")
    for sentence in said:
        say(sentence)
    say(f"\nThe atlas: {page}")
