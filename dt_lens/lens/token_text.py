"""Turn a tokenizer's labels into readable text, such as ``Ġcaf`` into ``␣caf``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

__all__ = [
    "texts",
    "from_bytes",
    "byte_alphabet",
    "spelled",
]


def texts(labels: Sequence[str]) -> list[str]:
    """The text that token labels stand for: the mark of a word's start becomes a space, and bytes become characters.

    Labels are taken for byte-level tokens when some begin with ``Ġ`` and none holds a space; for SentencePiece's when
    some begin with ``▁`` and none holds a space. Other labels are returned unchanged. Bytes that form no
    character are written ``\\xe2``.

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
    """The text of a byte-level token; a label with other characters, such as a special token's, unchanged."""
    alphabet = byte_alphabet()
    if not all(character in alphabet for character in label):
        return label
    return bytes(alphabet[character] for character in label).decode("utf-8", errors="backslashreplace")


@cache
def byte_alphabet() -> dict[str, int]:
    """The byte of each character in GPT-2's byte-level tokens: printable Latin-1 is itself, others are moved up."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def spelled(text: str) -> str:
    """A text on one line with every character visible: spaces at the ends or in a row as ``␣``, others escaped.

    >>> spelled(" the"), spelled("a b"), spelled("a  b\\n"), spelled("\\u200b")
    ('␣the', 'a b', 'a␣␣b\\\\n', '\\\\u200b')
    """
    if not text:
        return "∅"
    shown = re.sub(r"^ +| +$|  +", lambda found: "␣" * len(found[0]), text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)
