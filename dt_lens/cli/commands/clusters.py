"""The command `clusters`: do singular directions sort labels by known factors?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dt_lens.cli.completion import complete_embedding, one_of
from dt_lens.cli.options import Given, Matrices, Model, Raw, Seed, WeightsOnly, activations_of, load_model, split
from dt_lens.cli.output import print_table, progress, require_file, say, write_csv

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = (
    "dt-lens clusters taxi --matrices '*.W_in' --sv 0-3",
    "dt-lens clusters tiny-gpt2 --matrices 'blocks.0.mlp.W_in' --sv 0-7",
)


def clusters(
    model: Model,
    factors: Annotated[
        Path | None,
        typer.Option(
            help="A .csv file with a column label and a column for each factor; the model's own factors by default, or "
            "those of tokens."
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated factors to test; passenger=R, or 'cell=(3, 6)', asks about one level against all "
            "others."
        ),
    ] = None,
    strata: Annotated[
        str | None, typer.Option(help="Comma-separated factors to hold fixed: labels are ranked within their levels.")
    ] = None,
    matrices: Matrices = None,
    sv: Annotated[
        str | None, typer.Option("--sv", help="Directions of each matrix, such as 0, 0-9 or 0,2; all by default.")
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated embeddings to compare every side with; the natural pairings by default.",
            autocompletion=complete_embedding,
        ),
    ] = None,
    null: Annotated[
        str,
        typer.Option(
            help="How a direction without meaning is drawn: haar (anywhere) or spectrum (random signs).",
            autocompletion=one_of("haar", "spectrum"),
        ),
    ] = "haar",
    activations: Annotated[
        Path | None,
        typer.Option(
            help="For --null spectrum: a file of activations; collected from 10 episodes by default, or from a "
            "language model's held-out text."
        ),
    ] = None,
    draws: Annotated[
        int | None, typer.Option(min=1, help="Number of random directions to draw; enough by default.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Count rows with q up to this.")] = 0.05,
    raw: Raw = False,
    top: Annotated[int, typer.Option(min=0, help="Number of strongest rows to print; 0 for all.")] = 20,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Write the whole table to this .csv file.")] = None,
    weights_only: WeightsOnly = False,
    given: Given = None,
) -> None:
    """Test whether singular directions sort states or tokens by what they are, such as a taxi's row."""
    wanted: dict[str, Any] = {"only": split(only, "only"), "strata": split(strata, "strata")}
    wanted |= {"matrices": split(matrices, "matrices"), "embeddings": split(embeddings, "embeddings")}
    require_file(out, ".csv")
    with progress() as tell:
        tell("loading", 0.0)
        loaded = load_model(model, given, weights_only=weights_only)
        from dt_lens.svd import clustering

        inputs = activations_of(loaded, activations, null == "spectrum", seed, tell)
        table = clustering.clusters(
            loaded,
            factors,
            sv=sv,
            null=null,
            activations=inputs,
            draws=draws,
            alpha=alpha,
            seed=seed,
            fold_layernorm=not raw,
            progress=tell,
            **wanted,
        )
    best = table.sort_values("p_value", kind="stable")
    print_table(_shown(best.head(top) if top else best), f"The strongest of {len(table):,} rows")
    _print_summary(table)
    if out:
        write_csv(table, out)


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that fit a terminal; the measure stands before its number."""
    shown = table[["matrix", "side", "sv", "block", "embedding", "factor", "effect", "p_value", "q_value"]].copy()
    symbols = {"auc": "AUC", "epsilon_squared": "ε²"}
    measures = table.attrs["measures"]
    shown["effect"] = [
        f"{symbols[measures[factor]]} {effect:.2f}"
        for factor, effect in zip(shown["factor"], shown["effect"], strict=True)
    ]
    return shown


def _print_summary(table: pd.DataFrame) -> None:
    """Print the number of clusters by factor, that of an untrained model, and what the numbers mean."""
    from dt_lens.svd.clustering import MEASURES

    about = table.attrs
    found = table[table["q_value"] <= about["alpha"]]
    by_factor = ", ".join(f"{factor} {count:,}" for factor, count in found["factor"].value_counts().items())
    what = "direction" if (table["block"] == 1).all() else "direction or block"
    say(
        f"{len(found):,} of {len(table):,} rows (a row is a {what}) sort labels by a factor at q <= {about['alpha']:g}"
        + (f": {by_factor}." if by_factor else ".")
    )
    other = about["untrained_model"]
    say(f"An untrained model of the same shape: {other['found']:,} of {other['rows']:,} (null: haar).")
    if about["strata"]:
        say(f"Labels were ranked within each combination of {' and '.join(about['strata'])}.")
    symbols = {"epsilon_squared": "ε² is ", "auc": "AUC is "}
    for measure in dict.fromkeys(about["measures"].values()):
        say(symbols[measure] + MEASURES[measure] + ".")
    say(f"Null: {about['null']}. {about['assumes']}")
    say(f"Up to {about['draws']:,} random directions were drawn, so no p-value is below {about['smallest_p']:.1e}.")
    lone, alpha = about["lone_p"], about["alpha"]
    if lone > about["smallest_p"]:
        say(f"A row above all of them by one factor alone has a p-value of up to {lone:.1e}.")
    if lone * len(table) > alpha:
        say(f"That may be too large for one row alone to have q <= {alpha:g}; for that draw more with --draws.")
    for reason in dict.fromkeys(about["left_out"].values()):
        say(f"Left out: {reason}")
