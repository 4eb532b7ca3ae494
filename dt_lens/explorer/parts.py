"""Parts of the explorer's pages: figures, tables, notes and links, in the look of the reports."""

from __future__ import annotations

import copy
import html as text
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode

from dash import dcc, html

from dt_lens.report.style import dark as dark_template
from dt_lens.report.style import light as light_template

__all__ = ["figure", "link", "note", "number", "p_text", "query_of", "row_table", "said", "short"]

_CONFIG: Any = {"displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d"], "responsive": True}


def figure(name: str, made: Any, dark: bool, caption: str = "") -> html.Figure:
    """A plotly figure under an id; its title and subtitle become text, which can wrap.

    Args:
        name: the id of the ``dcc.Graph``.
        made: the figure, with the hints of ``dt_lens.report.style.finish``.
        dark: whether the page is dark.
        caption: below the title.
    """
    made = copy.deepcopy(made)
    title, least = made.layout.title.text or "", (made.layout.meta or {}).get("least_width", 0)
    about = made.layout.title.subtitle.text or ""
    height = int(made.layout.height or 450) - 30
    top = made.layout.margin.t if made.layout.margin.t is not None else 70
    made.update_layout(title=None, height=height, margin_t=max(20, top - 30), autosize=True)
    made.update_layout(template=dark_template() if dark else light_template())
    words = [_unmarked(part) for part in (title, about, caption) if part]
    return html.Figure(
        [
            html.Figcaption([html.H3(words[0]), *(html.P(word) for word in words[1:])]) if words else None,
            html.Div(
                dcc.Graph(id=name, figure=made, config=_CONFIG, style={"height": height, "minWidth": least}),
                className="canvas",
            ),
        ]
    )


def _unmarked(words: str) -> str:
    return text.unescape(re.sub(r"<[^>]*>", " ", words)).strip()


def said(words: str) -> list[Any]:
    """A sentence with `` `code` `` in it."""
    parts = re.split(r"`([^`\n]+)`", words)
    return [html.Code(part) if number % 2 else part for number, part in enumerate(parts)]


def note(words: str, kind: str = "note") -> html.Div:
    """A paragraph set apart; ``kind`` is ``"note"`` or ``"warning"``."""
    return html.Div(said(words), className=f"note {kind}")


def link(words: Any, path: str, **query: Any) -> dcc.Link:
    """A link to another page of the explorer; ``None`` is left out of its query."""
    kept = {name: value for name, value in query.items() if value is not None}
    return dcc.Link(words, href=path + (f"?{urlencode(kept)}" if kept else ""))


def query_of(search: Any) -> dict[str, str]:
    """The query of an address; of a name that is given twice the last value."""
    return dict(parse_qsl((search if isinstance(search, str) else "").removeprefix("?")))


def row_table(headings: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[int] = ()) -> html.Div:
    """A table that scrolls inside its box; the columns whose numbers are in ``numbers`` are aligned right."""

    def kind(column: int) -> str:
        return "number" if column in numbers else ""

    head = html.Tr([html.Th(word, className=kind(i)) for i, word in enumerate(headings)])
    body = [html.Tr([html.Td(cell, className=kind(i)) for i, cell in enumerate(row)]) for row in rows]
    return html.Div(html.Table([html.Thead(head), html.Tbody(body)]), className="scroll", tabIndex=0)


def number(value: Any, form: str = ".3f") -> str:
    """A number as text, with a real minus sign; a dash for none."""
    if value is None or value != value:
        return "–"
    return format(value, form).replace("-", "−")


def p_text(value: Any) -> str:
    """A p or q value as text."""
    if value is None or value != value:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def short(matrix: str) -> str:
    """A matrix's name without the words that all names share.

    >>> short("blocks.0.mlp.W_in"), short("blocks.11.attn.OV.3 · read"), short("predict.action")
    ('0 W_in', '11 OV.3 · read', 'predict.action')
    """
    return re.sub(r"^blocks\.(\d+)\.(?:attn|mlp)\.", r"\1 ", matrix)


def named(values: Mapping[str, str]) -> list[dict[str, str]]:
    """Options of a list to choose from: labels by value."""
    return [{"label": label, "value": value} for value, label in values.items()]
