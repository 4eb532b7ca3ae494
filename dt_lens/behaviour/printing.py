"""Text of results: decimals, intervals, p-values, names of edits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dt_lens.statistics.outcomes import Interval

__all__ = [
    "about_interval",
    "decimals",
    "difference_tests",
    "edit_name",
    "p_text",
    "places",
    "span",
]


def decimals(*sizes: float) -> int:
    """How many decimals outcomes of these sizes are printed with: one, or as many as the largest needs for 3 digits.

    >>> decimals(3211.0, -5.0), decimals(4.2), decimals(0.93, 0.0), decimals(0.0), decimals(float("nan"))
    (1, 2, 3, 1, 1)
    """
    largest = max((abs(size) for size in sizes if math.isfinite(size)), default=0.0)
    return 1 if largest == 0 else min(max(1, 2 - math.floor(math.log10(largest))), 9)


def places(*sizes: float) -> int:
    """How many decimals such outcomes have in a sentence: as ``decimals``, but none where that is one.

    >>> places(3211.0, -5.0), places(0.93)
    (0, 3)
    """
    found = decimals(*sizes)
    return 0 if found == 1 else found


def span(
    interval: Interval | tuple[float, float], *, percent: bool = False, digits: int = 1, sign: bool = False
) -> str:
    """An interval as text, with ``sign`` that of its ends where they are above 0 too.

    >>> span((0.1, 0.25), percent=True), span((float("nan"), float("nan"))), span((-0.5, 1.25), digits=2, sign=True)
    ('[10.0 %, 25.0 %]', '(no interval)', '[-0.50, +1.25]')
    """
    low, high = interval
    if math.isnan(low) or math.isnan(high):
        return "(no interval)"
    form = f"{'+' if sign else ''}.{digits}f"
    if percent:
        return f"[{100 * low:{form}} %, {100 * high:{form}} %]"
    return f"[{low:{form}}, {high:{form}}]"


def about_interval(what: str, note: str) -> str:
    """An ``interval_note`` of ``what`` as a sentence; empty for an empty one.

    >>> about_interval("The mean's interval", "fewer than 200 returns"), about_interval("The mean's interval", "")
    ("The mean's interval may cover less than 95 %: fewer than 200 returns.", '')
    >>> about_interval("The mean's interval", "no interval: all 20 returns are equal")
    "The mean's interval is missing: all 20 returns are equal."
    """
    if not note:
        return ""
    missing = note.removeprefix("no interval: ")
    return f"{what} {'may cover less than 95 %' if missing == note else 'is missing'}: {missing}."


def edit_name(row: Mapping[Any, Any]) -> str:
    """What an edit is called, from a row with its ``matrix``, ``sv`` and ``side``.

    >>> edit_name({"matrix": "blocks.0.mlp.W_in", "sv": 3, "side": "read"})
    'blocks.0.mlp.W_in sv=3'
    >>> edit_name({"matrix": "blocks.0.attn.OV.1", "sv": 0, "side": "write"})
    'blocks.0.attn.OV.1 write sv=0'
    """
    two_sided = ".attn.OV" in str(row["matrix"]) or ".attn.QK" in str(row["matrix"])
    return f"{row['matrix']}{' ' + str(row['side']) if two_sided else ''} sv={row['sv']}"


def p_text(p: float) -> str:
    """A p-value as text: three digits, or scientific notation below 0.001.

    >>> p_text(0.00002), p_text(0.0371), p_text(1.0), p_text(float("nan"))
    ('2.0e-05', '0.0371', '1', 'unknown')
    """
    if math.isnan(p):
        return "unknown"
    return f"{p:.1e}" if p < 1e-3 else f"{p:.3g}"


def difference_tests(flips: float, mean: float, differ: bool, what: str) -> list[tuple[str, str]]:
    """The rows with the p-values of paired differences of ``what``, and their null hypotheses.

    >>> difference_tests(0.01, 0.02, True, "return")
    [('  symmetric about 0', 'p = 0.01 (sign flips)'), ('  mean 0', 'p = 0.02 (studentised bootstrap)')]
    >>> difference_tests(1.0, 1.0, False, "return")
    [('  no return changed', 'the two of every pair are equal, p = 1')]
    >>> difference_tests(0.01, float("nan"), True, "loss")[1]
    ('  mean 0', 'no test: all differences are equal')
    """
    if not differ:
        return [(f"  no {what} changed", "the two of every pair are equal, p = 1")]
    no_test = "no test: all differences are equal"
    return [
        ("  symmetric about 0", f"p = {p_text(flips)} (sign flips)"),
        ("  mean 0", no_test if math.isnan(mean) else f"p = {p_text(mean)} (studentised bootstrap)"),
    ]
