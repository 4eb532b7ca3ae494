"""What labels say: tokens spelled so that a reader can tell them apart, and filters on them.

Tokenizers mark a word's start with a space, with ``Ġ`` (byte-level BPE, whose every character stands for a byte:
Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2) or with ``▁`` (SentencePiece).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import pandas as pd

from dt_lens.errors import DtLensError
from dt_lens.lens.token_text import texts

__all__ = [
    "Filter",
    "Rule",
    "ascii_only",
    "at_least",
    "kept_labels",
]
__all__ += ["whole_words"]

Rule = Callable[[str], bool]
_ESCAPED = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


@runtime_checkable
class Filter(Protocol):
    """A rule that wants to see all labels before it judges one."""

    def among(self, labels: Sequence[str], texts: Sequence[str]) -> list[bool]:
        """Which of the labels pass; ``texts`` is what they stand for."""
        ...


def ascii_only(text: str) -> bool:
    """A rule: nothing but printable ASCII, and no escaped bytes (``\\\\xe2``) or characters either.

    >>> ascii_only(" the"), ascii_only("é"), ascii_only("\\\\xe2")
    (True, False, False)
    """
    return text.isascii() and text.isprintable() and not _ESCAPED.search(text)


@dataclass(frozen=True)
class _WholeWords:
    """A rule: letters only, from a word's start on.

    A word starts at its space; where no label of an embedding begins with one, at the beginning of any label that is
    not marked as a continuation (``##ing``).

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
    """A rule: labels that were counted ``minimum`` times or more, in ``counts`` by label (or by its text).

    Raises:
        DtLensError: for counts that are neither a mapping nor a Series.
    """
    if not isinstance(counts, (Mapping, pd.Series)):
        raise DtLensError(f"Counts are a mapping or a Series from label to number, not a {type(counts).__name__}.")
    return _AtLeast({str(label): float(count) for label, count in counts.items()}, minimum)


def kept_labels(labels: Sequence[str], where: Rule | Filter | Sequence[Rule | Filter] | None) -> list[int] | None:
    """The numbers of the labels that pass every rule; ``None`` when there is no rule. A rule sees a label's text.

    Raises:
        DtLensError: for something that is no rule.
    """
    if where is None:
        return None
    rules = list(where) if isinstance(where, (list, tuple)) else [where]
    meant = texts(labels)
    passed = [True] * len(labels)
    for rule in rules:
        if isinstance(rule, Filter):
            told = rule.among(labels, meant)
        elif callable(rule):
            told = [bool(rule(text)) for text in meant]
        else:
            raise DtLensError(
                f"A filter is {rule!r:.80}; give a function of a label that tells whether it is kept, or several."
            )
        passed = [a and b for a, b in zip(passed, told, strict=True)]
    return [i for i, kept in enumerate(passed) if kept]
