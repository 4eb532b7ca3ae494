"""A study's report in a browser: nothing is cut at three widths, and its numbers are those of verdicts.csv."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import dt_lens
from dt_lens.behaviour.agents.evaluation import terms_of_episodes
from dt_lens.report.factors import grid_panels
from dt_lens.report.page import Plot, Section, write_report
from dt_lens.study import Study
from dt_lens.study.atlas.figures import along_the_spectrum

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


# Where the plots of each figure lie, and the words of the figure; those of a plot's own axes are left out.
PANELS = """() => Array.from(document.querySelectorAll(".js-plotly-plot")).map((plot) => ({
  inside: plot.scrollWidth <= plot.closest(".canvas").clientWidth + 1,
  plots: Array.from(plot.querySelectorAll(".cartesianlayer .subplot .gridlayer, .cartesianlayer .subplot .plot"))
    .map((one) => one.getBoundingClientRect()).filter((box) => box.width > 0)
    .map((box) => [box.left, box.right, box.top, box.bottom]),
  words: Array.from(plot.querySelectorAll(".annotation-text")).map((one) => one.textContent),
  boxes: Array.from(plot.querySelectorAll(".annotation-text")).map((one) => one.getBoundingClientRect())
    .map((box) => [box.left, box.right, box.top, box.bottom]),
}))"""


def overlap(boxes: list[list[float]]) -> int:
    """How many pairs of boxes cover each other, by more than two pixels."""
    pairs = [(one, other) for i, one in enumerate(boxes) for other in boxes[:i]]
    return sum(min(a[1], b[1]) - max(a[0], b[0]) > 2 and min(a[3], b[3]) - max(a[2], b[2]) > 2 for a, b in pairs)


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with the two figures that have rows and columns of plots."""
    kinds = ("W_in", "W_out", "QK", "OV", "K")
    places = [(f"blocks.{layer}.{kind}", kind, layer, sv) for layer in range(3) for kind in kinds for sv in range(6)]
    table = pd.DataFrame(places, columns=["matrix", "kind", "layer", "sv"]).assign(head=None, q_value=1.0, sigma=1.0)
    table = table.assign(energy=1.0, damage=1.0, mean_return=900.0 + 10 * table["sv"])
    spectrum = along_the_spectrum(table, 1000.0, terms_of_episodes("E-v0", 1.0, 10))
    states = [(r, c, p, d) for r in range(5) for c in range(5) for p in "RGYB*" for d in "RGYB"]
    rows, columns, passengers, goals = zip(*states, strict=True)
    panels = {"passenger": passengers, "destination": goals}
    labels = [str(one) for one in states]
    grid = grid_panels(np.linspace(-1, 1, 500), rows, columns, panels, labels=labels, title="Taxi")
    sections = [Section("Grids", [Plot(spectrum), Plot(grid)])]
    return write_report(tmp_path_factory.mktemp("grids") / "grids.html", "Grids", sections)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_grid_of_plots_fits_the_page(chromium: Any, grids: Path, width: int) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 900})
    page.goto(grids.as_uri())
    page.wait_for_selector("figure.plot .main-svg")
    spectrum, grid = page.evaluate(PANELS)
    page.close()
    assert spectrum["inside"] and grid["inside"]
    assert overlap(spectrum["boxes"]) == overlap(grid["boxes"]) == 0
    for one in (spectrum, grid):
        assert all(left >= 0 and right <= width for left, right, _, _ in one["boxes"])
    assert {"W_in", "W_out", "QK", "OV", "K", "block 0", "block 1", "block 2"} == set(spectrum["words"])
    assert len(grid["words"]) == 20
