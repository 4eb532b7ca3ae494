"""The part of a study's report about factors: which directions sort the labels of an embedding by one."""

from __future__ import annotations

from typing import Any

import pandas as pd

from dt_lens.errors import DtLensError
from dt_lens.progress import ProgressCallback
from dt_lens.report.page import Block, Plot, Section, Table
from dt_lens.svd.clustering import MEASURES, clusters
from dt_lens.svd.factor_plots import plot_factors, plot_grid
from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["cluster_section", "clusters_of"]

SHOWN = ("matrix", "side", "sv", "block", "factor", "effect", "p_value", "q_value")
ROWS = 12
ALPHA = 0.05
TITLE = "Directions that sort labels by what they are"


def clusters_of(model: Any, matrices: Any, seed: int, tell: ProgressCallback) -> pd.DataFrame | str | None:
    """The table of ``clusters``, where the model's facts say what its labels consist of.

    Returns:
        a sentence, in place of the table, where these factors cannot be tested; ``None`` where there are none.
    """
    if not getattr(getattr(model, "facts", None), "factors", None):
        return None
    try:
        found: pd.DataFrame = clusters(model, matrices=matrices, seed=seed, beside=False, progress=tell)
    except DtLensError as error:  # facts may name factors that cannot be tested, of these matrices or at all
        return str(error)
    return found


def cluster_section(table: pd.DataFrame | str, svd: WeightSVD) -> Section:
    """What the report shows of a table of ``clusters``.

    Args:
        table: of ``clusters``, or a sentence that says why there is none.
        svd: the decompositions, for the picture of one direction.
    """
    if isinstance(table, str):
        return Section(TITLE, [f"The factors of the labels were not tested. {table}"])
    found = table[table["q_value"] <= ALPHA]
    by_factor = ", ".join(f"{name} {count:,}" for name, count in found["factor"].value_counts().items())
    embeddings = " and ".join(dict.fromkeys(table["embedding"]))
    measures = "; ".join(MEASURES[name] for name in dict.fromkeys(table.attrs["measures"].values()))
    counted = f": {by_factor}" if by_factor else ""
    said = (
        f"**{len(found):,} of {len(table):,}** directions sort the labels of {embeddings} by a known factor more than "
        f"random directions do (q ≤ {ALPHA:g}){counted}. The labels are left where they are: like labels lie close to "
        "each other, so that any direction sorts them a little, and only more than that counts."
    )
    blocks: list[Block] = [said, Plot(plot_factors(table, alpha=ALPHA))]
    best = table.sort_values("p_value", kind="stable")
    single = best[best["block"] == 1]
    grid = None if single.empty else _grid(svd, single.iloc[0])
    if grid is not None:
        blocks.append(grid)
    blocks.append(
        Table(best[list(SHOWN)].head(ROWS), f"The {min(ROWS, len(best))} of smallest p. The effect: {measures}.")
    )
    return Section(TITLE, blocks)


def _grid(svd: WeightSVD, row: pd.Series[Any]) -> Plot | None:
    """The surest direction on the world's grid, if the factors are of one."""
    facts: Any = getattr(svd.model, "facts", None)
    own = facts.factors.get(row["embedding"])
    if own is None or not ({"row", "column"} <= set(own) or "cell" in own):
        return None
    try:
        return Plot(plot_grid(svd, row["matrix"], int(row["sv"]), row["side"], embedding=row["embedding"]))
    except DtLensError:  # more panels than a page can show
        return None
