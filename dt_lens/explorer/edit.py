"""Edits of a tab: made from a form, shown with their energies and controls, and as code and a file to keep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dash import ALL, Dash, Input, Output, State, ctx, dcc, html, no_update

from dt_lens.edits.singular import SingularEdit
from dt_lens.edits.written import written_sv
from dt_lens.errors import DtLensError
from dt_lens.explorer.explored import Explored
from dt_lens.explorer.held_edits import make_edits
from dt_lens.explorer.parts import link, named, note, number, row_table, short

__all__ = ["code_of", "edit", "edits_panel", "records_of", "register", "value_of"]

VALUES = {
    "zero": "zero: remove it",
    "constant": "constant: every entry 1/d (the seed's)",
    "flip": "flip: its negative",
    "random": "random: a random unit vector",
    "dose": "dose: multiply sigma by …",
    "replace": "replace by a label's direction",
    "towards": "turn towards a label's direction",
}
MOST = 20  # edits of a tab


def edit(explored: Explored, query: dict[str, str], dark: bool) -> Any:
    """The page.

    Raises:
        DtLensError: for a matrix that does not exist.
    """
    name = query.get("matrix")
    m = explored.matrix(name) if name else explored.matrices[0]
    side = query.get("side")
    sides = _sides(explored, m.name)
    side = side if side in sides else next(iter(explored.sides(m.name)))
    return html.Div(
        [
            html.H1("Edits"),
            html.P(
                "An edit replaces a singular vector of a matrix. The edits of this tab are run together, beside the "
                "unedited model, in a process of their own: the model of this page stays as it is."
            ),
            html.Div(
                [
                    _labelled(
                        "matrix",
                        dcc.Dropdown(
                            named({one.name: one.name for one in explored.matrices}),
                            m.name,
                            id="edit-matrix",
                            clearable=False,
                        ),
                    ),
                    _labelled(
                        "directions",
                        dcc.Input(query.get("sv", "0"), id="edit-sv", type="text", placeholder="0, 0-3 or 0,2"),
                    ),
                    _labelled("side", dcc.Dropdown(sides, side, id="edit-side", clearable=False)),
                    _labelled("becomes", dcc.Dropdown(named(VALUES), "zero", id="edit-value", clearable=False)),
                    html.Div(
                        _labelled("number", dcc.Input(0.5, id="edit-number", type="number", step="any")),
                        id="edit-number-box",
                    ),
                    html.Div(
                        [
                            _labelled(
                                "embedding",
                                dcc.Dropdown(
                                    list(explored.model.embeddings),
                                    next(iter(explored.model.embeddings)),
                                    id="edit-embedding",
                                    clearable=False,
                                ),
                            ),
                            _labelled("label", dcc.Input("", id="edit-label", type="text", placeholder="label or row")),
                        ],
                        id="edit-label-box",
                        className="controls",
                    ),
                    html.Button("Add edit", id="edit-add", className="primary"),
                ],
                className="controls form",
            ),
            html.Div(id="edit-said", role="status"),
            html.Div(id="edits-panel"),
        ]
    )


def _labelled(label: str, control: Any) -> html.Div:
    return html.Div([html.Label(label, htmlFor=control.id), control], className=f"choice of-{control.id}")


def _sides(explored: Explored, name: str) -> list[str]:
    m = explored.matrix(name)
    own: list[str] = list(explored.sides(name))
    return own + [one for one in (m.left, m.right) if one not in own]


def value_of(kind: Any, amount: Any, embedding: Any, label: Any) -> Any:
    """What a form says the vector becomes, as ``SingularEdit`` takes it.

    Raises:
        DtLensError: for a form that is not filled in.
    """
    if kind in ("zero", "constant", "flip", "random"):
        return kind
    if kind in ("dose", "towards") and not isinstance(amount, int | float):
        raise DtLensError("Give a number: what sigma is multiplied by, or the degrees of a turn.")
    if kind == "dose":
        return float(amount)
    if kind in ("replace", "towards"):
        name: Any = str(label or "").strip()
        if not name:
            raise DtLensError("Give the label whose direction is meant, or the number of its row.")
        # As text a row's number is known from a label.
        return f"replace:{embedding}:{name}" if kind == "replace" else f"towards:{embedding}:{name}:{amount:g}"
    raise DtLensError("Choose what the singular vector becomes.")


def records_of(edits: Sequence[SingularEdit]) -> str:
    """Edits as the JSON that ``load_edits`` and ``--edits-from`` read."""
    return json.dumps([one.to_dict() for one in edits], indent=1) + "\n"


def code_of(edits: Sequence[Any]) -> str:
    """The lines that make edits in Python: one each."""
    return "\n".join(_line(one) for one in edits)


def _line(one: Any) -> str:
    record = one.to_dict()
    sv = record["sv"][0] if len(record["sv"]) == 1 else record["sv"]
    more = f", seed={record['seed']}" if record["value"] == "random" else ""
    more += "" if record["fold_layernorm"] else ", fold_layernorm=False"
    value = json.dumps(record["value"], ensure_ascii=False)
    return f'SingularEdit(model, "{record["matrix"]}", sv={sv}, side="{record["side"]}", value={value}{more})'


def edits_panel(explored: Explored, written: Any) -> Any:
    """The edits of a tab: energies, notes, controls, code, and where they can be run."""
    try:
        edits = make_edits(explored.model, written or [], explored.svd.fold_layernorm)
    except DtLensError as error:
        return html.Div([note(str(error), "warning"), html.Button("Remove all", id={"remove": "all"})])
    if not edits:
        return note("There is no edit yet. Add one above, or click a direction on the page of a matrix.")
    rows, notes = [], []
    for at, one in enumerate(edits):
        control = one.control(0)
        rows.append(
            [
                link(short(one.matrix.name), "/matrix", matrix=one.matrix.name, sv=one.sv[0]),
                written_sv(one.sv),
                one.side,
                _words(one.to_dict()["value"]),
                number(one.energy, ".4g"),
                number(one.effective_energy, ".4g"),
                number(control.energy, ".4g"),
                html.Button("remove", id={"remove": at}, className="plain"),
            ]
        )
        if one.note:
            notes.append(note(one.note, "warning"))
    code = code_of(edits)
    return html.Div(
        [
            html.H2("The edits of this tab"),
            row_table(
                ["matrix", "sv", "side", "becomes", "energy", "behind norms", "control", ""], rows, numbers=(1, 4, 5, 6)
            ),
            html.P(
                "Energy: the Frobenius norm of the change of the weight; behind norms: the part of it that the norms "
                "around the matrix let through. Control: a random change of the same energy at the same place.",
                className="small",
            ),
            *notes,
            html.Div(
                [
                    link("Run them live", "/live"),
                    *([] if explored.is_agent else [link("Read a text with them", "/text")]),
                    html.Button("Save as edit.json", id="edit-save"),
                    html.Button("Remove all", id={"remove": "all"}, className="plain"),
                ],
                className="actions",
            ),
            html.H3("In Python"),
            html.Div(
                [html.Pre(code, id="edit-code"), dcc.Clipboard(target_id="edit-code", title="copy", className="copy")],
                className="code",
            ),
        ]
    )


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        name, label = value.get("replace") or value["towards"]
        turn = f" by {value['angle']:g}°" if "angle" in value else ""
        return f"{'turned towards' if turn else 'replaced by'} {name}: {label}{turn}"
    return f"sigma × {value:g}" if isinstance(value, float) else str(value)


def register(app: Dash, explored: Explored) -> None:
    """The callbacks."""

    def sides(name: Any, now: Any) -> Any:
        try:
            known = _sides(explored, str(name))
        except DtLensError:
            return no_update, no_update
        return known, now if now in known else known[0]

    def boxes(kind: Any) -> Any:
        def shown(yes: bool) -> dict[str, str]:
            return {} if yes else {"display": "none"}

        return shown(kind in ("dose", "towards")), shown(kind in ("replace", "towards"))

    def changed(
        added: Any,
        removed: Any,
        name: Any,
        sv: Any,
        side: Any,
        kind: Any,
        amount: Any,
        embedding: Any,
        label: Any,
        held: Any,
    ) -> Any:
        held = held if isinstance(held, list) else []
        pressed = ctx.triggered_id
        if isinstance(pressed, dict):
            if not any(removed or []):  # a button that has just been drawn
                return no_update, no_update
            at = pressed.get("remove")
            return ([] if at == "all" else [one for i, one in enumerate(held) if i != at]), ""
        if not added:
            return no_update, no_update
        try:
            if len(held) >= MOST:
                raise DtLensError(f"There are {MOST} edits already; remove one first.")
            value = value_of(kind, amount, embedding, label)
            one = {"matrix": name, "sv": str(sv or "").strip() or "0", "side": side, "value": value, "seed": 0}
            made = make_edits(explored.model, [*held, one], explored.svd.fold_layernorm)
            for other in made[:-1]:
                if other._counted == made[-1]._counted and set(other.sv) & set(made[-1].sv):
                    raise DtLensError(f"Direction {min(set(other.sv) & set(made[-1].sv))} of {name} is edited already.")
        except DtLensError as error:
            return no_update, note(str(error), "warning")
        return [*held, one], ""

    def saved(pressed: Any, held: Any) -> Any:
        if not pressed:
            return no_update
        try:
            edits = make_edits(explored.model, held or [], explored.svd.fold_layernorm)
        except DtLensError:
            return no_update
        return {"content": records_of(edits), "filename": "edit.json", "type": "application/json"}

    app.callback(
        Output("edit-side", "options"),
        Output("edit-side", "value"),
        Input("edit-matrix", "value"),
        State("edit-side", "value"),
        prevent_initial_call=True,
    )(sides)
    app.callback(Output("edit-number-box", "style"), Output("edit-label-box", "style"), Input("edit-value", "value"))(
        boxes
    )
    app.callback(
        Output("edits", "data"),
        Output("edit-said", "children"),
        Input("edit-add", "n_clicks"),
        Input({"remove": ALL}, "n_clicks"),
        State("edit-matrix", "value"),
        State("edit-sv", "value"),
        State("edit-side", "value"),
        State("edit-value", "value"),
        State("edit-number", "value"),
        State("edit-embedding", "value"),
        State("edit-label", "value"),
        State("edits", "data"),
        prevent_initial_call=True,
    )(changed)
    # Its own id is an input, so that the panel is also filled when the page is drawn.
    app.callback(Output("edits-panel", "children"), Input("edits", "data"), Input("edits-panel", "id"))(
        lambda held, _: edits_panel(explored, held)
    )
    app.callback(
        Output("download", "data"), Input("edit-save", "n_clicks"), State("edits", "data"), prevent_initial_call=True
    )(saved)
