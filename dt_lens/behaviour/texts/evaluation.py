"""What ``evaluate`` found for a language model: a row for every window of text, and what they add up to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dt_lens.behaviour.printing import html_table, span, text_table
from dt_lens.errors import DtLensError
from dt_lens.statistics.outcomes import bootstrap_interval, iqm

if TYPE_CHECKING:
    from dt_lens.behaviour.texts.comparison import TextComparison

__all__ = ["Moved", "TextEvaluation", "moved_frame"]

SHOWN = 5  # tokens that moved up, and down, in what is printed

_KEPT = ("text", "text_id", "context", "bytes_per_token", "model_id", "base_id")


class Moved(NamedTuple):
    """A token whose mean predicted probability an edit changed."""

    token: int
    text: str  # as a reader can tell it apart: a space before it is ␣
    before: float  # mean over all predicted positions, unedited
    after: float

    @property
    def change(self) -> float:
        """``after - before``."""
        return self.after - self.before


@dataclass(frozen=True, eq=False)
class TextEvaluation:
    """Windows of text that one model predicted; one window is one unit of evidence.

    Intervals are over windows of these texts and for this one checkpoint. Neighbouring windows of a text are not quite
    independent, so the intervals are a little too narrow.

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

    def summary(self, *, confidence: float = 0.95, seed: int = 0) -> dict[str, Any]:
        """The numbers of the evaluation, as plain values.

        ``loss``, ``loss_interval``, ``iqm``, ``iqm_interval`` (bootstrap over windows), ``std`` (n - 1),
        ``perplexity``, ``bits_per_byte``, ``kl`` and ``kl_interval``.

        Args:
            confidence: of the intervals.
            seed: of the bootstrap.
        """
        options: dict[str, Any] = {"confidence": confidence, "seed": seed}
        return {
            "text": self.text,
            "windows": len(self),
            "context": self.context,
            "tokens": int(self.tokens.sum()),
            "loss": self.mean,
            "loss_interval": tuple(bootstrap_interval(self.loss, **options)),
            "iqm": float(iqm(self.loss)),
            "iqm_interval": tuple(bootstrap_interval(self.loss, iqm, **options)),
            "std": float(self.loss.std(ddof=1)) if len(self) > 1 else float("nan"),
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "kl": float(self.kl.mean()),
            "kl_interval": tuple(bootstrap_interval(self.kl, **options)),
        }

    def compare(
        self, baseline: TextEvaluation, *, confidence: float = 0.95, seed: int = 0, other_model: bool = False
    ) -> TextComparison:
        """This evaluation against ``baseline``, paired by window; differences are this one's minus the baseline's.

        Args:
            baseline: of the same texts, cut into the same windows.
            confidence: of the intervals.
            seed: of the bootstrap and the permutations.
            other_model: whether the two may be of different models, as before and after fine-tuning; they must have the
                same tokenizer.

        Raises:
            DtLensError: when the two differ in their texts, windows or tokens, or in the model without its edits.
        """
        from dt_lens.behaviour.texts.comparison import TextComparison

        return TextComparison.of(self, baseline, confidence=confidence, seed=seed, other_model=other_model)

    def to_dict(self) -> dict[str, Any]:
        """Provenance, ``summary()``, the tokens that moved and the windows, as plain JSON values."""
        return {
            **{name: getattr(self, name) for name in _KEPT},
            "edits": list(self.edits),
            **self.summary(),
            "moved": [list(row) for row in self.moved],
            "per_window": {name: column.tolist() for name, column in self.to_frame().items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextEvaluation:
        """The inverse of ``to_dict``, to the last bit.

        Raises:
            DtLensError: for a value that is missing or of the wrong kind.
        """
        try:
            rows = values["per_window"]
            tokens, loss, kl = (
                np.array(rows["tokens"], dtype=np.int64),
                np.array(rows["loss"], dtype=np.float64),
                np.array(rows["kl"], dtype=np.float64),
            )
            if not tokens.shape == loss.shape == kl.shape or tokens.ndim != 1 or not len(tokens):
                raise ValueError("the columns of per_window differ in length")
            return cls(
                tokens,
                loss,
                kl,
                tuple(Moved(*row) for row in values["moved"]),
                edits=tuple(values["edits"]),
                **{name: values[name] for name in _KEPT},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DtLensError(f"These are not the values of a text evaluation's to_dict: {error!r}.") from error

    def _rows(self) -> list[tuple[str, str]]:
        s = self.summary()
        rows = [
            ("mean loss", f"{s['loss']:.4f} nats per token  {span(s['loss_interval'], digits=4)}"),
            ("interquartile mean", f"{s['iqm']:.4f}  {span(s['iqm_interval'], digits=4)}"),
            ("perplexity", f"{s['perplexity']:.2f}"),
            ("bits per byte", f"{s['bits_per_byte']:.4f}"),
        ]
        if self.edits:
            rows.append(("KL from the unedited", f"{s['kl']:.3g} nats per token  {small_span(s['kl_interval'])}"))
            rows += moved_rows(self.moved)
        return rows

    def _title(self) -> str:
        edits = f", {len(self.edits)} edit{'s' * (len(self.edits) != 1)}" if self.edits else ""
        windows = f"{len(self)} window{'s' * (len(self) != 1)}"
        return f"{self.text}: {windows} of up to {self.context} tokens, {int(self.tokens.sum()):,} predicted{edits}"

    def __str__(self) -> str:
        return text_table(self._title(), self._rows())

    def __repr__(self) -> str:
        return f"<TextEvaluation {self._title()}; mean loss {self.mean:.4f}>"

    def _repr_html_(self) -> str:
        return html_table(self._title(), self._rows()) + moved_html(self.moved)


def small_span(interval: tuple[float, float]) -> str:
    """An interval of numbers that may be small.

    >>> small_span((0.00012345, 0.25))
    '[0.000123, 0.25]'
    """
    return f"[{interval[0]:.3g}, {interval[1]:.3g}]"


def moved_frame(moved: Sequence[Moved], k: int | None = None) -> pd.DataFrame:
    """Tokens that gained, most first, then tokens that lost, most first, ``k`` of each."""
    gained = [row for row in moved if row.change > 0][:k]
    lost = [row for row in moved if row.change < 0][:k]
    columns = ["token", "text", "before", "after", "change"]
    return pd.DataFrame([(*row, row.change) for row in [*gained, *lost]], columns=columns)


def moved_rows(moved: Sequence[Moved]) -> list[tuple[str, str]]:
    """The first few, for a table of names and values."""
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
    """A table of them for a notebook; nothing where none moved."""
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
