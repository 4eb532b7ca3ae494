"""The result of ``evaluate`` for a language model: an ``Evaluation`` whose units are windows of text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dt_lens.behaviour.comparison import Comparison
from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.terms import Terms
from dt_lens.behaviour.texts.comparison import TextComparison
from dt_lens.behaviour.texts.moved import Moved, moved_frame, moved_html, moved_rows, small_span
from dt_lens.statistics.outcomes import bootstrap_interval

__all__ = ["TextEvaluation", "terms_of_windows"]

LARGE = 0.1  # nats per token: about a tenth more perplexity, as a tenth of the return is large for agents


def terms_of_windows(text: str, text_id: str, context: int) -> Terms:
    """The terms of windows of a text.

    Args:
        text: what is read, in words.
        text_id: hash of all tokens of all windows; only evaluations with the same one are paired.
        context: tokens of a window.
    """
    return Terms(
        task="text",
        measures={"tokens": "integer", "loss": "real", "kl": "real"},
        outcome="loss",
        better="less",
        unit="window",
        size=f"of up to {context} tokens",
        index="index",
        scale="nats per token",
        digits=4,
        large=LARGE,
        setting={"context": context, "text_id": text_id},
        titles={"text_id": "text"},
        place=text,
        actor="model",
    )


@dataclass(frozen=True, eq=False, repr=False)
class TextEvaluation(Evaluation):
    """Windows of text that one model predicted; one window is one unit of evidence.

    Neighbouring windows of a text are not quite independent, so the intervals are a little too narrow.
    """

    comparison: ClassVar[type[Comparison]] = TextComparison

    @property
    def tokens(self) -> NDArray[np.int64]:
        """``[n]``, predicted tokens of each window."""
        return np.asarray(self.columns["tokens"])

    @property
    def loss(self) -> NDArray[np.float64]:
        """``[n]``, mean negative log probability of them, in nats per token."""
        return self.outcomes

    @property
    def kl(self) -> NDArray[np.float64]:
        """``[n]``, mean Kullback-Leibler divergence of the model from itself without the edits that were active,
        KL(unedited || edited), in nats per token (Kullback and Leibler 1951); zeros where there were none."""
        return np.asarray(self.columns["kl"])

    @property
    def moved(self) -> tuple[Moved, ...]:
        """The tokens whose mean predicted probability the edits changed most: those that gained, most first, then those
        that lost, most first."""
        return tuple(Moved(*row) for row in self.details.get("moved", ()))

    @property
    def text(self) -> str:
        """What was read, in words."""
        return str(self.details.get("text", ""))

    @property
    def text_id(self) -> str:
        """Hash of all tokens of all windows; only evaluations with the same one are paired."""
        return str(self.terms.setting["text_id"])

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return int(self.terms.setting["context"])

    @property
    def bytes_per_token(self) -> float:
        """Of the texts, in UTF-8."""
        return float(self.details.get("bytes_per_token", math.nan))

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean loss."""
        return math.exp(self.mean)

    @property
    def bits_per_byte(self) -> float:
        """The mean loss over the mean length of a token: what compares models with other tokenizers."""
        return self.mean / math.log(2) / self.bytes_per_token

    def summary(self, *, confidence: float = 0.95, seed: int = 0) -> dict[str, Any]:
        """As ``Evaluation.summary``; also ``loss`` and ``loss_interval`` (the mean), ``predicted`` (tokens),
        ``perplexity``, ``bits_per_byte``, ``kl`` and ``kl_interval``."""
        found = super().summary(confidence=confidence, seed=seed)
        return {
            "text": self.text,
            **found,
            "tokens": int(self.tokens.sum()),
            "loss": self.mean,
            "loss_interval": found["mean_interval"],
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "kl": float(self.kl.mean()),
            "kl_interval": tuple(bootstrap_interval(self.kl, confidence=confidence, seed=seed)),
        }

    def moved_frame(self, k: int | None = None) -> pd.DataFrame:
        """The ``k`` tokens that gained and the ``k`` that lost most: token, text, before, after, change."""
        return moved_frame(self.moved, k)

    def more_rows(self, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        rows = [
            ("perplexity", f"{summary['perplexity']:.2f}"),
            ("bits per byte", f"{summary['bits_per_byte']:.4f}"),
            ("predicted tokens", f"{summary['tokens']:,}"),
        ]
        if self.edits:
            rows.append(
                ("KL from the unedited", f"{summary['kl']:.3g} nats per token  {small_span(summary['kl_interval'])}")
            )
            rows += moved_rows(self.moved)
        return rows

    def _repr_html_(self) -> str:
        return super()._repr_html_() + moved_html(self.moved)
