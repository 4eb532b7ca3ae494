"""The commands `scan` and `certify`: what the weights are, and that they are read right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dt_lens.cli.options import (
    Given,
    Matrices,
    Model,
    Raw,
    Seed,
    WeightsOnly,
    load_model,
    split,
)
from dt_lens.cli.output import print_table, progress, written


def scan(
    model: Model,
    top: Annotated[int, typer.Option(min=0, help="How many of the strongest matches to print; 0 for all.")] = 20,
    matrices: Matrices = None,
    embeddings: Annotated[
        str | None, typer.Option(help="Compare every side with these; natural pairings by default.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Only the first RANK directions of each matrix.")] = None,
    raw: Raw = False,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Write the whole table to this .csv file.")] = None,
    weights_only: WeightsOnly = False,
    resume: Annotated[
        Path | None, typer.Option(help="Keep what is finished in this folder, and go on from there.")
    ] = None,
    given: Given = None,
) -> None:
    """What every singular direction matches best, with p and q values under a random rotation."""
    with progress() as tell:
        tell("loading", 0.0)
        loaded = load_model(model, given, weights_only=weights_only)
        from dt_lens.svd import WeightSVD

        svd = WeightSVD(loaded, rank, fold_layernorm=not raw, resume=resume)
        table = svd.scan(split(matrices), seed=seed, embeddings=split(embeddings), progress=tell)
    best = table.sort_values(["z"], ascending=False, kind="stable")
    print_table(best.head(top) if top else best, f"The strongest of {len(table):,} comparisons")
    found = table["q_value"] < 0.05
    untrained = table["embedding"].isin(table.attrs["untrained"])
    print(f"{int(found.sum()):,} of {len(table):,} comparisons are discoveries at q < 0.05.")
    if untrained.any():
        print(f"With heads that were never trained: {int((found & untrained).sum())} of {int(untrained.sum()):,}.")
    if out:
        written(out, lambda: table.to_csv(out, index=False))


def certify(model: Model, seed: Seed = 0, given: Given = None) -> None:
    """Prove by a forward pass that every matrix's name, orientation, scale and heads are right."""
    loaded = load_model(model, given, check=False)
    from dt_lens.certification import certify as prove

    certificate = prove(loaded, seed)
    import pandas as pd

    print_table(
        pd.DataFrame({"matrix": certificate.errors.keys(), "relative error": certificate.errors.values()}),
        f"{model}: certified",
    )
    print(certificate)
