"""The app: one page whose content follows the address, so that every view can be linked to and tabs know nothing of
one another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dash import ClientsideFunction, Dash, Input, Output, dcc, html, no_update

from dt_lens.errors import DtLensError
from dt_lens.explorer import edit, live, matrix, overview, sweep
from dt_lens.explorer.explored import Explored
from dt_lens.explorer.parts import note, query_of

__all__ = ["make_app", "page_of"]

_INDEX = """<!DOCTYPE html>
<html lang="en">
<head>
{%metas%}
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{%title%}</title>
<script>
(function () {
  var chosen = null;
  try { chosen = localStorage.getItem("dt-lens-theme"); } catch (e) {}
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
})();
</script>
{%css%}
</head>
<body>
{%app_entry%}
<footer>{%config%}{%scripts%}{%renderer%}</footer>
</body>
</html>"""

View = Callable[[Explored, dict[str, str], bool], Any]


def views_of(explored: Explored) -> dict[str, tuple[str, View]]:
    """The pages: by path the words of the menu, and what makes them."""
    found: dict[str, tuple[str, View]] = {
        "/": ("Overview", overview.overview),
        "/matrix": ("Matrix", matrix.matrix),
        "/edit": ("Edit", edit.edit),
        "/live": ("Live", live.live),
    }
    if not explored.is_agent:
        found["/text"] = ("Text", live.text)
    if explored.sweep is not None:
        found["/sweep"] = ("Sweep", sweep.sweep)
    return found


def page_of(explored: Explored, path: Any, search: Any, dark: Any) -> Any:
    """The content of an address; an address that leads nowhere gives a sentence."""
    views = views_of(explored)
    if not isinstance(path, str) or path not in views:
        return note(f"There is no page {str(path)[:60]!r} here; choose one above.", "warning")
    try:
        return views[path][1](explored, query_of(search), bool(dark))
    except DtLensError as error:
        return note(str(error), "warning")


def make_app(explored: Explored, flask: Any) -> Dash:
    """The Dash app on a Flask app, which must be guarded already."""
    app = Dash(
        "dt_lens.explorer",
        server=flask,
        assets_folder=str(Path(__file__).parent / "assets"),
        serve_locally=True,
        suppress_callback_exceptions=True,
        enable_mcp=False,  # a second way in
        title=f"{explored.source} · dt-lens",
        update_title="",
        index_string=_INDEX,
        meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
    )
    views = views_of(explored)
    app.layout = html.Div(
        [
            dcc.Location(id="url", refresh=False),
            dcc.Store(id="edits", storage_type="session"),  # of the tab alone
            dcc.Store(id="dark"),
            dcc.Download(id="download"),
            html.Header(
                [
                    html.Strong(["dt-lens ", html.Span(explored.source)]),
                    html.Nav(
                        [dcc.Link(words, href=path, id={"menu": path}) for path, (words, _) in views.items()],
                        id="menu",
                    ),
                    html.Button("◐", id="theme", title="light or dark", className="plain"),
                ],
                className="top",
            ),
            html.Main(id="page"),
        ]
    )

    def page(path: Any, search: Any, dark: Any) -> Any:
        return no_update if dark is None else page_of(explored, path, search, dark)

    app.callback(Output("page", "children"), Input("url", "pathname"), Input("url", "search"), Input("dark", "data"))(
        page
    )
    register: Any = app.clientside_callback  # has no types
    register(ClientsideFunction("explorer", "theme"), Output("dark", "data"), Input("theme", "n_clicks"))
    register(ClientsideFunction("explorer", "menu"), Output("menu", "title"), Input("url", "pathname"))
    for one in (overview, matrix, edit, live, sweep):
        one.register(app, explored)
    return app
