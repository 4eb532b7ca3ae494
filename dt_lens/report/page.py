"""Write a report: one self-contained HTML file that makes no network request."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import pandas as pd
import plotly.graph_objects as go

from dt_lens.arguments import atomic_write, local_path
from dt_lens.errors import DtLensError, a_type, as_written
from dt_lens.report.style import dark, light
from dt_lens.report.tables import Format, table_html
from dt_lens.version import __version__

__all__ = [
    "Block", "Chip", "Choice", "Folded", "Markup", "Note", "Plot", "Section", "Table", "Video", "Words", "write_report",
]  # fmt: skip


@dataclass(frozen=True)
class Note:
    """A paragraph set apart, with what a reader must know to read the numbers correctly."""

    text: str
    kind: Literal["note", "warning"] = "note"


@dataclass(frozen=True)
class Plot:
    """A plotly figure; its title and subtitle become the heading, with ``caption`` below them."""

    figure: go.Figure
    caption: str = ""


@dataclass(frozen=True)
class Choice:
    """Several figures in one place, one shown at a time, chosen by name from a list labelled ``label``."""

    figures: Mapping[str, go.Figure]
    label: str = "show"
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose columns a reader can sort; the arguments are those of ``tables.table_html``.

    Of more than ``MOST`` rows only the ``first`` are shown until the reader asks for all; of fewer, all, unless
    ``first`` says otherwise.
    """

    frame: pd.DataFrame
    caption: str = ""
    headings: Mapping[str, str] = field(default_factory=dict)
    formats: Mapping[str, str | Format] = field(default_factory=dict)
    intervals: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    first: int | None = None
    anchors: Sequence[str] = ()


@dataclass(frozen=True)
class Video:
    """An mp4 file, embedded in the page; with ``file=None``, the sentence ``reason`` in its place.

    ``poster`` is a JPEG file: the picture that stands there before the video plays.
    """

    file: Path | None
    caption: str = ""
    reason: str = ""
    poster: Path | None = None


@dataclass(frozen=True)
class Words:
    """Words and what they mean, as a list of definitions."""

    meanings: Mapping[str, str]


@dataclass(frozen=True)
class Chip:
    """A finding in the box at the top: what it is about, the finding in a word or two, and a colour for it.

    ``anchor`` is the id that the chip leads to. The colour is never alone: the word says the same.
    """

    title: str
    finding: str
    kind: Literal["yes", "no", "open", "none"] = "open"
    anchor: str = ""


@dataclass(frozen=True)
class Markup:
    """HTML that goes into the page unchanged; the code that makes it must escape data."""

    html: str


@dataclass(frozen=True)
class Folded:
    """Blocks behind a line of text, closed until the reader opens them."""

    title: str
    blocks: Sequence[Block]


