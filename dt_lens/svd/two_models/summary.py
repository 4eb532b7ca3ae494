"""What changed between two models in one sentence and one small table: for the notebook and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
import pandas as pd

from dt_lens.lens.matrices import RESIDUAL
from dt_lens.lens.printing import grid_html

__all__ = ["HEADINGS", "is_rounding", "most_changed", "notebook_html", "readable", "sentence"]

HEADINGS = {
    "relative_change": "relative change",
    "change_effective_rank": "effective rank of the change",
    "change_stable_rank": "stable rank",
    "change_leading_share": "its first direction's share",
    "spectrum_change": "spectrum change",
    "spectral_norm_change": "largest σ change",
}
SHOWN = ["matrix", *HEADINGS, "k"]


def most_changed(table: pd.DataFrame, count: int) -> pd.DataFrame:
    """The ``count`` rows of largest relative change, largest first."""
    return table.sort_values("relative_change", ascending=False, kind="stable").head(count)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The most important columns of a comparison's table, with angles under the names of their sides."""
    shown = table[SHOWN].copy()
    for side in ("left", "right"):
        for name in dict.fromkeys(table[f"{side}_side"]):
            if name not in RESIDUAL:
                continue
            values = table[f"{side}_angle"].where(table[f"{side}_side"] == name)
            column = f"{name}_angle"
            shown[column] = values if column not in shown else shown[column].fillna(values)
    return shown


def is_rounding(table: pd.DataFrame) -> bool:
    """Whether matrices differ, and none by more than the relative rounding of a float32 number, 6e-8."""
    largest = float(table["relative_change"].max())
    return 0 < largest <= float(np.finfo(np.float32).eps) / 2


def sentence(table: pd.DataFrame, names: tuple[str, str]) -> str:
    """How many matrices differ between the two named models, and which one most."""
    changed, (a, b) = table[table["relative_change"] > 0], names
    if changed.empty:
        return f"{a} and {b} have the same weights in all {len(table)} matrices: no relative difference is above 0."
    most = most_changed(table, 1).iloc[0]
    if is_rounding(table):
        return (
            f"No matrix of {a} and {b} differs by more than float32 rounding: the largest relative difference is "
            f"{most['relative_change']:.2g}, of {most['matrix']}."
        )
    return (
        f"{len(changed)} of {len(table)} matrices differ between {a} and {b}; most of all {most['matrix']}, by "
        f"{most['relative_change']:.2g} of its norm."
    )


def notebook_html(table: pd.DataFrame, names: tuple[str, str], notes: Sequence[str]) -> str:
    """The most changed matrices as a plain table that suits a light and a dark notebook."""
    shown = readable(most_changed(table, 12))
    headings = {name: name for name in shown.columns} | {k: v for k, v in HEADINGS.items() if k in shown.columns}
    body = [[_cell(value) for value in row] for row in shown.itertuples(index=False)]
    said = escape(" ".join([sentence(table, names), *notes]))
    return f"<p>{said}</p>{grid_html(headings.values(), body)}"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.3g}"
    return str(value)
