"""Tables as HTML: readable numbers, exact values on hover, every column sortable."""

from __future__ import annotations

import html
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dt_lens.arguments import require_offers
from dt_lens.errors import DtLensError, nearest

__all__ = ["anchor_of", "number_format", "table_html"]

CARDS = 4  # columns of a table that fits a telephone
Format = Callable[[Any], str]
_NAMES = frozenset({"matrix", "embedding", "label", "environment"})  # set in the typeface of code


def number_format(name: str, values: pd.Series[Any]) -> Format:
    """Choose how to write the numbers of a column, from its name and the size of its values.

    p and q values have three decimals (or ``< 0.001``), rates are percentages, cosines have a sign, whole numbers have
    thousands separators; the larger a column's largest number is, the fewer decimals its numbers have.

    >>> write = number_format("return", pd.Series([2896.4, -5.0]))
    >>> write(2896.4), write(-5.0), write(float("nan"))
    ('2,896', '−5', '–')
    >>> number_format("q", pd.Series([0.2]))(2e-5), number_format("failure_rate", pd.Series([0.2]))(0.215)
    ('< 0.001', '22 %')
    """
    if re.fullmatch(r"(.*_)?[pq](_value)?", name):
        return lambda v: _or_dash(v, lambda x: "< 0.001" if x < 0.001 else f"{x:.3f}")
    if re.search(r"rate$|fraction$|share$", name):
        return lambda v: _or_dash(v, lambda x: f"{100 * x:.0f} %")
    if re.search(r"cosine$", name):
        return lambda v: _or_dash(v, lambda x: f"{x:+.2f}")
    finite = pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if len(finite) and (finite == np.round(finite)).all():
        return lambda v: _or_dash(v, lambda x: f"{x:,.0f}")
    largest = float(np.abs(finite).max(initial=0.0))
    decimals = 0 if largest >= 100 else 1 if largest >= 10 else 2 if largest >= 1 else 3
    return lambda v: _or_dash(v, lambda x: f"{x:,.{decimals}f}")


def table_html(
    frame: pd.DataFrame,
    *,
    headings: Mapping[str, str] | None = None,
    formats: Mapping[str, str | Format] | None = None,
    intervals: Mapping[str, tuple[str, str]] | None = None,
    anchors: Sequence[str] = (),
    first: int | None = None,
) -> str:
    """``frame`` as an HTML table; the index is not shown.

    Lines of a cell after its first are set small, below it.

    Args:
        frame: the rows.
        headings: other headings for some columns; by default underscores become spaces.
        formats: for some columns a format specification (``".3f"``) or a function of one value.
        intervals: for a column, the two columns that hold the ends of its interval, shown in the same cell. Columns
            ``x``, ``x_low`` and ``x_high`` are joined by default.
        anchors: an id for each row, which links may lead to.
        first: how many rows a page shows until its reader asks for all; all by default.

    Raises:
        DtLensError: if the table does not have a column, or there is not an id for each row.
    """
    require_offers(frame, "frame", "a DataFrame", "columns", "set_axis")
    columns = [str(column) for column in frame.columns]
    frame = frame.set_axis(columns, axis=1)
    joined = {c: (f"{c}_low", f"{c}_high") for c in columns if f"{c}_low" in columns and f"{c}_high" in columns}
    joined.update(intervals or {})
    for column in [*(headings or {}), *(formats or {}), *joined, *(end for ends in joined.values() for end in ends)]:
        if column not in columns:
            raise DtLensError(f"The table has no column {column!r}." + nearest(column, columns))
    if anchors and len(anchors) != len(frame):
        raise DtLensError(f"The table has {len(frame)} rows and {len(anchors)} anchors; give one for each row.")
    swallowed = {end for ends in joined.values() for end in ends}
    shown = [column for column in columns if column not in swallowed]
    numeric = {c: pd.api.types.is_numeric_dtype(frame[c]) and not pd.api.types.is_bool_dtype(frame[c]) for c in shown}
    writers = {c: _writer(c, frame[c], numeric[c], (formats or {}).get(c)) for c in shown}
    heads = {c: html.escape((headings or {}).get(c, c.replace("_", " "))) for c in shown}
    head = "".join(
        f'<th scope="col"{" class=number" if numeric[c] else ""}><button type="button">{heads[c]}</button></th>'
        for c in shown
    )
    body = []
    for number, row in enumerate(frame.to_dict("records")):
        cells = []
        for column in shown:
            value = row[column]
            line, *below = html.escape(writers[column](value)).split("\n")
            text = line + "".join(f"<small>{part}</small>" for part in below)
            if column in joined:
                low, high = (writers[column](row[end]) for end in joined[column])
                if (low, high) != ("–", "–"):
                    text += f' <span class="interval">[{html.escape(low)}, {html.escape(high)}]</span>'
            kind = "number" if numeric[column] else "name" if column in _NAMES else "words" if len(text) > 24 else ""
            exact = (
                f' title="{html.escape(repr(float(value)))}"' if numeric[column] and isinstance(value, float) else ""
            )
            cells.append(
                f'<td{f" class={kind}" if kind else ""} data-head="{heads[column]}" '
                f'data-value="{html.escape(_key(value))}"{exact}>{text}</td>'
            )
        mark = f' id="{html.escape(anchors[number])}"' if anchors else ""
        mark += ' class="more"' if first is not None and number >= first else ""
        body.append(f"<tr{mark}>" + "".join(cells) + "</tr>")
    # A narrow page shows a row of many columns as a card.
    names = " ".join(name for name, of in (("cards", len(shown) > CARDS), ("short", first is not None)) if of)
    marks = (f' class="{names}"' if names else "") + (f' data-first="{first}"' if first is not None else "")
    return f"<table{marks}><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(body) + "\n</tbody></table>"


def anchor_of(*parts: object) -> str:
    """An id made of words, for a row and the links to it.

    >>> anchor_of("blocks.0.attn.OV.1", "write", 3)
    'at-blocks-0-attn-OV-1-write-3'
    """
    return "-".join(["at", *(re.sub(r"[^A-Za-z0-9_]+", "-", str(part)).strip("-") for part in parts)])


def _writer(name: str, values: pd.Series[Any], numeric: bool, given: str | Format | None) -> Format:
    if callable(given):
        return given
    if given is not None:
        return lambda v: _or_dash(v, lambda x: format(x, given))
    return number_format(name, values) if numeric else _words


def _words(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    return "–" if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)) else str(value)


def _or_dash(value: Any, write: Format) -> str:
    """``write(value)`` with a real minus sign; a dash for a missing value."""
    if value is None or value is pd.NA or (isinstance(value, numbers.Real) and math.isnan(value)):
        return "–"
    text = write(value)
    return "−" + text[1:] if text.startswith("-") else text


def _key(value: Any) -> str:
    """The text that the page sorts by."""
    if isinstance(value, numbers.Real):
        return "" if math.isnan(value) else repr(float(value))
    return _words(value)
