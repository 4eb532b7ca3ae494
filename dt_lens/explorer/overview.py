"""The overview: every matrix with every embedding that it is compared with; a click on a cell leads to the two."""

from __future__ import annotations

import html as text
from typing import Any, Literal
from urllib.parse import urlencode

import numpy as np
from dash import Dash, Input, Output, State, dcc, html, no_update

from dt_lens.explorer.explored import ALPHA, Explored
from dt_lens.explorer.parts import figure, link, note, number, p_text, row_table, said, short
from dt_lens.report.heatmaps import scan_overview
from dt_lens.report.spectra import best_matches
from dt_lens.report.style import natural

__all__ = ["SHOWN", "cell_at", "overview", "overview_figure", "register", "strongest_rows"]

SHOWN = {
    "cosine": "strongest |cosine|",
    "discoveries": f"directions with q < {ALPHA:g}",
    "z": "strongest z",
}


def overview(explored: Explored, query: dict[str, str], dark: bool) -> Any:
    """The page."""
    show = query.get("show", "cosine")
    show = show if show in SHOWN else "cosine"
    best = strongest_rows(explored)
    return html.Div(
        [
            html.H1(f"What {explored.source} reads and writes"),
            html.P(_summary(explored)),
            dcc.RadioItems(
                [{"label": label, "value": value} for value, label in SHOWN.items()],
                show,
                id="show",
                inline=True,
                className="choices",
            ),
            figure(
                "overview",
                overview_figure(explored, show),
                dark,
                "Click a cell to see the matrix beside the embedding. Rows: layer, matrix and, where it has two, side.",
            ),
            html.H2("The strongest matches"),
            row_table(
                ["matrix", "side", "sv", "embedding", "label", "cosine", "q"],
                [
                    [
                        link(
                            short(row["matrix"]),
                            "/matrix",
                            matrix=row["matrix"],
                            side=row["side"],
                            embedding=row["embedding"],
                            sv=row["sv"],
                        ),
                        row["side"],
                        row["sv"],
                        row["embedding"],
                        row["text"],
                        number(row["cosine"], "+.3f"),
                        p_text(row["q_value"]),
                    ]
                    for row in best
                ],
                numbers=(2, 5, 6),
            ),
            note(
                "A cosine says that a direction points the way of a label; it does not say that the model uses it. "
                "An edit beside a control of equal energy does: see `Edit` and `Live`."
            ),
        ]
    )


def _summary(explored: Explored) -> list[Any]:
    t = explored.table
    real = t[~t["embedding"].isin(explored.untrained)]
    found, untrained = int((real["q_value"] < ALPHA).sum()), len(t) - len(real)
    words = (
        f"{found:,} of {len(real):,} comparisons of a singular direction with an embedding match better than a random "
        f"rotation explains (q < {ALPHA:g}, Benjamini-Hochberg over all {len(t):,})."
    )
    if untrained:
        null = t[t["embedding"].isin(explored.untrained)]
        hits = int((null["q_value"] < ALPHA).sum())
        words += f" Of {untrained:,} with heads that had no loss, where nothing can be found, {hits:,} do."
    return said(words)


def strongest_rows(explored: Explored, n: int = 12) -> list[dict[str, Any]]:
    """The best match of each matrix side, the largest |cosine| first; heads without a loss are left out."""
    from dt_lens.explorer.explored import readable

    t = explored.table[~explored.table["embedding"].isin(explored.untrained)]
    best = best_matches(t, ["place"], "cosine", ALPHA).head(n)
    rows: list[dict[Any, Any]] = list(best.to_dict("records"))
    return [{**row, "text": label} for row, label in zip(rows, readable(list(best["label"])), strict=True)]


def places_of(explored: Explored) -> tuple[list[tuple[str, str]], list[str]]:
    """The rows of the overview, each a matrix and a side, and its columns, each an embedding."""
    best = best_matches(explored.table, ["place", "embedding"], "cosine", ALPHA)
    sides = dict(zip(best["place"], zip(best["matrix"], best["side"], strict=True), strict=True))
    places = sorted(sides, key=natural)
    return [sides[place] for place in places], list(dict.fromkeys(explored.table["embedding"]))


def overview_figure(explored: Explored, show: str = "cosine") -> Any:
    """The heatmap of one of ``SHOWN``."""
    value: Literal["cosine", "z"] = "z" if show == "z" else "cosine"
    made = scan_overview(explored.table, value=value, alpha=ALPHA, title="Matrices and embeddings")
    if show == "discoveries":
        _count(explored, made)
    rows, _ = places_of(explored)
    names = [short(text.unescape(tick)) for tick in made.layout.yaxis.ticktext]
    assert len(rows) == len(names)
    made.update_yaxes(ticktext=names)
    # Every cell says its number, so that a narrow page has no need of a colour bar.
    made.update_coloraxes(showscale=False)
    made.update_xaxes(tickangle=-45)
    columns = len(made.layout.xaxis.ticktext)
    made.update_layout(height=made.layout.height + 50, meta={"least_width": 115 + 46 * columns})
    return made


def _count(explored: Explored, made: Any) -> None:
    """Show how many directions match, in place of how well the best does."""
    rows, columns = places_of(explored)
    t = explored.table
    counted = (t["q_value"] < ALPHA).groupby([t["matrix"], t["side"], t["embedding"]]).agg(["sum", "size"])
    grid = np.full((len(rows), len(columns)), np.nan)
    for at, place in enumerate(rows):
        for column, embedding in enumerate(columns):
            if (*place, embedding) in counted.index:
                grid[at, column] = counted.loc[(*place, embedding), "sum"]
    for trace in made.data:
        shown = ~np.isnan(np.asarray(trace.z, dtype=float))
        trace.z = np.where(shown, grid, np.nan)
        trace.text = np.where(shown, [["" if np.isnan(v) else f"{v:.0f}" for v in line] for line in grid], "")
    top = max(1.0, float(np.nanmax(grid, initial=0.0)))
    for axis in ("coloraxis", "coloraxis2"):
        if made.layout[axis].cmax is not None:
            made.layout[axis].update(cmin=0, cmax=top, colorbar={"title": {"text": SHOWN["discoveries"]}})
    made.update_layout(
        title={"subtitle": {"text": f"directions whose best match has q < {ALPHA:g} · empty: not compared"}}
    )


def cell_at(explored: Explored, clicked: Any) -> dict[str, str] | None:
    """The matrix, side and embedding of a clicked cell; ``None`` for a click on nothing."""
    try:
        point = clicked["points"][0]
        row, column = int(point["y"]), int(point["x"])
        rows, columns = places_of(explored)
        if row < 0 or column < 0:
            return None
        (matrix, side), embedding = rows[row], columns[column]
    except (TypeError, KeyError, IndexError, ValueError):
        return None
    return {"matrix": matrix, "side": side, "embedding": embedding}


def register(app: Dash, explored: Explored) -> None:
    """The callbacks."""

    def clicked(data: Any) -> Any:
        found = cell_at(explored, data)
        return (no_update, no_update) if found is None else ("/matrix", f"?{urlencode(found)}")

    def shown(value: Any, search: Any) -> Any:
        return no_update if f"show={value}" in (search or "?show=cosine") else f"?show={value}"

    goes = (Output("url", "pathname", allow_duplicate=True), Output("url", "search", allow_duplicate=True))
    app.callback(*goes, Input("overview", "clickData"), prevent_initial_call=True)(clicked)
    app.callback(
        Output("url", "search", allow_duplicate=True),
        Input("show", "value"),
        State("url", "search"),
        prevent_initial_call=True,
    )(shown)
