"""Read text to train on from plain and HTML files, drop repeated paragraphs, and hold a part out."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from dt_lens.arguments import local_path
from dt_lens.errors import DtLensError, because

__all__ = ["Corpus", "read_corpus"]

BLOCK = 2_000  # characters (a few paragraphs) that are held out or trained on together
REPEATED = 20  # a paragraph of at least so many characters is dropped if it occurred before

_HIDDEN = {"script", "style", "svg", "head", "nav"}
_BREAKS = {
    "address", "blockquote", "body", "br", "center", "dd", "div", "dl", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "hr",
    "li", "ol", "p", "pre", "table", "td", "th", "title", "tr", "ul",
}  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Text in two parts that share no paragraph.

    Attributes:
        segments: text to train on, continuous within each segment but not from one to the next.
        held_out: text that is not trained on: paragraphs from random places, joined by blank lines.
        characters: the number read from each source, by its file name.
    """

    segments: tuple[str, ...]
    held_out: str
    characters: dict[str, int]


def read_corpus(sources: Iterable[str | Path], *, unwrap: bool, held_out: float, seed: int) -> Corpus:
    """Read the files, drop repeated paragraphs, and hold a part of the text out.

    Files are UTF-8; ``.gz`` and ``.dz`` files are unpacked, and of ``.html`` files the text is taken. A paragraph of 20
    characters or more that occurred before is dropped, so that menus and copies neither lower the held-out loss nor
    fill the training text. Blocks of about 2,000 characters are held out at random.

    Args:
        sources: files, in this order.
        unwrap: whether the lines of each paragraph of a plain text are joined, for text wrapped at a page's width.
        held_out: the share of blocks to hold out; at least one block is.
        seed: of the choice of blocks.

    Raises:
        DtLensError: if a file cannot be read as text, two have the same name, or there is too little text.
    """
    seen: set[str] = set()
    blocks: list[list[str]] = []
    characters: dict[str, int] = {}
    given = [sources] if isinstance(sources, str | Path) or not isinstance(sources, Iterable) else sources
    for file in [local_path(source, "sources") for source in given]:
        text, is_html = _read(file)
        if file.name in characters:
            raise DtLensError(
                f"Two of the sources are called {file.name}; rename one, since the record names them by file name."
            )
        characters[file.name] = len(text)
        blocks.append(_blocks(_paragraphs(text, unwrap and not is_html, seen)))
    count = sum(map(len, blocks))
    if count < 2:
        raise DtLensError(
            f"The sources hold {sum(characters.values()):,} characters; give at least {2 * BLOCK:,}, so that some "
            "can be held out."
        )
    kept_back = max(1, min(count - 1, round(held_out * count)))
    chosen = {int(i) for i in np.random.default_rng(seed).choice(count, kept_back, replace=False)}
    segments: list[str] = []
    held: list[str] = []
    at = 0
    for of_source in blocks:
        run: list[str] = []
        for block in of_source:
            if at in chosen:
                held.append(block)
                _flush(run, segments)
            else:
                run.append(block)
            at += 1
        _flush(run, segments)
    return Corpus(tuple(segments), "\n\n".join(held) + "\n", characters)


def _flush(run: list[str], segments: list[str]) -> None:
    if run:
        segments.append("\n\n".join(run))
        run.clear()


def _read(file: Path) -> tuple[str, bool]:
    """The text of a file, and whether the file is HTML."""
    packed = file.suffix in (".gz", ".dz")
    kind = Path(file.stem).suffix if packed else file.suffix
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if packed else data).decode("utf-8")
    except FileNotFoundError as error:
        raise DtLensError(f"The text file {str(file)!r} does not exist; check the path.") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DtLensError(
            f"{file} cannot be read as UTF-8 text: {because(error)}; give a text file in UTF-8."
        ) from error
    if kind.lower() not in (".html", ".htm"):
        return text, False
    parser = _Text()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts), True


class _Text(HTMLParser):
    """Collect the text of a page, one paragraph for each block element; line ends are kept in ``<pre>`` only."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self._step(tag, 1)

    def handle_endtag(self, tag: str) -> None:
        self._step(tag, -1)

    def _step(self, tag: str, by: int) -> None:
        if tag in _HIDDEN:
            self._hidden = max(0, self._hidden + by)
        elif tag == "pre":
            self._preformatted = max(0, self._preformatted + by)
        if tag in _BREAKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data if self._preformatted else re.sub(r"\s+", " ", data))


def _paragraphs(text: str, unwrap: bool, seen: set[str]) -> list[str]:
    """Paragraphs that are not in ``seen``, in order; the long ones among them are added to it."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n").expandtabs()):
        lines = paragraph.split() if unwrap else [line.rstrip() for line in paragraph.strip("\n").split("\n")]
        clean = (" " if unwrap else "\n").join(lines)
        plain = " ".join(clean.split())
        if not plain or plain in seen:
            continue
        if len(plain) >= REPEATED:
            seen.add(plain)
        found.append(clean if "\n" in clean else clean.strip())
    return found


def _blocks(paragraphs: Sequence[str]) -> list[str]:
    blocks: list[str] = []
    pending: list[str] = []
    size = 0
    for paragraph in paragraphs:
        pending.append(paragraph)
        size += len(paragraph) + 2
        if size >= BLOCK:
            blocks.append("\n\n".join(pending))
            pending, size = [], 0
    if pending:
        blocks.append("\n\n".join(pending))
    return blocks
