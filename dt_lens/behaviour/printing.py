"""Text and HTML of results: intervals, p-values, tables of names and values."""

from __future__ import annotations

import math
from html import escape

from dt_lens.statistics.outcomes import Interval

__all__ = [
    "decimals",
    "difference_tests",
    "p_text",
    "span",
    "text_table",
    "html_table",
]


def decimals(*sizes: float) -> int:
    """How many decimals outcomes of these sizes are printed with: one, or as many as the largest needs for 3 digits.

    >>> decimals(3211.0, -5.0), decimals(4.2), decimals(0.93, 0.0), decimals(0.0), decimals(float("nan"))
    (1, 2, 3, 1, 1)
    """
    largest = max((abs(size) for size in sizes if math.isfinite(size)), default=0.0)
    return 1 if largest == 0 else min(max(1, 2 - math.floor(math.log10(largest))), 9)


def span(interval: Interval | tuple[float, float], *, percent: bool = False, digits: int = 1) -> str:
    """An interval as text.

    >>> span((0.1, 0.25), percent=True), span((float("nan"), float("nan")))
    ('[10.0 %, 25.0 %]', '(no interval)')
    """
    low, high = interval
    if math.isnan(low) or math.isnan(high):
        return "(no interval)"
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

    >>> p_text(0.00002), p_text(0.0371), p_text(1.0), p_text(float("nan"))
    ('2.0e-05', '0.0371', '1', 'unknown')
    """
    if math.isnan(p):
        return "unknown"
    return f"{p:.1e}" if p < 1e-3 else f"{p:.3g}"


def difference_tests(flips: float, mean: float, differ: bool) -> list[tuple[str, str]]:
    """The rows with the p-values of paired differences and their null hypotheses.

    >>> difference_tests(0.01, 0.02, True)
    [('  symmetric about 0', 'p = 0.01 (sign flips)'), ('  mean 0', 'p = 0.02 (studentised bootstrap)')]
    >>> difference_tests(1.0, 1.0, False)
    [('  nothing changed', 'every pair has the same outcome, p = 1')]
    """
    if not differ:
        return [("  nothing changed", "every pair has the same outcome, p = 1")]
    return [
        ("  symmetric about 0", f"p = {p_text(flips)} (sign flips)"),
        ("  mean 0", f"p = {p_text(mean)} (studentised bootstrap)"),
    ]