Block: TypeAlias = "str | Note | Plot | Choice | Table | Video | Words | Markup | Folded | go.Figure | pd.DataFrame"


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it. A string is a paragraph with `` `code` `` and ``**bold**`` formatted.

    A section with ``picture`` may stand beside the verdict in place of its own: ``write_report(picture=...)``.
    """

    title: str
    blocks: Sequence[Block]
    picture: bool = False


def write_report(
    path: str | Path,
    title: str,
    sections: Sequence[Section],
    *,
    verdict: Sequence[str] = (),
    chips: Sequence[Chip] = (),
    picture: Sequence[Block] = (),
    below: Sequence[Block] = (),
    asked: Sequence[Block] = (),
    facts: Mapping[str, object] | None = None,
    command: str = "",
) -> Path:
    """Write one self-contained HTML file: plotly.js, figures, tables and videos are inside it.

    The answer stands first, then what was asked, then ``sections``, and the command last.

    Args:
        path: the file; its folder is made where there is none. A file already there is replaced at the very end, so a
            report that cannot be written leaves the old one whole.
        title: the page's title.
        sections: the page's contents, in order.
        verdict: a few sentences for the box at the top.
        chips: findings in that box, each a word or two on a colour.
        picture: blocks beside the verdict.
        below: blocks below the verdict, above the first section.
        asked: blocks of the section that says what was asked, above the facts.
        facts: names and values of what was run: model, environment, seed, versions.
        command: the command line that makes this report again.

    Returns:
        ``path``.

    Raises:
        DtLensError: if the file cannot be written (a full disk, a read-only folder, a folder of that name).
    """
    path = local_path(path, "path")
    for name, text in (("title", title), ("command", command)):
        if not isinstance(text, str):
            raise DtLensError(f"{name} is {as_written(text)}; it must be text.")
    if not isinstance(sections, list | tuple) or not all(isinstance(one, Section) for one in sections):
        raise DtLensError(f"sections is {as_written(sections)}; it must be a list of Section.")
    answer = _Answer(verdict, chips, picture, below)
    page = _page(title, sections, answer, asked, facts or {}, command)
    with atomic_write(path) as part:
        part.write_text(page, encoding="utf-8", errors="replace")
    return path


# The page may use only its own script, style and data: the browser refuses any request, whatever a label in the data
# says.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; media-src data:"
)


class _Answer(NamedTuple):
    """What stands at the top of the page."""

    verdict: Sequence[str]
    chips: Sequence[Chip]
    picture: Sequence[Block]
    below: Sequence[Block]


def _page(
    title: str,
    sections: Sequence[Section],
    answer: _Answer,
    asked: Sequence[Block],
    facts: Mapping[str, object],
    command: str,
) -> str:
    from plotly.offline import get_plotlyjs

    page = _Page()
    top = page.answer(answer)
    listed = "".join(f"<dt>{_text(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items())
    named = [(f"section-{number}", section) for number, section in enumerate(sections, 1)]
    contents: list[str] = []
    links: list[tuple[str, str]] = []
    if listed or asked:
        about = [*asked, Markup(f'<dl class="facts">{listed}</dl>')] if listed else asked
        contents.append(page.section(Section("What was asked", about), "asked"))
        links.append(("asked", "What was asked"))
    contents += [page.section(section, anchor) for anchor, section in named]
    links += [(anchor, section.title) for anchor, section in named]
    if command:
        contents.append(page.section(Section("To make this page again", [Markup(_command(command))]), "again"))
        links.append(("again", "To make this page again"))
    items = "".join(f'<li><a href="#{anchor}">{_text(said)}</a></li>' for anchor, said in links)
    own = resources.files("dt_lens.report")
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',  # or the browser would ask for one
        f"<title>{html.escape(title)}</title>",
        f"<style>\n{own.joinpath('page.css').read_text(encoding='utf-8')}</style>",
        # At once, or a page in other colours than the system's would flash.
        f"<script>\n{own.joinpath('first.js').read_text(encoding='utf-8')}</script>",
        '</head>\n<body>\n<div class="layout">',
        f'<header><div class="title"><h1>{_text(title)}</h1>',
        '<button type="button" id="theme" hidden>Dark</button></div>',
        top,
        "<noscript><p class='note warning'>The figures need JavaScript; the text and the tables do not.</p></noscript>",
        "</header>",
        f'<nav aria-label="Contents"><strong>Contents</strong><ol>{items}</ol></nav>' if items else "",
        "<main>",
        *contents,
        f"<footer>Written by dt-lens {html.escape(__version__)}. Everything it shows is in this file.</footer>",
        "</main>\n</div>",
    ]
    if page.figures:
        templates = {"light": light().to_plotly_json(), "dark": dark().to_plotly_json()}
        parts += [_data("templates", templates), *page.figures]
        parts.append(f"<script>{_safe_script(get_plotlyjs())}</script>")
    parts += [f"<script>\n{own.joinpath('page.js').read_text(encoding='utf-8')}</script>", "</body>\n</html>\n"]
    return "\n".join(part for part in parts if part)


def _command(command: str) -> str:
    return f'<div class="command"><pre>{html.escape(command)}</pre></div>'


class _Page:
    """Turns blocks into HTML, and collects the figures' data for the end of the page."""

    def __init__(self) -> None:
        self.figures: list[str] = []

    def answer(self, answer: _Answer) -> str:
        """The verdict, its chips and its picture, and what stands below them."""
        box = "".join(f"<p>{_text(sentence)}</p>" for sentence in answer.verdict)
        chips = "".join(_chip(chip) for chip in answer.chips)
        said = f'<strong class="head">Verdict</strong>{f"<ol class=chips>{chips}</ol>" if chips else ""}{box}'
        verdict = f'<div class="verdict">{said}</div>' if box or chips else ""
        shown = f'<div class="picture">{self.blocks(answer.picture)}</div>' if answer.picture else ""
        both = f'<div class="answer">{verdict}{shown}</div>' if verdict and shown else verdict + shown
        return "\n".join(part for part in (both, self.blocks(answer.below)) if part)

    def section(self, section: Section, anchor: str) -> str:
        return f'<section id="{anchor}">\n<h2>{_text(section.title)}</h2>\n{self.blocks(section.blocks)}\n</section>'

    def blocks(self, blocks: Sequence[Block]) -> str:
        return "\n".join(self.block(block) for block in blocks)

    def block(self, block: Block) -> str:
        """One block's HTML.

        Raises:
            DtLensError: for an object that is not a block.
        """
        kinds: dict[type, Callable[[Any], str]] = {
            str: lambda text: f"<p>{_text(text)}</p>",
            Note: lambda note: f'<div class="note {html.escape(note.kind)}">{_text(note.text)}</div>',
            Plot: lambda plot: self.plots({"": plot.figure}, "", plot.caption),
            go.Figure: lambda figure: self.plots({"": figure}, "", ""),
            Choice: lambda choice: self.plots(choice.figures, choice.label, choice.caption),
            Table: _table,
            pd.DataFrame: lambda frame: _table(Table(frame)),
            Video: _video,
            Words: _words,
            Markup: lambda markup: markup.html,
            Folded: lambda fold: (
                f"<details><summary>{_text(fold.title)}</summary>\n{self.blocks(fold.blocks)}\n</details>"
            ),
        }
        for kind, make in kinds.items():
            if isinstance(block, kind):
                return make(block)
        raise DtLensError(
            f"A report is made of text, notes, plots, tables and videos; {a_type(block)} is none of them."
        )

    def plots(self, figures: Mapping[str, go.Figure], label: str, caption: str) -> str:
        """The HTML of a figure, or of several to choose from."""
        if not figures:
            return f"<p>{_text(caption)}</p>" if caption else ""
        names = []
        for figure in figures.values():
            names.append(f"figure-{len(self.figures) + 1}")
            self.figures.append(_data(names[-1], _specification(figure)))
        options = "".join(
            f'<option value="{n}">{html.escape(str(f))}</option>' for n, f in zip(names, figures, strict=True)
        )
        choice = f'<label class="choice">{_text(label)} <select>{options}</select></label>' if label else ""
        words = f"<p>{_text(caption)}</p>" if caption else ""
        long = " long" if any((figure.layout.height or 0) > 900 for figure in figures.values()) else ""
        return (
            f'<figure class="plot{long}" data-figure="{names[0]}">{choice}'
            f'<figcaption><h3></h3><p class="about"></p>{words}</figcaption>'
            '<div class="canvas"><div role="img"></div></div>'
            '<p class="aside">This figure is wider than the page: it moves sideways.</p></figure>'
        )


