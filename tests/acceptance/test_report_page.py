"""A study's report in a browser: nothing is cut at three widths, and its numbers are those of verdicts.csv."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import dt_lens
from dt_lens.study import Study

pytestmark = pytest.mark.acceptance(minutes=2)

WIDTHS = (1280, 768, 390)
OUTSIDE = """() => Array.from(document.querySelectorAll("body *")).filter((one) => {
  const box = one.getBoundingClientRect();
  return box.width > 0 && box.right > innerWidth + 1 && !one.closest(".scroll, .canvas, details:not([open])");
}).map((one) => one.tagName + "." + one.className)"""
BROKEN = """() => Array.from(document.querySelectorAll("a[href]")).map((one) => one.getAttribute("href"))
  .filter((to) => !(to.startsWith("#") && document.getElementById(to.slice(1))))"""


CELLS = """(one) => Array.from(one.tBodies[0].rows).map(
  (row) => Array.from(row.cells).map((cell) => [cell.dataset.head, cell.dataset.value]))"""
# Where the first cell of the overview that leads somewhere is, and the id that it leads to.
CELL = """() => {
  const heat = (one) => one.data[0].type === "heatmap";
  const plot = Array.from(document.querySelectorAll(".js-plotly-plot")).find(heat);
  plot.scrollIntoView({ block: "start", behavior: "instant" });
  const box = plot.getBoundingClientRect(), layout = plot._fullLayout, links = plot.data[0].meta.links;
  const column = links[0].findIndex((one) => one);
  return {
    x: box.x + layout.xaxis._offset + layout.xaxis.d2p(column),
    y: box.y + layout.yaxis._offset + layout.yaxis.d2p(0),
    link: links[0][column],
  };
}"""
CLIPPED = """() => Array.from(document.querySelectorAll(".scroll table"))
  .filter((one) => one.scrollWidth > one.parentElement.clientWidth + 1).length"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    Study(dt_lens.load("tiny-gpt2"), folder, name="tiny-gpt2", matrices=["blocks.3.mlp.*"], windows=6, edits=1).run()
    return folder / "report.html"


@pytest.fixture
def opened(chromium: Any, report: Path) -> Any:
    """A function that opens the report at a width; the test fails if the page logged an error."""
    said: list[str] = []
    pages = []

    def at(width: int, **options: Any) -> Any:
        page = chromium.new_page(viewport={"width": width, "height": 900}, **options)
        pages.append(page)
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(report.as_uri())
        page.wait_for_selector("figure.plot .main-svg")
        return page

    yield at
    for page in pages:
        page.close()
    assert said == []


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_and_every_link_resolves(opened: Any, width: int) -> None:
    page = opened(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(BROKEN) == []
    # The title comes before the contents, and the verdict before both figures and numbers.
    top = [page.locator(one).first.bounding_box()["y"] for one in ("h1", ".verdict", "figure.plot")]
    assert top == sorted(top)
    if width < 700:
        assert page.locator("nav").bounding_box()["y"] > top[1]
    wide = page.locator("table.cards").first.evaluate("(one) => one.scrollWidth - one.closest('.scroll').clientWidth")
    assert wide <= 0, "the table of edits fits"
    page.set_viewport_size({"width": 500, "height": 900})
    page.wait_for_timeout(400)
    assert page.evaluate("document.documentElement.scrollWidth") <= 500


def test_the_numbers_are_those_of_the_csv(opened: Any, report: Path) -> None:
    page, verdicts = opened(1280), pd.read_csv(report.parent / "verdicts.csv")
    rows = [dict(row) for row in page.locator("#section-1 table").first.evaluate(CELLS)]
    assert len(rows) == len(verdicts)
    for row, kept in zip(rows, verdicts.to_dict("records"), strict=True):
        assert row["edit"].startswith(f"{kept['matrix']} sv {kept['sv']}") and row["verdict"] == kept["verdict"]
        for heading, name in (
            ("change of loss", "difference"),
            ("its control's change", "control_difference"),
            ("loss gained beyond the control", "damage_beyond_control"),
            ("q", "q"),
        ):
            assert float(row[heading]) == pytest.approx(kept[name], rel=1e-9)
    drawn = page.evaluate("document.querySelector('figure.plot .js-plotly-plot').calcdata[0].map((one) => one.x)")
    assert sorted(drawn) == pytest.approx(sorted(verdicts["difference"]))


def test_a_cell_leads_to_its_row_and_a_reader_may_choose_dark_colours(opened: Any) -> None:
    page = opened(1280, color_scheme="light")
    place = page.evaluate(CELL)
    page.mouse.move(place["x"], place["y"])
    page.wait_for_selector(".hoverlayer text")
    page.mouse.click(place["x"], place["y"])
    page.wait_for_selector("tr.found")
    row = page.locator("tr.found")
    assert row.count() == 1 and row.get_attribute("id") == place["link"] and row.is_visible()
    assert re.search(r"[+−]0\.\d\d", row.locator("td[data-head=towards], td[data-head=away]").first.inner_text())
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    after = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert before == "rgb(255, 255, 255)" and after == "rgb(21, 24, 29)"
    page.reload()
    page.wait_for_selector("figure.plot .main-svg")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == after, "it is remembered"


def test_print_clips_no_table(opened: Any) -> None:
    page = opened(1280)
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 680, "height": 900})
    assert page.evaluate(CLIPPED) == 0
