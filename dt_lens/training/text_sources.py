"""Read text to train on: plain and HTML files, what repeats left out, a part held out."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from dt_lens.errors import DtLensError, because

__all__ = ["Corpus", "read_corpus"]

BLOCK = 2_000  # characters that are held out or trained on together: some paragraphs
REPEATED = 20  # characters from which on a paragraph that was seen before is left out

_SILENT = {"script", "style", "svg", "head", "nav"}
_BREAKS = {
    "address", "blockquote", "body", "br", "center", "dd", "div", "dl", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "hr",
    "li", "ol", "p", "pre", "table", "td", "th", "title", "tr", "ul",
}  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Text in two parts that share no paragraph.

    Attributes:
        segments: what to train on; text is continuous within a segment and not from one to the next.
        held_out: what is kept back, a few paragraphs here and there, joined by blank lines.
        characters: of each source by its file name, as read.
    """

    segments: tuple[str, ...]
    held_out: str
    characters: dict[str, int]


def read_corpus(sources: Iterable[str | Path], *, unwrap: bool, held_out: float, seed: int) -> Corpus:
    """Read the files, leave out what repeats, and hold a part of it out.

    Files are UTF-8, ``.gz`` and ``.dz`` ones are unpacked, and of ``.html`` ones the text is taken. A paragraph of 20
    characters or more that came before is left out, so that menus and copies neither flatter the held-out loss nor
    fill the training. The held-out part is a random choice, by ``seed``, of blocks of about 2,000 characters.

    Args:
        sources: files, in this order.
        unwrap: whether lines of a plain text's paragraphs are joined, where line ends come from a page's width.
        held_out: the share of blocks to hold out, at least one.
        seed: of the choice.

    Raises:
        DtLensError: for a file that cannot be read as text, two of one name, or too little text to hold any out.
    """
    seen: set[str] = set()
    blocks: list[list[str]] = []
    characters: dict[str, int] = {}
    for file in map(Path, sources):
        text, is_html = _read(file)
        if file.name in characters:
            raise DtLensError(f"Two of the sources are called {file.name}; rename one, so that a record can name them.")
        characters[file.name] = len(text)
        blocks.append(_blocks(_paragraphs(text, unwrap and not is_html, seen)))
    count = sum(map(len, blocks))
    if count < 2:
        raise DtLensError(
            f"The sources hold {sum(characters.values()):,} characters; to train on some and hold some out takes at "
            f"least {2 * BLOCK:,}."
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
    """The text of a file, and whether it came as HTML."""
    packed = file.suffix in (".gz", ".dz")
    kind = Path(file.stem).suffix if packed else file.suffix
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if packed else data).decode("utf-8")
    except FileNotFoundError as error:
        raise DtLensError(f"There is no text file {str(file)!r}; check the path.") from error
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
    """What a page says, a paragraph for every block of it; line ends only where the page is preformatted."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._silent = 0
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self._step(tag, 1)

    def handle_endtag(self, tag: str) -> None:
        self._step(tag, -1)

    def _step(self, tag: str, by: int) -> None:
        if tag in _SILENT:
            self._silent = max(0, self._silent + by)
        elif tag == "pre":
            self._preformatted = max(0, self._preformatted + by)
        if tag in _BREAKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data if self._preformatted else re.sub(r"\s+", " ", data))


def _paragraphs(text: str, unwrap: bool, seen: set[str]) -> list[str]:
    """Paragraphs that are new, in order; the long ones among them are added to ``seen``."""
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
