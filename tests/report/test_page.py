"""The report is one file, makes no request, escapes what comes from data, and replaces the old one as a whole."""

from __future__ import annotations

import base64
import json
import os
import resource
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

from dt_lens.errors import DtLensError
from dt_lens.report import heatmaps
from dt_lens.report.page import (
    Block,
    Chip,
    Choice,
    Folded,
    Note,
    Plot,
    Section,
    Table,
    Video,
    Words,
    write_report,
)
from dt_lens.report.tables import anchor_of

HOSTILE = "</script><script>alert(1)</script><img src=http://example.org/x onerror=alert(2)>&\"'"
VOID_TAGS = {"meta", "link", "img", "source", "br", "input", "hr"}


class Reader(HTMLParser):
    """Every element, checked to be closed in order; the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.words += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)


def blocks(word: str) -> list[Block]:
    heat = heatmaps.scan_heatmap(pd.DataFrame([[0.1, -0.4]], columns=[word, "b"]), matrix=word)
    return [
        word,
        Note(word, "warning"),
        Plot(heat, caption=word),
        go.Figure(go.Bar(x=[word], y=[1]), layout={"title": word}),
        Choice({word: heat, "other": heat}, label=word, caption=word),
        Table(pd.DataFrame({"matrix": [word], word: [1.0]}), caption=word),
        pd.DataFrame({"a": []}),
        Video(None, word, word),
        Folded(word, [word, heat]),
    ]


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def test_everything_is_in_the_file_and_nothing_is_requested(tmp_path: Path) -> None:
    video = tmp_path / "v.mp4"
    video.write_bytes(b"\x00film")
    made = write_report(
        tmp_path / "new" / "folder" / "report.html",
        "A title",
        [Section("One", blocks("word")), Section("Two", [Video(video, "Left and right.")])],
        verdict=["First.", "Second.", "Third."],
        facts={"model": "hopper", "seed": 0},
        command="dt-lens study hopper --seed 0",
    )
    page = read(made)
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), f"{tag} requests {value}"
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None and "default-src 'none'" in policy and "http" not in policy
    css = made.read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in css and "@import" not in css
    source = next(a["src"] for t, a in page.tags if t == "source")
    assert source is not None and base64.b64decode(source.split(",")[1]) == b"\x00film"
    assert sum("plotly.js v" in script for script in page.scripts) == 1
    for words in ("First.", "Third.", "hopper", "dt-lens study hopper --seed 0", "One", "Two"):
        assert words in page.words
    assert {a["id"] for t, a in page.tags if t == "section"} == {"asked", "section-1", "section-2", "again"}
    assert [a["href"] for t, a in page.tags if t == "a"] == ["#asked", "#section-1", "#section-2", "#again"]
    words = page.words
    assert words.index("First.") < words.index("What was asked") < words.index("Left and right.")
    assert words.index("Left and right.") < words.rindex("dt-lens study hopper"), "the command comes last"


def test_nothing_from_the_data_becomes_markup(tmp_path: Path) -> None:
    def made(word: str) -> Reader:
        path = write_report(
            tmp_path / "r.html", word, [Section(word, blocks(word))], verdict=[word], facts={word: word}, command=word
        )
        return read(path)

    harmless, hostile = made("word"), made(HOSTILE)
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert not any("onerror" in attributes for _, attributes in hostile.tags)
    assert hostile.words.count("alert(1)") > 10, "it is shown as text"


def test_figures_are_whole_and_their_titles_are_words(tmp_path: Path) -> None:
    page = read(write_report(tmp_path / "r.html", "t", [Section("s", blocks("a<b"))]))
    places = [a for t, a in page.tags if t == "figure" and "data-figure" in a]
    held = {
        a["id"]: text
        for (t, a), text in zip([x for x in page.tags if x[0] == "script"], page.scripts, strict=True)
        if a.get("id")
    }
    assert len(places) == 4 and len(held) == 1 + 5
    first = json.loads(held[places[0]["data-figure"] or ""])
    assert first["title"] == "a<b" and first["about"].startswith("cosine of each")
    assert "template" not in first["layout"] and "title" not in first["layout"]
    assert json.loads(held["templates"]).keys() == {"light", "dark"}
    assert first["data"][0]["type"] == "heatmap"


def test_without_figures_plotly_stays_out(tmp_path: Path) -> None:
    made = write_report(tmp_path / "r.html", "t", [Section("s", ["text with `code` and **weight**"])])
    assert made.stat().st_size < 50_000
    page = read(made)
    assert page.count("strong") == 2 and page.count("code") == 1  # the other strong heads the contents


def test_the_same_report_is_the_same_bytes(tmp_path: Path) -> None:
    one = write_report(tmp_path / "a.html", "t", [Section("s", blocks("w"))]).read_bytes()
    two = write_report(tmp_path / "b.html", "t", [Section("s", blocks("w"))]).read_bytes()
    assert one == two


def test_a_missing_video_is_a_sentence(tmp_path: Path) -> None:
    sections = [Section("s", [Video(None, reason="No OpenGL here."), Video(tmp_path / "missing.mp4")])]
    page = read(write_report(tmp_path / "r.html", "t", sections))
    assert "No OpenGL here." in page.words and "missing.mp4 cannot be read" in page.words and page.count("video") == 0


def test_a_long_table_shows_its_first_rows_and_a_link_leads_to_each(tmp_path: Path) -> None:
    rows = pd.DataFrame({"matrix": [f"m{i}" for i in range(20)], "x": range(20)})
    anchors = [anchor_of("row", i) for i in range(20)]
    page = read(write_report(tmp_path / "r.html", "t", [Section("s", [Table(rows, anchors=anchors), Table(rows[:3])])]))
    found = [a for t, a in page.tags if t == "tr" and a.get("id")]
    assert [a["id"] for a in found] == anchors
    assert [a.get("class") for a in found] == [None] * 12 + ["more"] * 8
    assert "Show all 20 rows" in page.words and page.words.count("Show all") == 1
    assert page.words.count("The first 12 of 20 rows; the page on a screen has all.") == 1, "for paper"
    with pytest.raises(DtLensError, match="20 rows and 1 anchors"):
        write_report(tmp_path / "r.html", "t", [Section("s", [Table(rows, anchors=["a"])])])


def test_a_cell_of_several_lines_a_poster_and_a_chip(tmp_path: Path) -> None:
    film, poster = tmp_path / "v.mp4", tmp_path / "v.jpg"
    film.write_bytes(b"film")
    poster.write_bytes(b"picture")
    made = write_report(
        tmp_path / "r.html",
        "t",
        [Section("s", [Table(pd.DataFrame({"a": ["one\n<two>"]})), Words({"arm": "a <version>"})])],
        chips=[Chip("A claim", "not supported", "no", "section-1")],
        picture=[Video(film, poster=poster)],
    )
    text, page = made.read_text(encoding="utf-8"), read(made)
    assert "one<small>&lt;two&gt;</small>" in text and "<dt>arm</dt><dd>a &lt;version&gt;</dd>" in text
    shown = next(a["poster"] for t, a in page.tags if t == "video")
    assert shown is not None and base64.b64decode(shown.split(",")[1]) == b"picture"
    assert 'class="chip no"' in text and "not supported" in page.words
    assert page.words.index("A claim") < page.words.index("one")


def test_an_object_that_is_not_a_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DtLensError, match="int is none of them"):
        write_report(tmp_path / "r.html", "t", [Section("s", [3])])  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_report_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("the old one")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DtLensError, match=r"report\.html cannot be written: .*make room\.$"):
            write_report(path, "t", [Section("s", blocks("w"))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [path], "no half-written file stays behind"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DtLensError, match="cannot be written"):
        write_report(tmp_path / "r.html", "t", [])


def test_a_file_where_a_folder_should_be_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DtLensError, match="cannot be written"):
        write_report(tmp_path / "file" / "r.html", "t", [])
    (tmp_path / "folder").mkdir()
    with pytest.raises(DtLensError, match="cannot be written"):
        write_report(tmp_path / "folder", "t", [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
