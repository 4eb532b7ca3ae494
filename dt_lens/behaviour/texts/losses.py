"""Losses of one language model as arrays, one entry per window of text: what evaluations hold and comparisons take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["Losses", "Moved", "moved_frame", "moved_html", "moved_rows", "small_span"]

SHOWN = 5  # how many tokens to print of those that moved up, and of those that moved down


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


@dataclass(frozen=True, eq=False)
class Losses:
    """Windows of text that one model predicted; one window is one unit of evidence.

    Attributes:
        tokens: ``[n]``, predicted tokens of each window.
        loss: ``[n]``, mean negative log probability of them, in nats per token.
        kl: ``[n]``, mean Kullback-Leibler divergence of the model from itself without the edits that were active,
            KL(unedited || edited), in nats per token (Kullback and Leibler 1951); zeros where there were none.
        moved: the tokens whose mean predicted probability the edits changed most: those that gained, most first, then
            those that lost, most first.
        text: what was read, in words.
        text_id: hash of all tokens of all windows; only evaluations with the same one are paired.
        context: tokens of a window.
        bytes_per_token: of the texts, in UTF-8.
        model_id: hash of the weights and configuration that ran, edits included.
        base_id: the same without the edits.
        edits: records of the edits that were active.
    """

    tokens: NDArray[np.int64]
    loss: NDArray[np.float64]
    kl: NDArray[np.float64]
    moved: tuple[Moved, ...]
    text: str
    text_id: str
    context: int
    bytes_per_token: float
    model_id: str = ""
    base_id: str = ""
    edits: tuple[dict[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def mean(self) -> float:
        """Mean loss of the windows, in nats per token."""
        return float(self.loss.mean())

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean loss."""
        return math.exp(self.mean)

    @property
    def bits_per_byte(self) -> float:
        """The mean loss over the mean length of a token: what compares models with other tokenizers."""
        return self.mean / math.log(2) / self.bytes_per_token

    def to_frame(self) -> pd.DataFrame:
        """A row per window: its index, predicted tokens, loss and KL (nats per token)."""
        return pd.DataFrame(
            {"index": np.arange(len(self)), "tokens": self.tokens, "loss": self.loss, "kl": self.kl},
        )

    def moved_frame(self, k: int | None = None) -> pd.DataFrame:
        """The ``k`` tokens that gained and the ``k`` that lost most: token, text, before, after, change."""
        return moved_frame(self.moved, k)


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
    body = "".join(
        f"<tr><td style='text-align:left'>{escape(str(r.text))}</td><td>{r.before:.3g}</td><td>{r.after:.3g}</td>"
        f"<td>{r.change:+.2g}</td></tr>"
        for r in moved_frame(moved, k).itertuples()
    )
    head = "".join(f"<th>{name}</th>" for name in ("token", "before", "after", "change"))
    caption = "<caption style='text-align:left'>Mean predicted probability</caption>"
    return f"<table>{caption}<tr>{head}</tr>{body}</table>"
