"""The look of every figure: a light and a dark template, and colours that colour-blind readers can distinguish."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from dt_lens.errors import DtLensError, nearest

__all__ = [
    "BASELINE",
    "CONTROL",
    "EDIT",
    "PALETTE",
    "columns_of",
    "dark",
    "empty",
    "finish",
    "kind_of",
    "light",
    "natural",
    "plain",
    "signed",
]

# Okabe and Ito's palette (2008) without black and yellow, which vanish on a dark or a light page, and with two more
# colours at the end. The contrast with both backgrounds below is about 3 : 1 or more.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#A6761D", "#8C6BD1")
BASELINE = "#808890"
EDIT = "#D55E00"
CONTROL = "#0072B2"

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Noto Sans", "DejaVu Sans", sans-serif'

# As in Crameri's "vik" and Moreland's cool-warm: from blue to orange-red through the colour of the page.
_DIVERGING_LIGHT = ["#053f6b", "#0072B2", "#8fc3e0", "#f7f7f5", "#f3b58c", "#D55E00", "#7d2f00"]
_DIVERGING_DARK = ["#9ad4f5", "#3a9bd6", "#1c4a6b", "#1d2127", "#6b3519", "#e0702a", "#ffc29a"]
_SEQUENTIAL_LIGHT = ["#f7f7f5", "#d9e9f3", "#b7d6ea", "#8fc0e0", "#0b63a0"]
_SEQUENTIAL_DARK = ["#1d2127", "#1c3347", "#1d4a6b", "#206593", "#2b84bf"]


def _steps(colours: list[str]) -> list[list[Any]]:
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def _template(
    ink: str, muted: str, grid: str, line: str, page: str, diverging: list[str], sequential: list[str]
) -> Any:
    axis = {
        "gridcolor": grid,
        "linecolor": line,
        "zerolinecolor": line,
        "zerolinewidth": 1,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": line,
        "automargin": True,
        "separatethousands": True,
        "title": {"standoff": 10},
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": ink},
            "title": {
                "x": 0,
                "xref": "paper",
                "xanchor": "left",
                "font": {"size": 16},
                "subtitle": {"font": {"color": muted}},
            },
            "paper_bgcolor": page,
            "plot_bgcolor": page,
            "colorway": list(PALETTE),
            "colorscale": {
                "diverging": _steps(diverging),
                "sequential": _steps(sequential),
                "sequentialminus": _steps(sequential[::-1]),
            },
            "coloraxis": {
                "colorbar": {
                    "lenmode": "pixels",
                    "len": 240,
                    "y": 1,
                    "yanchor": "top",
                    "outlinewidth": 0,
                    "thickness": 14,
                    "ticks": "outside",
                    "ticklen": 4,
                    "tickcolor": line,
                }
            },
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"font": {"size": 12}, "title": {"font": {"size": 12}}, "bgcolor": "rgba(0,0,0,0)"},
            "hoverlabel": {"font": {"family": FONT, "size": 12}, "align": "left", "namelength": -1},
            "margin": {"l": 60, "r": 20, "t": 70, "b": 50},
            "hovermode": "closest",
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": muted, "activecolor": ink},
            "annotationdefaults": {"showarrow": False},
            "shapedefaults": {"line": {"color": muted}},
        },
        data={"heatmap": [{"xgap": 1, "ygap": 1}]},
    )


def light() -> Any:
    """The template for a white page: every figure of this package carries it."""
    return _template("#1f2328", "#59636e", "#e6e8eb", "#b4bac1", "#ffffff", _DIVERGING_LIGHT, _SEQUENTIAL_LIGHT)


def dark() -> Any:
    """The same template for a dark page: ``figure.update_layout(template=dark())``."""
    return _template("#e4e7eb", "#9aa4af", "#2b3138", "#4b545e", "#15181d", _DIVERGING_DARK, _SEQUENTIAL_DARK)


def plain(text: object) -> str:
    """Escape ``text`` so that plotly, which reads a subset of HTML, shows it unchanged.

    >>> plain("a<b & c")
    'a&lt;b &amp; c'
    """
    return html.escape(str(text), quote=False)


def signed(value: float, decimals: int = 2) -> str:
    """A number with its sign, with a typographic minus.

    >>> signed(-0.256), signed(1234, 0)
    ('−0.26', '+1,234')
    """
    return f"{value:+,.{decimals}f}".replace("-", "−")


def columns_of(table: pd.DataFrame, needed: Iterable[str], what: str) -> None:
    """Check that ``table`` has the columns ``needed``; it may have others.

    Raises:
        DtLensError: naming the first column that is missing.
    """
    for column in needed:
        if column not in table.columns:
            raise DtLensError(
                f"{what} needs a column {column!r}, and the table has {', '.join(map(str, table.columns)) or 'none'}."
                + nearest(column, map(str, table.columns))
            )


def empty(title: str, why: str, x: str = "", y: str = "") -> go.Figure:
    """A small figure that says why there is nothing to draw."""
    figure = go.Figure()
    figure.update_layout(
        template=light(),
        title_text=plain(title),
        height=200,
        xaxis={"visible": False},
        yaxis={"visible": False},
        annotations=[{"text": plain(why), "x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper", "font": {"size": 14}}],
    )
    return figure


def kind_of(matrix: str) -> tuple[str, str]:
    """The kind and layer of a matrix: its name without layer and head, and the layer.

    >>> kind_of("blocks.2.attn.OV.3"), kind_of("blocks.0.mlp.W_in"), kind_of("predict.action")
    (('OV', '2'), ('W_in', '0'), ('predict.action', ''))
    """
    found = re.fullmatch(r"blocks\.(\d+)\.(?:attn|mlp)\.([A-Za-z_]+)(?:\.\d+)?", matrix)
    return (found[2], found[1]) if found else (matrix, "")


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sorting key that puts ``blocks.10`` after ``blocks.2``.

    >>> sorted(["blocks.10.x", "blocks.2.x"], key=natural)
    ['blocks.2.x', 'blocks.10.x']
    """
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def finish(
    figure: go.Figure, title: str, subtitle: str, *, height: int, wide: int = 280, labels_above: bool = False
) -> go.Figure:
    """Give ``figure`` the template, a title and a height.

    Args:
        figure: changed in place.
        title: its title.
        subtitle: a line below the title.
        height: in pixels.
        wide: the least width in pixels at which it can be read; a narrower page scrolls.
        labels_above: whether a narrow page may move the labels of the y axis into the plot, above what they name.
    """
    figure.update_layout(
        template=light(),
        title={"text": plain(title), "subtitle": {"text": plain(subtitle)}},
        height=height,
        meta={"least_width": wide, "labels_above": labels_above},
    )
    return figure


def ticks(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis between two positive numbers, with plain numbers as ticks: 0.1, 0.2, 0.5, 1, ..."""
    if not (0 < low <= high < math.inf):
        return {"type": "log"}
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if last - first <= 3 else (1,)
    values = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
    values = [value for value in values if low / 1.6 <= value <= high * 1.6]
    return {"type": "log", "tickmode": "array", "tickvals": values, "ticktext": [_tick(value) for value in values]}


def _tick(value: float) -> str:
    power = round(math.log10(value))
    return f"10<sup>{power}</sup>".replace("-", "−") if abs(power) > 4 and value == 10.0**power else f"{value:g}"
