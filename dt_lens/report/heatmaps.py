"""Heatmaps of how singular directions match embeddings: pure functions of tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go

from dt_lens.errors import DtLensError, because
from dt_lens.report.spectra import best_matches, q_text
from dt_lens.report.style import columns_of, empty, finish, natural, plain

__all__ = ["label_axis", "room_for", "scan_heatmap", "scan_overview"]

# What an untrained head matches is chance; with an alpha, grey is readable on light and dark pages.
_GREYS = [[0.0, "rgba(128,136,144,0.75)"], [0.5, "rgba(128,136,144,0.05)"], [1.0, "rgba(128,136,144,0.75)"]]


def scan_heatmap(
    cosines: pd.DataFrame,
    *,
    q_values: pd.DataFrame | None = None,
    sigma: npt.ArrayLike | None = None,
    matrix: str = "",
    embedding: str = "",
    alpha: float = 0.05,
    limit: float | None = None,
    trained: bool = True,
    links: Sequence[str] | None = None,
    title: str = "",
) -> go.Figure:
    """The cosines of one matrix's singular directions with one embedding's directions.

    Args:
        cosines: ``[directions, labels]``; the index holds ``sv``, the columns the labels; each entry in [-1, 1].
        q_values: a table of the same shape, or with one column for a q value that belongs to a whole direction (the
            scan's: the best match of that direction). A dot marks a cell with q below ``alpha``; with one column the
            dot sits on the direction's largest absolute cosine.
        sigma: ``[directions]``, shown beside each direction's number.
        matrix: its name, for the title.
        embedding: its name, for the title.
        alpha: the false discovery rate at which a cell is marked.
        limit: the colour range is ``±limit``; by default the largest absolute cosine, at least 0.1. Give the same
            limit to figures that will be compared.
        trained: false for an output head that had no loss: the figure is then grey, for what it shows is chance.
        links: for each direction the id of what a click on its cells leads to in a page.
        title: the figure's title; matrix and embedding by default.

    Raises:
        DtLensError: if the q values or sigmas do not fit the cosines.
    """
    title = title or " × ".join(part for part in (matrix, embedding) if part) or "Cosines"
    if cosines.empty:
        return empty(title, "There are no directions to compare.")
    values = cosines.to_numpy(dtype=np.float64)
    rows, columns = values.shape
    labels = [plain(label) for label in cosines.columns]
    marked, q = _significant(values, q_values, alpha)
    numbers = [str(sv) for sv in cosines.index]
    strengths = None if sigma is None else np.asarray(sigma, dtype=np.float64)
    if strengths is not None and strengths.shape != (rows,):
        raise DtLensError(
            f"The cosines have {rows} directions, but there are {strengths.size} sigmas; give one sigma per direction."
        )
    names = numbers
    if strengths is not None:
        names = [f"{n}  <i>σ {s:.3g}</i>" for n, s in zip(numbers, strengths, strict=True)]
    q_texts = np.array([["" if np.isnan(cell) else f"<br>q {q_text(cell)}" for cell in row] for row in q], dtype=object)
    hover = np.stack([np.broadcast_to(np.array(names, dtype=object)[:, None], values.shape), q_texts], axis=-1)
    top = limit if limit is not None else max(0.1, float(np.nanmax(np.abs(values), initial=0.0)))
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=np.arange(columns),
            y=np.arange(rows),
            text=np.where(marked, "●", ""),
            texttemplate="%{text}",
            textfont={"size": 9 if rows <= 40 else 7},
            customdata=hover,
            hovertext=[labels] * rows,
            hovertemplate="sv %{customdata[0]}<br>%{hovertext}<br>cosine %{z:+.3f}%{customdata[1]}<extra></extra>",
            coloraxis="coloraxis",
            meta=None if links is None else {"links": list(links)},
        )
    )
    colours = _colours(-top, top, "cosine")
    figure.update_layout(coloraxis=colours if trained else colours | {"autocolorscale": False, "colorscale": _GREYS})
    step = 18 if rows <= 40 else 12
    shown = range(rows) if rows <= 64 else range(0, rows, 4)
    figure.update_xaxes(label_axis(labels), title_text=f"{plain(embedding)} label" if embedding else "label")
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(shown),
        ticktext=[names[i] for i in shown],
        range=[rows - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
        title_text="direction (sv), largest σ first",
        tickfont={"size": 12 if rows <= 40 else 10},
    )
    found = f" · ● q < {alpha:g}: {int(marked.any(axis=1).sum())} of {rows} directions" if q_values is not None else ""
    return finish(
        figure,
        title,
        "cosine of each singular direction with each label" + found + ("" if trained else " · grey: untrained head"),
        height=rows * step + 120 + room_for(labels),
        wide=190 + 22 * columns,
    )


def scan_overview(
    table: pd.DataFrame,
    *,
    value: Literal["cosine", "z"] = "cosine",
    alpha: float = 0.05,
    link: Callable[[Mapping[Any, Any]], str] | None = None,
    title: str = "Best match of every matrix with every embedding",
) -> go.Figure:
    """An overview of a scan: the best match of any direction, for each matrix and embedding.

    Args:
        table: the scan's rows: ``matrix sv embedding label cosine q_value``, also ``side``, ``sigma`` and ``z``.
            A matrix that the table has on two sides gets a row for each.
        value: colour and number: the largest absolute cosine, or the largest z.
        alpha: a star marks a cell whose smallest q value is below it.
            Columns of untrained heads, which ``table.attrs["untrained"]`` names, are grey.
        link: gives the id of what a click on a cell leads to in a page, from the cell's best row.
        title: the figure's title.

    Raises:
        DtLensError: if a column is missing.
    """
    columns_of(
        table,
        ["matrix", "sv", "embedding", "label", "cosine", "q_value", *(["z"] if value == "z" else [])],
        "The overview",
    )
    if table.empty:
        return empty(title, "The scan has no rows.")
    best = best_matches(table, ["place", "embedding"], value, alpha)
    places = sorted(best["place"].unique(), key=natural)
    embeddings = list(dict.fromkeys(table["embedding"]))
    untrained = [at for at, name in enumerate(embeddings) if name in table.attrs.get("untrained", ())]
    grid = np.full((len(places), len(embeddings)), np.nan)
    text = np.full(grid.shape, "", dtype=object)
    hover, leads = np.full(grid.shape, "", dtype=object), np.full(grid.shape, "", dtype=object)
    for row in best.to_dict("records"):
        at = places.index(row["place"]), embeddings.index(row["embedding"])
        grid[at] = abs(row["cosine"]) if value == "cosine" else row["z"]
        leads[at] = "" if link is None else link(row)
        star = row["smallest_q"] < alpha
        number = f"{grid[at]:.2f}" if value == "cosine" else f"{grid[at]:.1f}"
        text[at] = f"<b>{number}*</b>" if star else number
        hover[at] = (
            f"{plain(row['place'])} × {plain(row['embedding'])}<br>best: sv {row['sv']} and {plain(row['label'])}, "
            f"cosine {row['cosine']:+.3f}<br>smallest q {q_text(row['smallest_q'])}"
            f" · {int(row['discoveries'])} of {int(row['tested'])} with q < {alpha:g}"
        )
    grey = np.isin(np.arange(len(embeddings)), untrained)
    figure = go.Figure(
        [
            go.Heatmap(
                z=np.where(shown, grid, np.nan),
                x=np.arange(len(embeddings)),
                y=np.arange(len(places)),
                text=np.where(shown, text, ""),
                texttemplate="%{text}",
                textfont={"size": 11},
                customdata=hover,
                hovertemplate="%{customdata}<extra></extra>",
                hoverongaps=False,
                coloraxis=axis,
                meta=None if link is None else {"links": leads.tolist()},
            )
            for axis, shown in (("coloraxis", ~grey), ("coloraxis2", grey))
            if shown.any()
        ]
    )
    name = "best |cosine|" if value == "cosine" else "best z"
    low, high = 0.0, float(np.nanmax(grid, initial=0.0))
    colours = _colours(low, high if high > 0 else 1.0, name)
    figure.update_layout(coloraxis=colours)
    if untrained:
        figure.update_layout(
            coloraxis2=colours
            | {"autocolorscale": False, "colorscale": [[0.0, _GREYS[1][1]], _GREYS[2]], "showscale": False}
        )
    names = [plain(e) for e in embeddings]
    figure.update_xaxes(label_axis(names), side="top")
    figure.update_layout(margin_b=15)
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(places))),
        ticktext=[plain(p) for p in places],
        range=[len(places) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
        title_text="",
    )
    stars = int((best["smallest_q"] < alpha).sum())
    found = f"* q < {alpha:g} in {stars} of {len(best)} cells · {len(table):,} comparisons · empty: not compared"
    found += " · grey: untrained heads" if untrained else ""
    return finish(
        figure,
        title,
        f"{name} over directions and labels · {found}",
        height=len(places) * 22 + 70 + room_for(names),
        wide=230 + 46 * len(embeddings),
    )


def _significant(
    values: npt.NDArray[np.float64], q_values: pd.DataFrame | None, alpha: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Which cells to mark, and the q value of each cell (nan if it has none)."""
    q = np.full(values.shape, np.nan)
    if q_values is None:
        return np.zeros(values.shape, dtype=bool), q
    try:
        given = q_values.to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DtLensError(f"The q values must be numbers: {because(error)}.") from error
    if given.shape == values.shape:
        q[:] = given
    elif given.shape == (len(values), 1):
        size = np.where(np.isnan(values), -1.0, np.abs(values))
        q[np.arange(len(values)), size.argmax(axis=1)] = given[:, 0]
    else:
        raise DtLensError(
            f"The q values are {given.shape} and the cosines {values.shape}; give the same shape, or one column."
        )
    return q < alpha, q


def _colours(low: float, high: float, name: str) -> dict[str, Any]:
    """A colour axis with the colours of the template, diverging if the range spans zero."""
    return {"cmin": low, "cmax": high, "autocolorscale": True, "colorbar": {"title": {"text": name, "side": "right"}}}


def label_axis(labels: Sequence[str]) -> dict[str, Any]:
    """An axis that shows every label, turned if they are long or many."""
    steep = sum(map(len, labels)) > 80
    return {
        "tickmode": "array",
        "tickvals": list(range(len(labels))),
        "ticktext": list(labels),
        "tickangle": -60 if steep else 0,
        "tickfont": {"size": 12 if len(labels) <= 40 else 10},
        "range": [-0.5, len(labels) - 0.5],
        "showgrid": False,
        "zeroline": False,
    }


def room_for(labels: Sequence[str]) -> int:
    """Pixels that the turned labels take below the plot."""
    return min(160, 6 * max(map(len, labels), default=0)) if sum(map(len, labels)) > 80 else 20
