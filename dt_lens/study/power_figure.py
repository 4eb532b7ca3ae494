"""The figure of a scan's power: which cosines it can find."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from dt_lens.report.style import PALETTE, columns_of, empty, finish

__all__ = ["interval_band", "power_curves"]

DASHES = ("solid", "dash", "dot", "dashdot")


def interval_band(curve: pd.DataFrame, x: str, colour: str) -> go.Scatter:
    """The band between a curve's columns ``low`` and ``high``, against its column ``x``."""
    at = curve[x].tolist()
    return go.Scatter(
        x=at + at[::-1],
        y=curve["high"].tolist() + curve["low"].tolist()[::-1],
        fill="toself",
        fillcolor=colour,
        opacity=0.15,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )


def power_curves(
    table: pd.DataFrame, *, rows: int | None = None, title: str = "Which cosines a scan can find"
) -> go.Figure:
    """Draw the share of planted directions that are found against their cosine.

    A colour stands for each ``d_model``, a dash for each number of labels, a band for the interval.

    Args:
        table: what ``study.power.power`` gives: ``d_model labels rows cosine found low high``.
        rows: the size of the table that is shown; the largest by default.
        title: the figure's title.

    Raises:
        DtLensError: for a missing column.
    """
    columns_of(table, ["d_model", "labels", "rows", "cosine", "found", "low", "high"], "The figure of power")
    if table.empty:
        return empty(title, "No direction was planted.")
    shown = int(table["rows"].max()) if rows is None else rows
    table = table[table["rows"] == shown]
    figure = go.Figure()
    dash_of = {n: DASHES[i % len(DASHES)] for i, n in enumerate(sorted(table["labels"].unique()))}
    for i, (d_model, some) in enumerate(table.groupby("d_model")):
        colour = PALETTE[i % len(PALETTE)]
        for n, curve in some.groupby("labels"):
            name = f"d_model {d_model}, {n} label" + ("s" if n != 1 else "")
            band = interval_band(curve, "cosine", colour).update(legendgroup=name)
            line = go.Scatter(
                x=curve["cosine"].tolist(),
                y=curve["found"],
                mode="lines",
                line={"color": colour, "dash": dash_of[n], "width": 2},
                name=name,
                legendgroup=name,
                hovertemplate="cosine %{x:.3f}: %{y:.0%} found<extra>" + name + "</extra>",
            )
            figure.add_traces([band, line])
    figure.update_xaxes(title="cosine of the planted direction with its label", range=[0, 1])
    figure.update_yaxes(title="share found at q < 0.05", range=[-0.02, 1.02], tickformat=".0%")
    figure.update_layout(legend={"x": 1.02, "y": 1, "xanchor": "left"})
    return finish(
        figure, title, f"one planted direction in a table of {shown:,} rows · band: 95 % interval", height=440
    )
