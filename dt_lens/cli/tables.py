"""The command `top`."""

from __future__ import annotations

from typing import Annotated

import typer

from dt_lens.cli.options import (
    Given,
    Model,
    Raw,
    load_model,
)
from dt_lens.cli.output import print_table


def top(
    model: Model,
    matrix: Annotated[str, typer.Argument(help="A matrix, such as blocks.0.mlp.W_in.")],
    embedding: Annotated[str, typer.Argument(help="An embedding, such as action_out.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many directions.")] = 8,
    side: Annotated[str | None, typer.Option(help="read, write, query or key, where the matrix has two.")] = None,
    labels: Annotated[int, typer.Option(min=1, help="Labels at each pole.")] = 3,
    raw: Raw = False,
    given: Given = None,
) -> None:
    """The labels that a matrix's first directions point towards and away from."""
    loaded = load_model(model, given)
    from dt_lens.svd import WeightSVD

    table = WeightSVD(loaded, fold_layernorm=not raw).top(matrix, embedding, k, side, labels)  # type: ignore[arg-type]
    rows = []
    for (sv, sigma), poles in table.groupby(["sv", "sigma"], sort=False):
        named = {
            pole: ", ".join(f"{r.label} {r.cosine:+.2f}" for r in group.itertuples())
            for pole, group in poles.groupby("pole", sort=False)
        }
        rows.append({"sv": sv, "sigma": sigma, "towards": named.get("+", ""), "away": named.get("-", "")})
    import pandas as pd

    print_table(pd.DataFrame(rows), f"{matrix} × {embedding}")
