"""The command `scan`: what singular directions match, tested against a null."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dt_lens.arguments import require_writable
from dt_lens.cli.completion import NULLS, complete_embedding, one_of
from dt_lens.cli.options import (
    Given,
    Json,
    Matrices,
    Model,
    Raw,
    Seed,
    WeightsOnly,
    activations_of,
    load_model,
    split,
)
from dt_lens.cli.output import print_json, print_table, progress, require_file, say, write_csv
from dt_lens.errors import DtLensError
from dt_lens.progress import stage

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = (
    "dt-lens scan hopper --top 10",
    "dt-lens scan tiny-gpt2 --matrices 'blocks.0.mlp.*' --out scan.csv",
    "dt-lens scan hopper --matrices '*.W_in' --json",
)


def scan(
    model: Model,
    top: Annotated[int, typer.Option(min=0, help="Number of strongest matches to print; 0 for all.")] = 20,
    matrices: Matrices = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated embeddings to compare every side with; the natural pairings by default.",
            autocompletion=complete_embedding,
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Take only the first RANK directions of each matrix.")] = None,
    raw: Raw = False,
    null: Annotated[
        str,
        typer.Option(
            help="How a direction without meaning is drawn: haar, covariance, spectrum, bands, untrained or shuffled.",
            autocompletion=one_of(*NULLS),
        ),
    ] = "haar",
    draws: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of models (untrained, shuffled) or directions (the others) to draw; enough by default.",
        ),
    ] = None,
    activations: Annotated[
        Path | None,
        typer.Option(
            help="For --null covariance, spectrum and bands: a file of activations; collected from 10 episodes by "
            "default, or from a language model's held-out text."
        ),
    ] = None,
    subspaces: Annotated[
        bool, typer.Option("--subspaces", help="Test spans of leading directions instead of single directions.")
    ] = False,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Write the whole table to this .csv file.")] = None,
    weights_only: WeightsOnly = False,
    resume: Annotated[
        Path | None, typer.Option(help="Folder to store finished work in; the same command resumes from it.")
    ] = None,
    given: Given = None,
    as_json: Json = False,
) -> None:
    """List what every singular direction matches best, with p and q values under a null of your choice."""
    if subspaces and null != "haar":
        raise DtLensError(f"--subspaces knows the null haar and not {null!r}; leave --null out.")
    for option, value in (("draws", draws), ("activations", activations)):
        if subspaces and value is not None:
            raise DtLensError(f"--{option} is for single directions and does not apply to --subspaces; leave one out.")
    names, sets = split(matrices, "matrices"), split(embeddings, "embeddings")
    from dt_lens.svd.null_sources import OF_THE_STREAM, require_null

    require_null(null)
    require_file(out, ".csv")
    if resume is not None and not (resume.is_dir() and any(resume.iterdir())):  # a full one may be read only
        require_writable(resume / "finished.safetensors")
    with progress() as tell:
        tell("loading", 0.0)
        loaded = load_model(model, given, weights_only=weights_only)
        from dt_lens.svd.weight_svd import WeightSVD

        svd = WeightSVD(loaded, rank, fold_layernorm=not raw, resume=resume)
        if subspaces:
            table = svd.subspaces(names, sets, seed=seed, progress=tell)
        else:
            collects = activations is None and null in OF_THE_STREAM
            inputs = activations_of(loaded, activations, null in OF_THE_STREAM, seed, stage(tell, 0.0, 0.5))
            table = svd.scan(
                names,
                null,
                seed,
                sets,
                progress=stage(tell, 0.5, 1.0) if collects else tell,
                activations=inputs,
                draws=draws,
            )
    best = table.sort_values(["z"], ascending=False, kind="stable")
    shown = best.head(top) if top else best
    if as_json:
        found = int((table["q_value"] < 0.05).sum())
        print_json("scan", model=model, rows=len(table), discoveries=found, table=shown, about=table.attrs)
    else:
        print_table(shown, f"The strongest of {len(table):,} comparisons")
        _print_summary(table)
    if out:
        write_csv(table, out)


def _print_summary(table: pd.DataFrame) -> None:
    """Print the number of discoveries, of those with untrained heads, and what the null assumes."""
    found = table["q_value"] < 0.05
    untrained = table["embedding"].isin(table.attrs["untrained"])
    say(f"{int(found.sum()):,} of {len(table):,} comparisons are discoveries at q < 0.05.")
    if untrained.any():
        say(f"With heads that were never trained: {int((found & untrained).sum())} of {int(untrained.sum()):,}.")
    say(f"Null: {table.attrs['null']}. {table.attrs['assumes']}")
    if "smallest_p" in table.attrs:
        say(f"{table.attrs['draws']} models were drawn, so no p-value is below {table.attrs['smallest_p']:.1e}.")
