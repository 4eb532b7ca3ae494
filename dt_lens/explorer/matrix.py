"""One matrix: its spectrum, how its directions match an embedding beside the null, and one direction in detail."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import plotly.graph_objects as go
from dash import Dash, Input, Output, State, dcc, html, no_update

from dt_lens.errors import DtLensError
from dt_lens.explorer.explored import ALPHA, Explored, readable
from dt_lens.explorer.parts import figure, link, named, note, number, p_text, row_table, said, short
from dt_lens.lens.matrices import SideName
from dt_lens.report.heatmaps import scan_heatmap
from dt_lens.report.spectra import spectrum
from dt_lens.report.style import BASELINE, PALETTE, finish, plain
from dt_lens.svd.pairings import is_natural

__all__ = ["direction_panel", "heatmap", "matches", "matrix", "poles_rows", "register"]

SHOWN = 24  # directions of the heatmap
LABELS = 28  # labels of the heatmap


def matrix(explored: Explored, query: dict[str, str], dark: bool) -> Any:
    """The page.

    Raises:
        DtLensError: for a matrix, a side or an embedding that does not exist.
    """
    name, side, embedding = explored.place(query.get("matrix"), query.get("side"), query.get("embedding"))
    found = explored.svd[name]
    rows = explored.rows(name, side, embedding)
    best = int(rows["sv"].iloc[rows["cosine"].abs().argmax()]) if len(rows) else 0
    sv = _index(query.get("sv"), len(found.sigma), best)
    m = explored.matrix(name)
    return html.Div(
        [
            html.H1(name),
            html.Div(
                [
                    _choice("matrix", "matrix", named({one.name: one.name for one in explored.matrices}), name),
                    _choice("side", "side", named({one: one for one in explored.sides(name)}), side),
                    _choice(
                        "embedding",
                        "embedding",
                        named({e: _title(explored, e, side) for e in explored.model.embeddings}),
                        embedding,
                    ),
                ],
                className="controls",
            ),
            html.P(_about(explored, name, side)),
            html.Div(
                [
                    figure("matches", matches(explored, name, side, embedding), dark),
                    figure(
                        "spectrum",
                        spectrum({name: found.sigma.cpu().numpy()}, scale="log", title="Spectrum")
                        .update_layout(showlegend=False, height=400)
                        .update_layout(title={"subtitle": {"text": f"{m.left} → {m.right}, largest σ first"}}),
                        dark,
                    ),
                ],
                className="pair",
            ),
            dcc.Loading(html.P("…", id="whole"), delay_show=300),
            figure(
                "heatmap",
                heatmap(explored, name, side, embedding),
                dark,
                f"The first {min(SHOWN, len(found.sigma))} directions. Click a cell to see its direction below.",
            ),
            html.Div(
                [
                    html.Label(
                        ["direction (sv) ", dcc.Input(sv, id="sv", type="number", min=0, step=1, debounce=True)]
                    ),
                ],
                className="controls",
            ),
            dcc.Loading(html.Div(id="direction"), delay_show=500),
        ]
    )


def _choice(name: str, label: str, options: Any, value: str) -> html.Div:
    chosen = dcc.Dropdown(options, value, id=f"choose-{name}", clearable=False, maxHeight=320)
    return html.Div([html.Label(label, htmlFor=f"choose-{name}"), chosen], className=f"choice of-{name}")


def _title(explored: Explored, embedding: str, side: SideName) -> str:
    one = explored.model.embeddings[embedding]
    usual = "" if is_natural(one, side) else " (not compared by default)"
    return f"{embedding}{'' if one.trained else ' (untrained)'}{usual}"


def _about(explored: Explored, name: str, side: SideName) -> list[Any]:
    m, found = explored.matrix(name), explored.svd[name]
    folded = explored.svd.fold_layernorm and m.norm(m.side(side)) is not None
    tied = sum(stop - start > 1 for start, stop in found.blocks)
    words = (
        f"The {side} side faces the residual stream. {len(found.sigma)} directions"
        f"{', of the matrix with its LayerNorm folded in' if folded else ''}"
        f"{f'; {tied} groups of them have sigmas too close to tell apart' if tied else ''}."
    )
    return said(words)


def _index(given: Any, count: int, default: int = 0) -> int:
    """A direction's number from text; the default for what is none."""
    try:
        sv = int(given)
    except (TypeError, ValueError, OverflowError):
        return default
    return sv if 0 <= sv < count else default


