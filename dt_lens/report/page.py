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
from typing import Any, Literal, TypeAlias

import pandas as pd
import plotly.graph_objects as go

from dt_lens.arguments import atomic_write, local_path
from dt_lens.errors import DtLensError, a_type, as_written
from dt_lens.report.style import dark, light
from dt_lens.report.tables import Format, table_html
from dt_lens.version import __version__

__all__ = ["Block", "Choice", "Folded", "Markup", "Note", "Plot", "Section", "Table", "Video", "write_report"]


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
    """A table whose columns a reader can sort; the arguments are those of ``tables.table_html``."""

    frame: pd.DataFrame
    caption: str = ""
    headings: Mapping[str, str] = field(default_factory=dict)
    formats: Mapping[str, str | Format] = field(default_factory=dict)
    intervals: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Video:
    """An mp4 file, embedded in the page; with ``file=None``, the sentence ``reason`` in its place."""

    file: Path | None
    caption: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Markup:
    """HTML that goes into the page unchanged; the code that makes it must escape data."""

    html: str


@dataclass(frozen=True)
class Folded:
    """Blocks behind a line of text, closed until the reader opens them."""

    title: str
    blocks: Sequence[Block]


Block: TypeAlias = "str | Note | Plot | Choice | Table | Video | Markup | Folded | go.Figure | pd.DataFrame"


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it. A string is a paragraph with `` `code` `` and ``**bold**`` formatted."""

    title: str
    blocks: Sequence[Block]


def write_report(
    path: str | Path,
    title: str,
    sections: Sequence[Section],
    *,
    verdict: Sequence[str] = (),
    facts: Mapping[str, object] | None = None,
    command: str = "",
) -> Path:
    """Write one self-contained HTML file: plotly.js, figures, tables and videos are inside it.

    Args:
        path: the file; its folder is made where there is none. A file already there is replaced at the very end, so a
            report that cannot be written leaves the old one whole.
        title: the page's title.
        sections: the page's contents, in order.
        verdict: a few sentences for the box at the top.
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
    page = _page(title, sections, verdict, facts or {}, command)
    with atomic_write(path) as part:
        part.write_text(page, encoding="utf-8", errors="replace")
    return path


# The page may use only its own script, style and data: the browser refuses any request, whatever a label in the data
# says.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; media-src data:"
)


def _page(
    title: str, sections: Sequence[Section], verdict: Sequence[str], facts: Mapping[str, object], command: str
) -> str:
    from plotly.offline import get_plotlyjs

    page = _Page()
    contents = [page.section(section, f"section-{number}") for number, section in enumerate(sections, 1)]
    links = "".join(f'<li><a href="#section-{n}">{_text(s.title)}</a></li>' for n, s in enumerate(sections, 1))
    box = "".join(f"<p>{_text(sentence)}</p>" for sentence in verdict)
    listed = "".join(f"<dt>{_text(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items())
    own = resources.files("dt_lens.report")
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',  # or the browser would ask for one
        f"<title>{html.escape(title)}</title>",
        f"<style>\n{own.joinpath('page.css').read_text(encoding='utf-8')}</style>",
        '</head>\n<body>\n<div class="layout">',
        f'<nav aria-label="Contents"><strong>Contents</strong><ol>{links}</ol></nav>' if links else "",
        f"<main>\n<header><h1>{_text(title)}</h1>",
        f'<div class="verdict"><strong class="head">Verdict</strong>{box}</div>' if box else "",
        f'<dl class="facts">{listed}</dl>' if listed else "",
        f'<div class="command"><p>To make this report again:</p><pre>{html.escape(command)}</pre></div>'
        if command
        else "",
        "<noscript><p class='note warning'>The figures need JavaScript; the text and the tables do not.</p></noscript>",
        "</header>",
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


class _Page:
    """Turns blocks into HTML, and collects the figures' data for the end of the page."""

    def __init__(self) -> None:
        self.figures: list[str] = []

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
            '<div class="canvas"><div role="img"></div></div></figure>'
        )


def _table(table: Table) -> str:
    caption = f"<figcaption><p>{_text(table.caption)}</p></figcaption>" if table.caption else ""
    if table.frame.empty:
        return f"<figure>{caption}<p>No rows.</p></figure>"
    made = table_html(table.frame, headings=table.headings, formats=table.formats, intervals=table.intervals)
    long = " long" if len(table.frame) > 15 else ""
    return f'<figure class="data{long}">{caption}<div class="scroll" tabindex="0">{made}</div></figure>'


def _video(video: Video) -> str:
    if video.file is None:
        return f'<div class="note">{_text(video.reason or "There is no video.")}</div>'
    try:
        content = base64.b64encode(Path(video.file).read_bytes()).decode("ascii")
    except OSError as error:
        return f'<div class="note warning">{_text(f"The video {video.file} cannot be read: {error.strerror}.")}</div>'
    caption = f"<figcaption><p>{_text(video.caption)}</p></figcaption>" if video.caption else ""
    source = f'<source type="video/mp4" src="data:video/mp4;base64,{content}">'
    return f"<figure>{caption}<video controls loop muted playsinline preload='auto'>{source}</video></figure>"


def _text(text: str) -> str:
    """Escape text and format `` `code` `` and ``**bold**`` in it.

    >>> _text("`a<b` is **not** <i>")
    '<code>a&lt;b</code> is <strong>not</strong> &lt;i&gt;'
    """
    out = []
    for number, part in enumerate(re.split(r"`([^`\n]+)`", str(text))):
        escaped = html.escape(part)
        out.append(
            f"<code>{escaped}</code>" if number % 2 else re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped)
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
    layout["margin"] = {"l": 60, "r": 20, "t": 70, "b": 50, **layout.get("margin", {})}
    if title.get("text"):  # the height that it took
        layout["height"] = layout.get("height", 450) - 30
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
