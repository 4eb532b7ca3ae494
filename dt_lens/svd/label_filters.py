"""What labels say: tokens spelled so that a reader can tell them apart, and filters on them.

Tokenizers mark a word's start with a space, with ``Ġ`` (byte-level BPE, whose every character stands for a byte:
Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2) or with ``▁`` (SentencePiece).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol, runtime_checkable

import pandas as pd

from dt_lens.errors import DtLensError

__all__ = ["Filter", "Rule", "ascii_only", "at_least", "byte_alphabet", "from_bytes", "kept_labels", "spelled", "texts"]
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


def texts(labels: Sequence[str]) -> list[str]:
    """What labels stand for: a word's start is a space, and bytes are characters again where they form some.

    Labels are taken for byte-level tokens when some begin with ``Ġ`` and none holds a space; for SentencePiece's when
    some begin with ``▁`` and none holds a space. Others stand for themselves. Bytes that are no characters are written
    ``\\\\xe2``.

    >>> texts(["Ġcaf", "Ã©", "Ċ", "âĢ"])
    [' caf', 'é', '\\n', '\\\\xe2\\\\x80']
    >>> texts(["▁the", "re"]), texts(["thigh position", "Ġ"])
    ([' the', 're'], ['thigh position', 'Ġ'])
    """
    marked = {label[:1] for label in labels}
    if not marked & {"Ġ", "▁"} or any(" " in label for label in labels):
        return list(labels)
    if "Ġ" in marked:
        return [from_bytes(label) for label in labels]
    return [label.replace("▁", " ") for label in labels]


def from_bytes(label: str) -> str:
    """The text of a byte-level token; one with other characters, such as a special token's, as it is spelled."""
    alphabet = byte_alphabet()
    if not all(character in alphabet for character in label):
        return label
    return bytes(alphabet[character] for character in label).decode("utf-8", errors="backslashreplace")


@cache
def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for: printable Latin-1 itself, others moved up."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def spelled(text: str) -> str:
    """A text on one line, nothing of it invisible: spaces at the ends or in a row as ``␣``, others escaped.

    >>> spelled(" the"), spelled("a b"), spelled("a  b\\n"), spelled("\\u200b")
    ('␣the', 'a b', 'a␣␣b\\\\n', '\\\\u200b')
    """
    if not text:
        return "∅"
    shown = re.sub(r"^ +| +$|  +", lambda found: "␣" * len(found[0]), text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)


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
