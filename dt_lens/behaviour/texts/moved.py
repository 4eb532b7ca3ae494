"""Tokens whose mean predicted probability an edit changed most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from dt_lens.lens.printing import grid_html
from dt_lens.lens.token_text import spelled

if TYPE_CHECKING:  # workers make no tables
    import pandas as pd

__all__ = ["Moved", "most_moved", "moved_frame", "moved_html", "moved_rows", "small_span"]

SHOWN = 5  # how many tokens to print of those that moved up, and of those that moved down
KEPT = 50  # how many tokens to keep of those that gained, and of those that lost


class Moved(NamedTuple):
    """A token whose mean predicted probability an edit changed."""

    token: int
    text: str  # printable: a space before it is ␣
    before: float  # mean over all predicted positions, unedited
    after: float

    @property
    def change(self) -> float:
        """``after - before``."""
        return self.after - self.before


def most_moved(before: Tensor, after: Tensor, model: Any) -> tuple[Moved, ...]:
    """The tokens that gained most probability, most first, then those that lost most; ``[d_vocab]`` each."""
    change = (after - before).cpu()
    order = change.argsort(descending=True, stable=True).tolist()
    chosen = [i for i in order[:KEPT] if change[i] > 0] + [i for i in order[: -KEPT - 1 : -1] if change[i] < 0]
    labels = getattr(model, "labels", None)
    names = {i: labels[i] if labels else model.tokenizer.decode([i]) for i in chosen}
    return tuple(Moved(i, spelled(names[i]), float(before[i]), float(after[i])) for i in chosen)


def small_span(interval: tuple[float, float]) -> str:
    """An interval as text, to three significant digits.

    >>> small_span((0.00012345, 0.25)), small_span((math.nan, math.nan))
    ('[0.000123, 0.25]', '(no interval)')
    """
    if math.isnan(interval[0]) or math.isnan(interval[1]):
        return "(no interval)"
    return f"[{interval[0]:.3g}, {interval[1]:.3g}]"


def moved_frame(moved: Sequence[Moved], k: int | None = None) -> pd.DataFrame:
    """A frame of the tokens that gained, most first, then those that lost, most first, ``k`` of each."""
    import pandas as pd

    gained = [row for row in moved if row.change > 0][:k]
    lost = [row for row in moved if row.change < 0][:k]
    columns = ["token", "text", "before", "after", "change"]
    return pd.DataFrame([(*row, row.change) for row in [*gained, *lost]], columns=columns)


def moved_rows(moved: Sequence[Moved]) -> list[tuple[str, str]]:
    """The tokens that moved most, as rows of a table of names and values."""
    table = moved_frame(moved, SHOWN)
    rows = []
    for name, part in (
        ("probability up", table[table["change"] > 0]),
        ("probability down", table[table["change"] < 0]),
    ):
        if len(part):
            rows.append((name, ", ".join(f"“{r.text}” {r.change:+.2g}" for r in part.itertuples())))
    return rows


def moved_html(moved: Sequence[Moved], k: int = 10) -> str:
    """An HTML table of the tokens that moved, for notebooks; empty if none did."""
    if not moved:
        return ""
    rows = [
        [r.text, f"{r.before:.3g}", f"{r.after:.3g}", f"{r.change:+.2g}"] for r in moved_frame(moved, k).itertuples()
    ]
    return grid_html(["token", "before", "after", "change"], rows, "Mean predicted probability")
