"""Text and HTML of results: intervals, p-values, tables of names and values."""

from __future__ import annotations

from html import escape

from dt_lens.statistics.outcomes import Interval

__all__ = [
    "p_text",
    "span",
    "text_table",
    "html_table",
]


def span(interval: Interval | tuple[float, float], *, percent: bool = False, digits: int = 1) -> str:
    """An interval as text.

    >>> span((0.1, 0.25), percent=True)
    '[10.0 %, 25.0 %]'
    """
    low, high = interval
    if percent:
        return f"[{100 * low:.{digits}f} %, {100 * high:.{digits}f} %]"
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def text_table(title: str, rows: list[tuple[str, str]]) -> str:
    """A title, then one line of name and value per row, the values aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def html_table(title: str, rows: list[tuple[str, str]]) -> str:
    """An HTML table of name and value, with the title as caption, for notebooks."""
    body = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table><caption style='text-align:left'>{escape(title)}</caption>{body}</table>"


def p_text(p: float) -> str:
    """A p-value as text: three digits, or scientific notation below 0.001.

    >>> p_text(0.00002), p_text(0.0371), p_text(1.0)
    ('2.0e-05', '0.0371', '1')
    """
    return f"{p:.1e}" if p < 1e-3 else f"{p:.3g}"