MOST = 15  # rows of a table that are all shown
FIRST = 12  # of more, those that are shown until the reader asks for all


def _table(table: Table) -> str:
    caption = f"<figcaption><p>{_text(table.caption)}</p></figcaption>" if table.caption else ""
    if table.frame.empty:
        return f"<figure>{caption}<p>No rows.</p></figure>"
    rows = len(table.frame)
    first = table.first if table.first is not None else FIRST if rows > MOST else rows
    made = table_html(
        table.frame,
        headings=table.headings,
        formats=table.formats,
        intervals=table.intervals,
        anchors=table.anchors,
        first=first if first < rows else None,
    )
    more = f'<button type="button" class="all" hidden>Show all {rows:,} rows</button>' if first < rows else ""
    # On paper there is no button.
    more += f'<p class="cut">The first {first:,} of {rows:,} rows; the page on a screen has all.</p>' if more else ""
    return f'<figure class="data">{caption}<div class="scroll" tabindex="0">{made}</div>{more}</figure>'


def _video(video: Video) -> str:
    if video.file is None:
        return f'<div class="note">{_text(video.reason or "There is no video.")}</div>'
    try:
        content = _base64(video.file)
        poster = f' poster="data:image/jpeg;base64,{_base64(video.poster)}"' if video.poster else ""
    except OSError as error:
        return f'<div class="note warning">{_text(f"The video {video.file} cannot be read: {error.strerror}.")}</div>'
    caption = f"<figcaption><p>{_text(video.caption)}</p></figcaption>" if video.caption else ""
    source = f'<source type="video/mp4" src="data:video/mp4;base64,{content}">'
    return f"<figure><video controls loop muted playsinline preload='auto'{poster}>{source}</video>{caption}</figure>"


