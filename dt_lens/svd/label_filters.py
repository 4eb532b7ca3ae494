"""Filters on the labels of an embedding: rules for the text that a label stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import pandas as pd

from dt_lens.arguments import finite_numbers
from dt_lens.errors import DtLensError, a_type, as_written
from dt_lens.lens.token_text import texts

__all__ = [
    "Filter",
    "Rule",
    "ascii_only",
    "at_least",
    "passing_labels",
    "whole_words",
]

Rule = Callable[[str], bool]
_ESCAPED = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


@runtime_checkable
class Filter(Protocol):
    """A rule that needs all labels to decide on one."""

    def among(self, labels: Sequence[str], texts: Sequence[str]) -> list[bool]:
        """Whether each of the labels passes; ``texts`` is what they stand for."""
        ...


def ascii_only(text: str) -> bool:
    """A rule: printable ASCII only, without escaped bytes (``\\\\xe2``) or characters.

    >>> ascii_only(" the"), ascii_only("é"), ascii_only("\\\\xe2")
    (True, False, False)
    """
    return text.isascii() and text.isprintable() and not _ESCAPED.search(text)


@dataclass(frozen=True)
class _WholeWords:
    """A rule: whole words, of letters only.

    A word starts with a space; where no label of an embedding does, any label is a word that is not marked as a
    continuation (``##ing``).

    >>> whole_words(" don't"), whole_words("ing"), whole_words(" 42")
    (True, False, False)
    >>> whole_words.among(["walk", "##ing"], ["walk", "##ing"])
    [True, False]
    """

    def __call__(self, text: str) -> bool:
        return text.startswith(" ") and self._words(text)

    def among(self, labels: Sequence[str], texts: Sequence[str]) -> list[bool]:
        spaced = any(text.startswith(" ") for text in texts)
        return [(text.startswith(" ") or not spaced) and self._words(text) for text in texts]

    @staticmethod
    def _words(text: str) -> bool:
        words = text.split(" ")
        return all(_WORD.fullmatch(word) for word in (words[1:] if text.startswith(" ") else words))


whole_words = _WholeWords()


@dataclass(frozen=True)
class _AtLeast:
    counts: Mapping[str, float]
    minimum: float

    def among(self, labels: Sequence[str], texts: Sequence[str]) -> list[bool]:
        counts = self.counts
        return [
            counts.get(label, counts.get(text, 0)) >= self.minimum for label, text in zip(labels, texts, strict=True)
        ]


def at_least(counts: Mapping[str, float] | pd.Series[float], minimum: float = 1) -> Filter:
    """A rule: labels with a count of ``minimum`` or more, in ``counts`` by label (or by its text).

    Raises:
        DtLensError: for counts that are neither a mapping nor a Series.
    """
    if not isinstance(counts, (Mapping, pd.Series)):
        raise DtLensError(f"Counts are a mapping or a Series from label to number, not {a_type(counts)}.")
    try:
        known = {str(label): float(count) for label, count in counts.items()}
    except (TypeError, ValueError):
        raise DtLensError("Counts hold something that is not a number; give a number for each label.") from None
    return _AtLeast(known, finite_numbers([minimum], "minimum")[0])


def passing_labels(labels: Sequence[str], where: Rule | Filter | Sequence[Rule | Filter] | None) -> list[int] | None:
    """The row numbers of the labels whose text passes every rule; ``None`` without a rule.

    Raises:
        DtLensError: for an object that is not a rule.
    """
    if where is None:
        return None
    rules = list(where) if isinstance(where, (list, tuple)) else [where]
    meant = texts(labels)
    passed = [True] * len(labels)
    for rule in rules:
        if isinstance(rule, Filter):
            found = rule.among(labels, meant)
        elif callable(rule):
            found = [bool(rule(text)) for text in meant]
        else:
            raise DtLensError(
                f"A filter is {as_written(rule)}; give a function of a label's text that returns whether it is shown, "
                "or several such functions."
            )
        passed = [a and b for a, b in zip(passed, found, strict=True)]
    return [i for i, passes in enumerate(passed) if passes]
