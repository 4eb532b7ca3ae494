"""The results of a sweep, and the atlas of it: each edit beside its controls; a click leads to the matrix."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import pandas as pd
import plotly.graph_objects as go
from dash import Dash, Input, Output, State, dcc, html, no_update

from dt_lens.behaviour.tasks import terms_in
from dt_lens.errors import DtLensError
from dt_lens.explorer.explored import ALPHA, Explored
from dt_lens.explorer.parts import figure, link, note, number, p_text, row_table, said, short
from dt_lens.report.style import CONTROL, EDIT, empty, finish, plain

__all__ = ["damage_figure", "edits_beside_controls", "register", "sweep"]

SHOWN = 20  # edits of the table


def sweep(explored: Explored, query: dict[str, str], dark: bool) -> Any:
    """The page.

    Raises:
        DtLensError: if the sweep's file cannot be read.
    """
    results = explored.sweep
    if results is None:
        raise DtLensError("There is no sweep here; start the explorer with --sweep DIR.")
    terms = terms_in(results.options)
    table = edits_beside_controls(results)
    n = len(table)
    return html.Div(
        [
            html.H1("Sweep"),
            html.P(
                f"{n:,} edits and their controls, {terms.outcome_name} in {terms.place}; blocks: "
                f"{results.blocks_done}. Damage is how much worse the mean outcome is than the unedited model's over "
                f"the same {terms.units}{f', in {terms.scale}' if terms.scale else ''}."
            ),
            figure("sweep-damage", damage_figure(results), dark, "Click a point to see its matrix."),
            html.H2(f"The {min(SHOWN, n)} edits of largest damage"),
            row_table(
                ["matrix", "sv", "side", "becomes", "damage", "95 %", "controls' mean", "energy", "p", "q"],
                [_row(dict(row)) for row in table.head(SHOWN).to_dict("records")],
                numbers=(1, 4, 5, 6, 7, 8, 9),
            ),
            note(
                "An edit that costs much while controls of equal energy cost nothing is about its direction. One that "
                "costs as much as its controls is about the size of the change."
            ),
            html.H2("Atlas"),
            dcc.Loading(html.Div(id="atlas"), delay_show=300),
        ]
    )


def _row(row: dict[Any, Any]) -> list[Any]:
    form = ",.3f" if abs(row["scale"]) < 100 else ",.0f"
    return [
        link(short(str(row["matrix"])), "/matrix", matrix=row["matrix"], sv=row["first"]),
        row["svs"],
        row["side"],
        row["value"],
        number(row["damage"], form),
        f"{number(row['low'], form)} to {number(row['high'], form)}",
        number(row["controls"], form),
        number(row["energy"], ".3g"),
        p_text(row["p_value"]),
        p_text(row["q_value"]),
    ]


def edits_beside_controls(results: Any) -> pd.DataFrame:
    """A row per edit, the most damaging first: ``damage``, its interval, and ``controls``, their mean damage."""
    table: pd.DataFrame = results.table()
    sign = -terms_in(results.options).sign
    edits = table[table["kind"] == "edit"].copy()
    low, high = edits["difference_low"], edits["difference_high"]
    edits["damage"] = sign * edits["difference"]
    edits["low"], edits["high"] = (low, high) if sign > 0 else (-high, -low)
    own = table[table["kind"] == "control"].groupby("of")["difference"].mean() * sign
    edits["controls"] = own.reindex(edits.index).to_numpy()
    edits["svs"] = edits["svs"] if "svs" in edits else edits["sv"].astype(str)
    edits["first"] = [int(str(text).split(",")[0].split("-")[0] or 0) for text in edits["svs"]]
    edits["scale"] = float(edits["damage"].abs().max()) if len(edits) else 0.0
    return edits.sort_values("damage", ascending=False, kind="stable")


def damage_figure(results: Any) -> go.Figure:
    """Damage against energy: edits beside controls of equal energy."""
    terms, table = terms_in(results.options), results.table()
    title = "Damage and energy"
    measured = table[table["difference"].notna()]
    if measured.empty:
        return empty(title, "Nothing is measured yet.")
    made = go.Figure()
    kinds = (("control", CONTROL, "control", "x-thin"), ("edit", EDIT, "edit", "circle"))
    for kind, colour, name, symbol in kinds:
        rows = measured[measured["kind"] == kind]
        if rows.empty:
            continue
        made.add_scatter(
            x=rows["energy"],
            y=-terms.sign * rows["difference"],
            mode="markers",
            name=name,
            marker={
                "color": colour,
                "size": 7,
                "symbol": symbol,
                "opacity": 0.8,
                "line": {"color": colour, "width": 1.4},
            },
            customdata=[
                [str(m), -1 if pd.isna(sv) else int(sv), plain(f"{m}, sv {'' if pd.isna(sv) else int(sv)} {v}")]
                for m, sv, v in zip(rows["matrix"], rows["sv"], rows["value"], strict=True)
            ],
            hovertemplate="%{customdata[2]}<br>energy %{x:.3g}<br>damage %{y:.4g}<extra>" + name + "</extra>",
        )
    made.update_xaxes(title_text="energy: Frobenius norm of the change", rangemode="tozero")
    made.update_yaxes(title_text=f"damage, {plain(terms.outcome_name)}{plain(terms.in_scale)}", zeroline=True)
    edits = measured[measured["kind"] == "edit"]
    hurts = int(((edits["q_value"] < ALPHA) & (-terms.sign * edits["difference"] > 0)).sum())
    return finish(
        made,
        title,
        f"{len(edits)} edits, {len(measured) - len(edits)} controls · {hurts} edits hurt with q < {ALPHA:g}",
        height=440,
    )


def atlas_words(explored: Explored) -> list[str]:
    """What the atlas of the sweep says, or why there is none."""
    from dt_lens.study.atlas.sentences import sentences

    try:
        return [sentence.replace("**", "") for sentence in sentences(explored.atlas())]
    except DtLensError as error:
        return [f"There is no atlas of this sweep: {error}"]


def atlas_view(explored: Explored, dark: bool) -> list[Any]:
    """The atlas of the sweep: what it says, how many directions matter in each matrix, and each along its spectrum."""
    from dt_lens.study.atlas import figures

    words = [html.P(said(sentence)) for sentence in atlas_words(explored)]
    try:
        found = explored.atlas()
    except DtLensError:
        return words  # which say why
    unedited, done = found.baseline.mean, found.words[2]
    along = figures.along_the_spectrum(found.directions, unedited, found.terms, title="Along the spectrum", done=done)
    numbers = ["directions", "hurts", "large", "worst_damage"]
    form = ",.3f" if float(found.shares["worst_damage"].abs().max()) < 100 else ",.0f"
    rows = [
        [short(str(row["what"])), *(number(row[name], form if name == "worst_damage" else ",.0f") for name in numbers)]
        for row in found.shares.to_dict("records")
    ]
    headings = ["matrices", "directions", "hurt (q < 0.05)", "and large", "largest damage"]
    return [
        *words,
        figure("atlas-spectrum", along, dark),
        html.H3("How many directions matter"),
        row_table(headings, rows, numbers=(1, 2, 3, 4)),
        note(f"Large is a damage of {found.large:,.3g}{found.terms.in_scale} or more."),
    ]


def register(app: Dash, explored: Explored) -> None:
    """The callbacks."""

    def clicked(data: Any) -> Any:
        try:
            matrix, sv, _ = data["points"][0]["customdata"]
            explored.matrix(str(matrix))
        except (TypeError, KeyError, IndexError, ValueError, DtLensError):
            return no_update, no_update
        return "/matrix", "?" + urlencode({"matrix": matrix, **({"sv": sv} if int(sv) >= 0 else {})})

    app.callback(
        Output("url", "pathname", allow_duplicate=True),
        Output("url", "search", allow_duplicate=True),
        Input("sweep-damage", "clickData"),
        prevent_initial_call=True,
    )(clicked)
    app.callback(Output("atlas", "children"), Input("atlas", "id"), State("dark", "data"))(
        lambda _, dark: atlas_view(explored, bool(dark))
    )