def _base64(file: Path) -> str:
    return base64.b64encode(Path(file).read_bytes()).decode("ascii")


def _words(words: Words) -> str:
    listed = "".join(f"<dt>{_text(word)}</dt><dd>{_text(meaning)}</dd>" for word, meaning in words.meanings.items())
    return f'<dl class="words">{listed}</dl>'


SIGNS = {"yes": "✓", "no": "✗", "open": "?", "none": "–"}


def _chip(chip: Chip) -> str:
    title = f'<a href="#{html.escape(chip.anchor)}">{_text(chip.title)}</a>' if chip.anchor else _text(chip.title)
    sign = f'<span aria-hidden="true">{SIGNS[chip.kind]}</span> '
    return f'<li><span class="chip {html.escape(chip.kind)}">{sign}{_text(chip.finding)}</span> {title}</li>'


def _text(text: str) -> str:
    """Escape text and format `` `code` `` and ``**bold**`` in it.

    >>> _text("`a<b` is **not** <i>")
    '<code>a&lt;b</code> is <strong>not</strong> &lt;i&gt;'

    A label in bold may hold either mark:

    >>> _text("**`** and ****** in `W_out`")
    '<strong>`</strong> and <strong>**</strong> in <code>W_out</code>'
    """
    out = []
    for number, part in enumerate(re.split(r"`((?:(?!\*\*)[^`\n])+)`", str(text))):
        escaped = html.escape(part)
        out.append(
            f"<code>{escaped}</code>" if number % 2 else re.sub(r"\*\*(.+?)\*\*(?!\*)", r"<strong>\1</strong>", escaped)
        )
    return "".join(out)


def _specification(figure: go.Figure) -> dict[str, Any]:
    """A figure as JSON values, without title and template.

    The title becomes HTML, which can wrap; the page holds the template in two colours.
    """
    made: dict[str, Any] = json.loads(figure.to_json())
    layout = made["layout"]
    layout.pop("template", None)
    title = layout.pop("title", None) or {}
    layout.setdefault("height", 450)  # plotly's own
    layout["margin"] = {"l": 60, "r": 20, "t": 70, "b": 50, **layout.get("margin", {})}
    if title.get("text"):  # the height that it took
        layout["height"] -= 30
        layout["margin"]["t"] = max(20, layout["margin"]["t"] - 30)
    about = (title.get("subtitle") or {}).get("text")
    return {"data": made["data"], "layout": layout, "title": _unmarked(title.get("text")), "about": _unmarked(about)}


def _unmarked(text: str | None) -> str:
    """Plotly's text without its markup."""
    return html.unescape(re.sub(r"<[^>]*>", " ", text or "")).strip()


def _data(name: str, values: Any) -> str:
    """JSON in a script element that is data; characters that could end the element are escaped."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    for character, code in (
        ("&", "\\u0026"),
        ("<", "\\u003c"),
        (">", "\\u003e"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    ):
        text = text.replace(character, code)
    return f'<script type="application/json" id="{name}">{text}</script>'


def _safe_script(script: str) -> str:
    """Escape ``</script`` in a script: it can only occur in strings, in which ``\\/`` is ``/``."""
    return re.sub(r"</(script)", r"<\\/\1", script, flags=re.IGNORECASE)
