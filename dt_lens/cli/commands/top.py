"""The command `top`: the labels at both poles of singular directions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dt_lens.cli.completion import complete_embedding, complete_matrix, one_of
from dt_lens.cli.options import Given, Json, Model, Raw, WeightsOnly, load_model
from dt_lens.cli.output import print_json, print_table, print_written, progress
from dt_lens.errors import DtLensError

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = (
    "dt-lens top hopper blocks.0.mlp.W_in action_out",
    "dt-lens top tiny-gpt2 blocks.3.mlp.W_out token_out -k 4 --words",
)


def top(
    model: Model,
    matrix: Annotated[
        str,
        typer.Argument(
            help="A matrix such as blocks.0.mlp.W_in, or a pattern such as '*.OV.*'.", autocompletion=complete_matrix
        ),
    ],
    embeddings: Annotated[
        list[str] | None,
        typer.Argument(
            help="Embeddings, such as action_out; the natural pairings by default.", autocompletion=complete_embedding
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Number of directions of each matrix.")] = 8,
    side: Annotated[
        str | None,
        typer.Option(
            help="read, write, query or key, if the matrix has two sides.",
            autocompletion=one_of("read", "write", "query", "key"),
        ),
    ] = None,
    labels: Annotated[int, typer.Option("-n", "--n", "--labels", min=1, help="Number of labels at each pole.")] = 10,
    ascii_only: Annotated[
        bool, typer.Option("--ascii", help="Show only labels of printable ASCII characters.")
    ] = False,
    words: Annotated[bool, typer.Option("--words", help="Show only whole words.")] = False,
    counts: Annotated[
        Path | None, typer.Option(help="A .csv file of two columns, labels and counts; see --at-least.")
    ] = None,
    at_least: Annotated[
        float | None, typer.Option(help="Show only labels with at least this count in --counts; 1 by default.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the table as a page to this .html file.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the rows to this .csv file, or the page to this .html file.")
    ] = None,
    raw: Raw = False,
    weights_only: WeightsOnly = False,
    given: Given = None,
    as_json: Json = False,
) -> None:
    """List the labels that a matrix's leading directions point towards and away from."""
    if at_least is not None and counts is None:
        raise DtLensError("--at-least needs counts; give --counts with it, a .csv file of labels and counts.")
    from dt_lens.svd.token_page import require_token_file

    for file in (html, out):
        if file is not None:
            require_token_file(file)
    counted = None if counts is None else _counts(counts)
    with progress() as tell:
        tell("loading", 0.0)
        loaded = load_model(model, given, weights_only=weights_only)
        from dt_lens.svd import label_filters
        from dt_lens.svd.weight_svd import WeightSVD

        rules: list[Any] = [label_filters.ascii_only] if ascii_only else []
        rules += [label_filters.whole_words] if words else []
        if counted is not None:
            rules.append(label_filters.at_least(counted, 1 if at_least is None else at_least))
        tell("decomposing and comparing", 0.5)
        # All directions of a small matrix cost as much as a few; of a large one they cost more.
        svd = WeightSVD(loaded, k + 8 if weights_only else None, fold_layernorm=not raw)
        table = svd.tokens(matrix, embeddings or None, k, labels, rules or None, side)  # type: ignore[arg-type]
    if as_json:
        print_json("top", model=model, table=table.rows)
    else:
        for (name, where), part in table.rows.groupby(["matrix", "side"], sort=False):
            print_table(_lines(part), f"{name}, {where} side")
    for file in (html, out):
        if file is not None:
            table.save(file)
            print_written(file)


def _lines(part: pd.DataFrame) -> pd.DataFrame:
    """A row for each direction and embedding."""
    import pandas as pd

    from dt_lens.lens.token_text import spelled, texts

    rows = []
    by = ["sv", "sigma", "block", "embedding", "trained"]
    for (sv, sigma, block, embedding, trained), found in part.groupby(by, sort=False):
        row = {"sv": str(sv) if block == 1 else f"{sv} (1 of {block})", "sigma": sigma}
        row["embedding"] = embedding if trained else f"{embedding} (untrained)"
        for heading, pole in (("towards", "+"), ("away", "-")):
            these = found[found["pole"] == pole]
            said = zip(texts(list(these["label"])), these["cosine"], strict=True)
            row[heading] = ", ".join(f"{spelled(text)} {cosine:+.2f}" for text, cosine in said)
        rows.append(row)
    return pd.DataFrame(rows)


def _counts(file: Path) -> dict[str, float]:
    import pandas as pd

    try:
        table = pd.read_csv(file, keep_default_na=False)
        return dict(zip(table.iloc[:, 0].astype(str), table.iloc[:, 1].astype(float), strict=True))
    except (OSError, ValueError, IndexError) as error:
        raise DtLensError(
            f"{file} cannot be read as a table of labels and counts; give a .csv with two columns."
        ) from (error)
