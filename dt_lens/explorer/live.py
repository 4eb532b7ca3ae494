"""The pages of runs: an agent that plays, and a model that reads. The page's script draws what its process sends."""

from __future__ import annotations

from typing import Any

from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html

from dt_lens.explorer.explored import Explored
from dt_lens.explorer.parts import link, note, said

__all__ = ["live", "register", "text"]

PROMPT = "Once upon a time"


def live(explored: Explored, query: dict[str, str], dark: bool) -> Any:
    """The page of live runs."""
    agent = explored.is_agent
    unit = "episodes" if agent else "windows"
    facts = getattr(explored.model, "facts", None)
    targets = list(getattr(facts, "target_returns", None) or []) if agent else []
    controls = [
        _field(unit, dcc.Input(24, id="live-units", type="number", min=2, max=1000, step=1)),
        _field("first seed", dcc.Input(0, id="live-seed", type="number", min=0, step=1)) if agent else None,
        _field("target return", dcc.Input(targets[0] if targets else None, id="live-target", type="number", step="any"))
        if agent
        else None,
        _field("steps of an episode, at most", _steps()) if agent else None,
        dcc.Checklist(
            [
                {"label": "also run a control of equal energy", "value": "control"},
                *([{"label": "slowly enough to watch", "value": "slow"}] if agent else []),
            ],
            ["control", *(["slow"] if agent and explored.model.cfg.discrete_actions else [])],
            id="live-more",
            className="choices",
        ),
        html.Button("Start", id="live-start", className="primary"),
        html.Button("Stop", id="live-stop", disabled=True),
    ]
    return html.Div(
        [
            html.H1("Live"),
            html.P(
                f"The edits of this tab, beside the unedited model, over the same {unit}: differences are paired. "
                "A control is a random change of equal energy at the same place; an edit that does no more than its "
                "control has shown nothing about its direction."
            ),
            html.Div(id="live-edits"),
            html.Div([one for one in controls if one is not None], className="controls form"),
            *([] if agent else [_unused(name) for name in ("live-seed", "live-target", "live-steps")]),
            html.P("", id="live-said", role="status"),
            html.Div(id="live-scenes", className="scenes"),
            html.Div(
                [
                    html.Figure([html.Figcaption(html.H3("Outcomes")), html.Div(id="live-outcomes", className="draw")]),
                    html.Figure(
                        [html.Figcaption(html.H3("Paired differences")), html.Div(id="live-interval", className="draw")]
                    ),
                ],
                className="pair",
            ),
            html.Div(id="live-table"),
            html.P(
                said(
                    "Intervals: 95 %, studentised bootstrap of the paired differences, as `edited.compare(unedited)` "
                    "gives them. Watching an interval until it leaves zero and stopping there finds effects that are "
                    f"none: decide beforehand how many {unit} to run."
                ),
                className="small",
            ),
        ],
        id="live-page",
    )


def text(explored: Explored, query: dict[str, str], dark: bool) -> Any:
    """The page of reading; for language models."""
    if explored.is_agent:
        return html.Div([html.H1("Text"), note("This model acts in an environment and reads no text; see `Live`.")])
    return html.Div(
        [
            html.H1("Text"),
            html.P("What the model predicts and writes with the edits of this tab, beside what it does without them."),
            html.Div(id="live-edits"),
            html.Div(
                [
                    _field("prompt", dcc.Textarea(id="text-prompt", value=PROMPT, rows=2)),
                    _field("tokens to add", dcc.Input(40, id="text-tokens", type="number", min=1, max=200, step=1)),
                    _field(
                        "a text of yours, for its loss",
                        dcc.Textarea(id="text-own", value="", rows=4, placeholder="at least two tokens; may be empty"),
                    ),
                    html.Div(
                        [
                            html.Button("Read", id="text-start", className="primary"),
                            html.Button("Stop", id="live-stop", disabled=True),
                        ],
                        className="actions",
                    ),
                ],
                className="form stacked",
            ),
            html.P("", id="live-said", role="status"),
            html.Div(id="text-next"),
            html.Div(id="text-continued", className="pair"),
            html.Div(id="text-losses"),
            html.Div(id="text-coloured"),
        ],
        id="text-page",
    )


def _field(label: str, control: Any) -> html.Div:
    return html.Div([html.Label(label, htmlFor=control.id), control], className=f"choice of-{control.id}")


def _steps() -> dcc.Input:
    """Not bounded by the browser, which would send an empty field in place of a wrong number: the run says it."""
    return dcc.Input(id="live-steps", type="text", inputMode="numeric", placeholder="all", autoComplete="off")


def _unused(name: str) -> html.Div:
    """A field that this kind of model has no use for, so that the script finds it."""
    return html.Div(dcc.Input(id=name, type="hidden"), style={"display": "none"})


def edits_line(explored: Explored, held: Any) -> Any:
    """What edits a run will have, in a line."""
    from dt_lens.errors import DtLensError
    from dt_lens.explorer.edit import code_of
    from dt_lens.explorer.held_edits import make_edits

    try:
        edits = make_edits(explored.model, held or [], explored.svd.fold_layernorm)
    except DtLensError as error:
        return note(str(error), "warning")
    if not edits:
        return html.Div(["This tab has no edit. ", link("Add one", "/edit"), " first."], className="note warning")
    return html.Div([html.Pre(code_of(edits)), link("Change them", "/edit")], className="code")


def register(app: Dash, explored: Explored) -> None:
    """The callbacks; those of the runs are the page's script's own."""
    script: Any = app.clientside_callback  # has no types
    app.callback(Output("live-edits", "children"), Input("edits", "data"), Input("live-edits", "id"))(
        lambda held, _: edits_line(explored, held)
    )
    script(
        ClientsideFunction("explorer", "play"),
        Output("live-start", "title"),
        Input("live-start", "n_clicks"),
        State("edits", "data"),
        State("live-units", "value"),
        State("live-seed", "value"),
        State("live-target", "value"),
        State("live-steps", "value"),
        State("live-more", "value"),
        prevent_initial_call=True,
    )
    script(
        ClientsideFunction("explorer", "read"),
        Output("text-start", "title"),
        Input("text-start", "n_clicks"),
        State("edits", "data"),
        State("text-prompt", "value"),
        State("text-tokens", "value"),
        State("text-own", "value"),
        prevent_initial_call=True,
    )
