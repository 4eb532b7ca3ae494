"""The result of ``evaluate`` for a language model: its losses, their summary, and how both are printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dt_lens.behaviour.printing import html_table, span, text_table
from dt_lens.behaviour.texts.comparison import TextComparison
from dt_lens.behaviour.texts.losses import Losses, Moved, moved_html, moved_rows, small_span
from dt_lens.errors import DtLensError
from dt_lens.statistics.outcomes import bootstrap_interval, interval_note, iqm

__all__ = ["TextEvaluation"]

_KEPT = ("text", "text_id", "context", "bytes_per_token", "model_id", "base_id")


@dataclass(frozen=True, eq=False, repr=False)
class TextEvaluation(Losses):
    """Losses with a summary and paired comparisons; the arrays and their attributes are those of ``Losses``.

    Intervals are over windows of these texts and for this one checkpoint. Neighbouring windows of a text are not quite
    independent, so the intervals are a little too narrow.
    """

    def summary(self, *, confidence: float = 0.95, seed: int = 0) -> dict[str, Any]:
        """The numbers of the evaluation, as plain values.

        ``loss``, ``loss_interval``, ``iqm``, ``iqm_interval`` (studentised bootstrap over windows), ``interval_note``
        (where the mean's covers less than it says), ``std`` (n - 1), ``perplexity``,
        ``bits_per_byte``, ``kl`` and ``kl_interval``.

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
            "interval_note": interval_note(self.loss, "losses"),
            "std": float(self.loss.std(ddof=1)) if len(self) > 1 else float("nan"),
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "kl": float(self.kl.mean()),
            "kl_interval": tuple(bootstrap_interval(self.kl, **options)),
        }

    def compare(
        self, baseline: Losses, *, confidence: float = 0.95, seed: int = 0, other_model: bool = False
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
        if s["interval_note"]:
            rows.append(("intervals", s["interval_note"]))
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
