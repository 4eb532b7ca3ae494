"""What README and docs show works as written: Python blocks run, commands parse, excerpts and links are there."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A comment before a block says that it is an excerpt of a file, that it takes minutes, or why it is not run.
BLOCK = re.compile(r"(?:^<!-- (?P<note>[^\n]*) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)[^)]*\)")
TOCTREE = re.compile(r"^```\{toctree\}\n(?::[^\n]*\n)*(?P<entries>.*?)^```$", re.MULTILINE | re.DOTALL)
WIDTH = 120  # columns of prose; tables, links and code may be wider
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.md"))
OTHERS = [*NOTEBOOKS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
WRAPPED = [*PAGES, *OTHERS, *sorted((ROOT / "dt_lens" / "zoo").glob("*/CARD.md"))]


def of_page(page: Path) -> str:
    return page.relative_to(ROOT / "docs" if page.is_relative_to(ROOT / "docs") else ROOT).as_posix()


class Block(NamedTuple):
    note: str
    text: str
    line: int


def blocks(page: Path, kind: str) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found["kind"] == kind:
            yield Block(found["note"] or "", found["text"], text.count("\n", 0, found.start("text")) + 1)


def run(page: Path, slow: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a page's blocks one after the other, as a reader would, beside the repository's files; returns how many."""
    for name in ("docs", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "dt_lens_toy", raising=False)
    names: dict[str, object] = {"__name__": "page"}
    count = 0
    for block in blocks(page, "python"):
        if block.note.startswith(("not run: ", "excerpt: ")) or (block.note == "slow" and not slow):
            continue
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
        count += 1
    return count


# What has only commands, or only slow blocks, has nothing to run here.
@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_short_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = [b for b in blocks(page, "python") if not b.note]
    assert run(page, False, tmp_path, monkeypatch) == len(short)


@pytest.mark.acceptance(minutes=2)
@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_all_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not any(b.note == "slow" for b in blocks(page, "python")):
        pytest.skip("every block of this page is short")
    run(page, True, tmp_path, monkeypatch)


def test_there_are_blocks_of_every_kind() -> None:
    notes = [block.note.partition(":")[0] for page in PAGES for block in blocks(page, "python")]
    assert {"", "slow", "excerpt", "not run"} == set(notes) and notes.count("not run") <= 2


@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_excerpts_are_in_the_file_that_they_are_of(page: Path) -> None:
    for kind in ("python", "toml"):
        for block in blocks(page, kind):
            if not block.note.startswith("excerpt: "):
                continue
            there = (page.parent / block.note.removeprefix("excerpt: ")).read_text(encoding="utf-8").splitlines()
            for line in block.text.splitlines():
                kept = line.removesuffix(" ...").rstrip()
                assert kept.strip() in ("", "...") or kept in there, f"{page.name}: {line}"


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=of_page)
def test_commands_parse(page: Path) -> None:
    import typer

    from dt_lens.cli.app import app

    group = typer.main.get_command(app)
    lines = [line for block in blocks(page, "sh") for line in block.text.replace("\\\n", " ").splitlines()]
    for command in (part for line in lines for part in line.split("&&")):
        words = shlex.split(command, comments=True)
        if words[:1] == ["dt-lens"]:
            group.commands[words[1]].make_context(words[1], words[2:])  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=of_page)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_a_table_of_contents() -> None:
    """The site's sidebar is made of them; the front page begins it."""
    listed = {ROOT / "docs" / "index.md"}
    for page in (ROOT / "docs").rglob("*.md"):
        for entries in TOCTREE.findall(page.read_text(encoding="utf-8")):
            listed |= {(page.parent / f"{entry}.md").resolve() for entry in entries.split()}
    assert not {*PAGES, *OTHERS, *WRAPPED} - listed
    assert not [str(page) for page in listed if "*" not in page.name and not page.exists()]


@pytest.mark.parametrize("page", WRAPPED, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_is_wrapped(page: Path) -> None:
    """A line of prose that is wider has one word or link that cannot be broken."""
    fenced, wide = False, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        table = line.startswith("|") and line.endswith("|")
        if len(line) > WIDTH and not fenced and not table and " " in LINK.sub("", line).strip(" -*"):
            wide.append(number)
    assert not wide
