"""The error class for bad input, and the words of its sentences."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["DtLensError", "a_type", "as_written", "because", "nearest", "unwritable"]


class DtLensError(Exception):
    """Bad input, described in one sentence: what was wrong, what was expected, what to do.

    Everything that goes wrong because of what the user passed in is one of these; the command line prints the
    sentence and exits with status 2.
    """


def a_type(value: object) -> str:
    """The name of a value's type with its article, for use inside a sentence.

    >>> a_type(3), a_type("text")
    ('an int', 'a str')
    """
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"


def as_written(value: object, longest: int = 80) -> str:
    """A value as it is written in Python, for use inside a sentence: one line of at most ``longest`` characters.

    >>> as_written("a"), as_written(2.5), as_written([0] * 100)[:12]
    ("'a'", '2.5', '[0, 0, 0, 0,')
    """
    return " ".join(repr(value).split())[:longest]


def because(error: BaseException) -> str:
    """The message of another library's exception, for use inside a sentence: one line, without a final full stop.

    >>> because(ValueError("Bad thing.\\nMore of it."))
    'Bad thing. More of it'
    >>> because(KeyError())
    'KeyError'
    """
    said = " ".join(str(error).split()) or type(error).__name__
    return (said if len(said) <= 200 else f"{said[:200]}...").rstrip(". ")


def nearest(name: object, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the known name closest to ``name``, or an empty string.

    >>> nearest("blocks.0.mlp.Win", ["blocks.0.mlp.W_in", "blocks.0.mlp.W_out"])
    " Did you mean 'blocks.0.mlp.W_in'?"
    >>> nearest("zzz", ["blocks.0.mlp.W_in"])
    ''
    """
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4) if isinstance(name, str) else []
    return f" Did you mean {match[0]!r}?" if match else ""


def unwritable(what: object, error: BaseException) -> DtLensError:
    """The error for ``what``, usually a path, that cannot be written because of ``error``.

    >>> print(unwritable("runs/scan.csv", OSError(28, "No space left on device")))
    runs/scan.csv cannot be written: No space left on device; choose another folder or make room.
    """
    why = getattr(error, "strerror", None) or because(error)
    return DtLensError(f"{what} cannot be written: {why}; choose another folder or make room.")