def matches(explored: Explored, name: str, side: SideName, embedding: str) -> go.Figure:
    """The best match of every direction with an embedding, and the line above which one of them would be p < 0.05."""
    rows = explored.rows(name, side, embedding)
    line = explored.threshold(name, side, embedding)
    trained = explored.model.embeddings[embedding].trained
    real = (rows["q_value"] < ALPHA).to_numpy()
    colour = PALETTE[0] if trained else BASELINE
    made = go.Figure(
        go.Scatter(
            x=rows["sv"],
            y=rows["cosine"].abs(),
            mode="markers",
            marker={
                "color": [colour if one else "rgba(0,0,0,0)" for one in real],
                "line": {"color": colour, "width": 1.4},
                "size": 8,
            },
            customdata=[
                f"sv {sv}: {plain(label)}, cosine {cosine:+.3f}<br>p {p_text(p)}, q {p_text(q)}"
                for sv, label, cosine, p, q in zip(
                    rows["sv"],
                    readable(list(rows["label"])),
                    rows["cosine"],
                    rows["p_value"],
                    rows["q_value"],
                    strict=True,
                )
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    made.add_hline(
        line,
        line={"color": BASELINE, "width": 1.5, "dash": "dash"},
        annotation={"text": f"p = {ALPHA:g} for one direction", "font": {"size": 11}, "yanchor": "bottom"},
        annotation_position="top right",
    )
    top = max(line * 1.25, float(rows["cosine"].abs().max()) * 1.1 if len(rows) else 0.0, 0.1)
    made.update_xaxes(title_text="direction (sv), largest σ first", rangemode="tozero")
    made.update_yaxes(title_text=f"best |cosine| with {plain(embedding)}", range=[0, min(1.02, top)])
    over = "the scan" if explored.is_scanned(name, side, embedding) else "this pairing alone"
    return finish(
        made,
        f"Directions and {embedding}",
        f"filled: q < {ALPHA:g} over {over} ({int(real.sum())} of {len(rows)})",
        height=400,
        wide=300,
    )


def heatmap(explored: Explored, name: str, side: SideName, embedding: str) -> go.Figure:
    """Directions and labels; a dot marks the best match of a direction that counts.

    Of many labels those are shown that match a direction best, so that a dot stands at its own label.
    """
    k = min(SHOWN, len(explored.svd[name].sigma))
    rows = explored.rows(name, side, embedding).set_index("sv")["q_value"]
    q = rows.reindex(range(k)).to_frame("q")  # a block's later directions have no row of their own
    cosines = explored.svd.cosines(name, embedding, side, k)
    if cosines.shape[1] > LABELS:
        size = cosines.abs().to_numpy()
        best = dict.fromkeys([*size.argmax(axis=1).tolist(), *(-size.max(axis=0)).argsort(kind="stable").tolist()])
        cosines = cosines.iloc[:, sorted(list(best)[: max(LABELS, k)])]
    labels = readable([str(label) for label in cosines.columns])
    made = scan_heatmap(
        cosines.set_axis(labels, axis=1),
        q_values=q,
        sigma=explored.svd[name].sigma[:k].cpu().numpy(),
        embedding=embedding,
        alpha=ALPHA,
        trained=explored.model.embeddings[embedding].trained,
        title=f"Cosines with {embedding}",
    )
    cut = [plain(label if len(label) <= 26 else label[:25] + "…") for label in labels]
    made.update_xaxes(ticktext=cut)
    made.update_layout(meta={"least_width": 150 + 19 * len(labels)})
    return made


def poles_rows(explored: Explored, name: str, side: SideName, sv: int) -> list[list[Any]]:
    """Both poles of a direction for every embedding that its side is compared with, with p and q of the best match."""
    out = []
    compared = explored.table[(explored.table["matrix"] == name) & (explored.table["side"] == side)]
    for embedding in dict.fromkeys(compared["embedding"]):
        rows = compared[compared["embedding"] == embedding]
        before = rows[rows["sv"] <= sv]  # of a block the first direction's row is the block's
        row = before.loc[before["sv"].idxmax()] if len(before) else None
        poles = explored.poles(name, side, sv, embedding)

        def words(pole: str, poles: Any = poles) -> list[Any]:
            found = [(label, cosine) for sign, label, cosine in poles if sign == pole]
            spans = [html.Span([label, html.Small(number(c, "+.2f"))], className="label") for label, c in found]
            return spans or ["–"]

        trained = explored.model.embeddings[embedding].trained
        out.append(
            [
                embedding + ("" if trained else " (untrained)"),
                words("+"),
                words("-"),
                p_text(None if row is None else row["p_value"]),
                p_text(None if row is None else row["q_value"]),
            ]
        )
    return out


def direction_panel(explored: Explored, name: str, side: SideName, sv: int) -> Any:
    """One direction: its sigma, poles, and the directions of other matrices that are nearest to it."""
    found = explored.svd[name]
    start, stop = found.block_of(sv)
    others = explored.others(name, side, sv)
    warning = []
    if stop - start > 1:
        warning = [
            note(
                f"Directions {start} to {stop - 1} have sigmas too close to tell apart; only their span means "
                "anything.",
                "warning",
            )
        ]
    return html.Div(
        [
            html.H2(f"{name}, sv {sv}"),
            html.P(
                [
                    f"σ = {float(found.sigma[sv]):.4g}, {side} side. ",
                    link("Edit this direction", "/edit", matrix=name, side=side, sv=sv),
                ]
            ),
            *warning,
            row_table(["embedding", "towards", "away", "p", "q"], poles_rows(explored, name, side, sv), numbers=(3, 4)),
            html.P(
                "Both poles of the direction: a singular vector's sign is a convention, so neither is the right one. "
                "p and q are of the best match, under a random rotation.",
                className="small",
            ),
            html.H3("Which other matrices read or write it"),
            row_table(
                ["matrix", "does", "sv", "cosine", "p", "q"],
                [
                    [
                        link(short(row["matrix"]), "/matrix", matrix=row["matrix"], side=row["side"], sv=row["sv"]),
                        "writes it" if row["side"] == "write" else f"reads it{_as(row['side'])}",
                        row["sv"],
                        number(row["cosine"], "+.3f"),
                        p_text(row["p_value"]),
                        p_text(row["q_value"]),
                    ]
                    for row in others.to_dict("records")
                ],
                numbers=(2, 3, 4, 5),
            ),
            html.P(
                "Of each other side its nearest direction; q over all directions of all of them. Later blocks can read "
                "what this one writes, and earlier ones can have written what this one reads.",
                className="small",
            ),
        ]
    )


def _as(side: SideName) -> str:
    return "" if side == "read" else f" as {side}"


def register(app: Dash, explored: Explored) -> None:
    """The callbacks."""

    def chosen(name: Any, side: Any, embedding: Any, search: Any) -> Any:
        from dt_lens.explorer.parts import query_of

        now = query_of(search)
        try:
            if name not in {one.name for one in explored.matrices}:
                return no_update
            side = side if side in explored.sides(name) else None
            was = explored.place(now.get("matrix"), now.get("side"), now.get("embedding"))
            if side != was[1] and side is not None and name == was[0] and embedding == was[2]:
                embedding = None  # the side was changed, and with it what it is compared with
            elif embedding != was[2] and len(explored.sides(name)) > 1 and name == was[0]:
                side = None  # the other way round
            elif name != was[0]:
                side = None
            place = explored.place(name, side, embedding)
        except DtLensError:
            return no_update
        if place == was:
            return no_update
        return "?" + urlencode(dict(zip(("matrix", "side", "embedding"), place, strict=True)))

    def clicked(heat: Any, dots: Any, side: Any) -> Any:
        from dash import ctx

        try:
            point = (heat if ctx.triggered_id == "heatmap" else dots)["points"][0]
            return int(point["y"] if ctx.triggered_id == "heatmap" else point["x"])
        except (TypeError, KeyError, IndexError, ValueError):
            return no_update

    def panel(sv: Any, name: Any, side: Any) -> Any:
        try:
            m = explored.matrix(str(name))
            if side not in m.residual_sides:
                return no_update
            count = len(explored.svd[m.name].sigma)
            at = _index(sv, count, -1)
            if at < 0:
                return note(f"There is no direction {sv!s:.20} here; choose one from 0 to {count - 1}.", "warning")
            return direction_panel(explored, m.name, side, at)
        except DtLensError as error:
            return note(str(error), "warning")

    def whole(search: Any, path: Any) -> Any:
        from dt_lens.explorer.parts import query_of

        if path != "/matrix":
            return no_update
        now = query_of(search)
        try:
            return said(
                frame_words(explored, *explored.place(now.get("matrix"), now.get("side"), now.get("embedding")))
            )
        except DtLensError as error:
            return str(error)

    app.callback(
        Output("url", "search", allow_duplicate=True),
        Input("choose-matrix", "value"),
        Input("choose-side", "value"),
        Input("choose-embedding", "value"),
        State("url", "search"),
        prevent_initial_call=True,
    )(chosen)
    app.callback(
        Output("sv", "value"),
        Input("heatmap", "clickData"),
        Input("matches", "clickData"),
        State("choose-side", "value"),
        prevent_initial_call=True,
    )(clicked)
    app.callback(
        Output("direction", "children"),
        Input("sv", "value"),
        State("choose-matrix", "value"),
        State("choose-side", "value"),
    )(panel)
    app.callback(Output("whole", "children"), Input("whole", "id"), State("url", "search"), State("url", "pathname"))(
        lambda _, search, path: whole(search, path)
    )


def frame_words(explored: Explored, name: str, side: SideName, embedding: str) -> str:
    """What the best match of a whole matrix side is worth: "I looked at all of it, and saw 0.24"."""
    row = explored.frame(name, side, embedding)
    cosine, median = abs(float(row["cosine"])), float(row["null_median"])
    label = readable([str(row["label"])])[0]
    return (
        f"The best match of all directions with all labels is {cosine:.3f} (sv {row['sv']} and `{label}`). In a random "
        f"rotation of the whole matrix the best match has a median of {median:.3f}, and is as good with p "
        f"{'' if row['p_value'] < 0.001 else '= '}{p_text(float(row['p_value']))}."
    )
