"""Factors of tokens, from the text that each stands for: digits, capitals, spaces, punctuation, parts of words."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from dt_lens.lens.token_text import texts

__all__ = ["token_factors"]

Levels = tuple[bool | None, ...]


def token_factors(labels: Sequence[str]) -> dict[str, Levels]:
    """Whether each token has a property, by the property's name; ``None`` where the question does not arise.

    - ``digits``: digits only, but for a space before them;
    - ``capitalised``: begins, after a space, with a capital letter; asked of tokens that begin with a cased letter;
    - ``leading_space``: begins with a space;
    - ``punctuation``: only punctuation and symbols, but for a space before them;
    - ``part_of_word``: continues a word, with no space before it, or ``##``; asked of tokens of letters only.

    >>> found = token_factors(["Ġthe", "The", "ing", "Ġ42", ","])
    >>> found["leading_space"], found["capitalised"]
    ((True, False, False, True, False), (False, True, False, None, None))
    >>> found["part_of_word"], token_factors(["walk", "##ing"])["part_of_word"]
    ((False, True, True, None, None), (False, True))
    """
    said = texts(labels)
    spaced = any(text.startswith(" ") for text in said)
    pieces = not spaced and any(label.startswith("##") and label[2:].isalpha() for label in labels)
    bare = [text.removeprefix("##") if pieces else text.removeprefix(" ") for text in said]
    continues = [text.startswith("##") if pieces else not text.startswith(" ") for text in said]
    return {
        "digits": tuple(text.isdecimal() for text in bare),
        "capitalised": tuple(text[0].isupper() if text and _cased(text[0]) else None for text in bare),
        "leading_space": tuple(text.startswith(" ") for text in said),
        "punctuation": tuple(bool(text) and all(unicodedata.category(c)[0] in "PS" for c in text) for text in bare),
        "part_of_word": tuple(
            part if text and all(unicodedata.category(c)[0] in "LM" for c in text) else None
            for text, part in zip(bare, continues, strict=True)
        ),
    }


def _cased(character: str) -> bool:
    return character.isupper() or character.islower()
