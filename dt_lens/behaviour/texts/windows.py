"""Cut texts into windows of tokens: the units over which a language model's behaviour is measured and paired."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dt_lens.errors import DtLensError, a_type, because

__all__ = ["Windows", "cut", "read_lines", "read_texts", "token_ids"]

Ids = NDArray[np.int64]
Texts = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, in the order of the texts.

    Attributes:
        tokens: ``[length]`` ids of each window, what the tokenizer puts before every text included.
        unpredicted: how many tokens at the start of a window are not predicted, at least 1.
        bytes_per_token: of the texts as a whole, in UTF-8.
    """

    tokens: tuple[Ids, ...]
    unpredicted: int
    bytes_per_token: float

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def text_id(self) -> str:
        """Sixteen hexadecimal digits that change with any token of any window: the first 64 bits of a SHA-256."""
        digest = hashlib.sha256(str(self.unpredicted).encode())
        for window in self.tokens:
            digest.update(f" {len(window)} ".encode() + window.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def read_texts(texts: Texts) -> list[str]:
    """Read ``texts``: a text, a text file, or several of either.

    A ``Path`` is a file. A string is a file if one of that name exists, and otherwise a text; a string that looks like
    the name of a missing file is refused. In a list, strings are texts.

    Raises:
        DtLensError: for a file that cannot be read as UTF-8 text, an empty list, or a value that is not a text.
    """
    if isinstance(texts, str):
        return [_read(Path(texts)) if _names_a_file(texts) else texts]
    if isinstance(texts, Path):
        return [_read(texts)]
    if not isinstance(texts, Sequence) or not all(isinstance(text, str | Path) for text in texts):
        raise DtLensError(
            f"texts is {a_type(texts)}; evaluate takes the path of a text file, a string, or a list of either."
        )
    if not texts:
        raise DtLensError("texts is empty; give evaluate at least one text.")
    return [_read(text) if isinstance(text, Path) else text for text in texts]


def read_lines(texts: str | Path | Sequence[str]) -> list[str]:
    """Short texts: a list of them, or a text or a file with one a line; empty lines are left out.

    Raises:
        DtLensError: for what ``read_texts`` refuses, or no text at all.
    """
    if isinstance(texts, str | Path):
        (whole,) = read_texts(texts)
        found = whole.splitlines()
    else:
        found = read_texts(texts)
    found = [line for line in found if line.strip()]
    if not found:
        raise DtLensError("There is no text; give at least one line that is not empty.")
    return found


def token_ids(tokenizer: Any, text: str, start: bool = True) -> Ids:
    """The tokens of a text, by default after what the tokenizer puts before every text."""
    prefix = _prefix(tokenizer)
    ids = np.asarray(_encode(tokenizer, text, len(prefix)), dtype=np.int64)
    return np.concatenate([prefix, ids]) if start else ids


def _names_a_file(text: str) -> bool:
    if len(text) > 1_000 or "\n" in text:
        return False
    try:
        if Path(text).is_file():
            return True
    except (OSError, ValueError):
        return False
    if text and not any(c.isspace() for c in text) and ("/" in text or Path(text).suffix in (".txt", ".md", ".text")):
        raise DtLensError(f"There is no text file {text!r}; check the path, or give the text itself in a list.")
    return False


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DtLensError(f"There is no text file {str(file)!r}; check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DtLensError(
            f"{file} cannot be read as UTF-8 text: {because(error)}; give a text file in UTF-8."
        ) from error


def cut(texts: Sequence[str], tokenizer: Any, context: int, limit: int | None = None) -> Windows:
    """Consecutive windows of ``context`` tokens without overlap; the windows of a text do not depend on other texts.

    The rest at a text's end is left out, except that a text shorter than a window is a window by itself. A token
    that the tokenizer puts before every text (Llama's ``<s>``) stands before every window, within ``context``.

    Args:
        texts: the texts.
        tokenizer: anything with ``encode(text)``; a Hugging Face tokenizer's ``bos_token_id`` is respected.
        context: tokens of a window, at least 2.
        limit: the most windows, from the first on.

    Raises:
        DtLensError: if no text has two tokens.
    """
    prefix = _prefix(tokenizer)
    room = context - len(prefix)
    windows: list[Ids] = []
    tokens = size = 0
    for text in texts:
        ids = np.asarray(_encode(tokenizer, text, len(prefix)), dtype=np.int64)
        tokens, size = tokens + len(ids), size + len(text.encode("utf-8", "surrogatepass"))
        whole = len(ids) // room
        parts = [ids[i * room : (i + 1) * room] for i in range(whole)] or [ids]
        windows += [np.concatenate([prefix, part]) for part in parts if len(part) + len(prefix) >= 2 and len(part)]
    if not windows:
        raise DtLensError("No text has two tokens, and the first one of a text cannot be predicted; give longer texts.")
    return Windows(tuple(windows[:limit]), max(1, len(prefix)), size / max(1, tokens))


def _encode(tokenizer: Any, text: str, prefix: int) -> list[int]:
    """The tokens of a text, without the ``prefix`` tokens that the tokenizer puts before it."""
    try:
        # A whole file is longer than any context; verbose=False suppresses the warning about that.
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    except TypeError:  # not one of Hugging Face's
        return list(tokenizer.encode(text))[prefix:]


def _prefix(tokenizer: Any) -> Ids:
    start = getattr(tokenizer, "bos_token_id", None)
    if start is None:
        return np.zeros(0, dtype=np.int64)
    ids = tokenizer.encode("")
    return np.asarray(ids[:1] if list(ids[:1]) == [start] else [], dtype=np.int64)
