"""The explorer as a user has it: the command, a browser, clicks through to a live run; and what is left afterwards."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dt_lens
from dt_lens import SingularEdit, WeightSVD, evaluate

pytestmark = pytest.mark.acceptance(minutes=2)
PATIENCE = 180_000  # milliseconds: the machine may be busy
LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are counted in /proc")


@contextmanager
def explorer(model: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, and the address that it prints; it is ended by SIGTERM."""
    command = [sys.executable, "-m", "dt_lens", "explore", model, "--no-browser", "--quiet", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", line)
            assert found, line + (process.stderr.read() if process.stderr and process.poll() is not None else "")
            yield process, found[0]
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                process.kill()


def workers_of(process: int) -> list[int]:
    """The processes of tabs that a server has."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            words = (stat.parent / "cmdline").read_text()
        except (OSError, ValueError):
            continue
        if parent == process and "spawn_main" in words:
            found.append(int(stat.parent.name))
    return found


def until(true: Callable[[], Any], seconds: float) -> bool:
    """Whether something becomes true in time."""
    begin = time.monotonic()
    while not true():
        if time.monotonic() - begin > seconds:
            return False
        time.sleep(0.2)
    return True


class Tab:
    """A page of the explorer that notes what goes wrong."""

    def __init__(self, context: Any) -> None:
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.wrong: list[str] = []
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda r: self.wrong.append(r.url) if "127.0.0.1" not in r.url.split("?")[0] else None)

    def click_cell(self, figure: str, x: int, y: int) -> None:
        """Click the cell of a heatmap at its column and row."""
        at = self.page.evaluate(
            """([id, x, y]) => {
                const gd = document.querySelector(`#${id} .js-plotly-plot`), f = gd._fullLayout;
                const top = f.yaxis._offset + f.yaxis.d2p(y);
                window.scrollTo(0, gd.getBoundingClientRect().y + window.scrollY + top - 300);
                const r = gd.getBoundingClientRect();
                return [r.x + f.xaxis._offset + f.xaxis.d2p(x), r.y + top];
            }""",
            [figure, x, y],
        )
        self.page.mouse.click(*at)

    def numbers(self, figure: str) -> np.ndarray[Any, Any]:
        """The numbers that a heatmap draws; NaN where it draws none."""
        self.page.wait_for_function(f"document.querySelector('#{figure} .js-plotly-plot')?.calcdata")
        traces = self.page.evaluate(f"""() => document.querySelector('#{figure} .js-plotly-plot').calcdata
            .map((cd) => Array.from(cd[0].z, (row) => Array.from(row, (v) => v === undefined ? null : v)))""")
        grids = [np.array(grid, dtype=float) for grid in traces]
        return np.fmax.reduce(grids)

    def ticks(self, figure: str, axis: str) -> list[str]:
        """The labels of an axis."""
        return self.page.evaluate(f"document.querySelector('#{figure} .js-plotly-plot')._fullLayout.{axis}.ticktext")  # type: ignore[no-any-return]

    def wait_for_end(self) -> str:
        """Wait until a run has ended, and return what the page says of it."""
        self.page.wait_for_function(
            "/^(Finished|Stopped)|failed|error|must|expected/.test(document.querySelector('#live-said').textContent)"
        )
        return str(self.page.inner_text("#live-said"))

    def summary(self) -> Any:
        return json.loads(self.page.get_attribute("#live-table", "data-summary"))


def status(address: str, **headers: str) -> int:
    """The status of a request from outside the browser."""
    request = urllib.request.Request(
        address, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def refuses_strangers(address: str) -> None:
    home = address.partition("?")[0]
    for path in ("", "_dash-layout", "_dash-dependencies", "assets/runs.js", "run/a/stream", "?token=wrong"):
        assert status(home + path) == 403, path
    assert status(address, Host="evil.example") == 421
    assert status(address, Host="0.0.0.0") == 421


def edit_of(tab: Tab, cell: tuple[str, str]) -> tuple[str, int]:
    """Click through from a cell of the overview to an edit; gives the matrix and the direction."""
    rows, columns = tab.ticks("overview", "yaxis"), tab.ticks("overview", "xaxis")
    tab.click_cell("overview", columns.index(cell[1]), rows.index(cell[0]))
    tab.page.wait_for_selector("#heatmap .nsewdrag")
    tab.numbers("heatmap")
    tab.click_cell("heatmap", 0, 1)
    tab.page.wait_for_function("/sv 1$/.test(document.querySelector('#direction h2')?.textContent)")
    heading = tab.page.inner_text("#direction h2")
    matrix, _, sv = heading.partition(", sv ")
    tab.page.click("text=Edit this direction")
    tab.page.click("#edit-add")
    tab.page.wait_for_selector("#edit-code")
    return matrix, int(sv)


@LINUX
def test_an_agent_is_explored(chromium: Any, tmp_path: Path) -> None:
    with explorer("hopper", "--matrices", "blocks.0.*") as (process, address):
        refuses_strangers(address)
        model = dt_lens.load("hopper", check=False)
        svd = WeightSVD(model)
        context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        tab = Tab(context)
        page = tab.page
        page.goto(address)
        page.wait_for_selector("#overview .nsewdrag")
        assert "token" not in page.url

        table = svd.scan("blocks.0.*")
        drawn, rows, columns = tab.numbers("overview"), tab.ticks("overview", "yaxis"), tab.ticks("overview", "xaxis")
        best = table.assign(size=table["cosine"].abs()).groupby(["matrix", "side", "embedding"])["size"].max()
        assert np.isfinite(drawn).sum() == len(best)
        at = drawn[rows.index("0 W_out"), columns.index("action_out")]
        assert at == best["blocks.0.mlp.W_out", "write", "action_out"]
        assert sorted(drawn[np.isfinite(drawn)]) == sorted(best)

        for x, y in ((3, 3), (1270, 5), (640, 890)):  # clicks on nothing
            page.mouse.click(x, y)
        assert edit_of(tab, ("0 W_out", "action_out")) == ("blocks.0.mlp.W_out", 1)
        page.go_back()
        page.wait_for_selector("#direction h2")
        cosines = svd.cosines("blocks.0.mlp.W_out", "action_out", k=24).to_numpy()
        assert np.array_equal(tab.numbers("heatmap"), cosines)
        shown = page.inner_text("#direction table")
        for label in svd.top("blocks.0.mlp.W_out", "action_out", k=2).query("sv == 1")["label"]:
            assert label in shown
        page.go_forward()

        edit = SingularEdit(model, "blocks.0.mlp.W_out", sv=1, value="zero")
        page.wait_for_selector("#edit-code")
        assert (
            eval(page.inner_text("#edit-code"), {"SingularEdit": SingularEdit, "model": model}).to_dict()
            == edit.to_dict()
        )
        assert f"{edit.energy:.4g}" in page.inner_text("#edits-panel table")
        with page.expect_download() as download:
            page.click("#edit-save")
        download.value.save_as(tmp_path / "edit.json")
        assert json.loads((tmp_path / "edit.json").read_text()) == [edit.to_dict()]

        page.click("text=Run them live")
        page.wait_for_selector("#live-edits pre")
        page.fill("#live-units", "2")
        page.fill("#live-steps", "-7")
        page.keyboard.press("Tab")
        page.click("#live-start")
        assert "steps of an episode must be a whole number above 0, or empty; it is -7" in tab.wait_for_end()
        page.fill("#live-steps", "90")
        page.keyboard.press("Tab")
        page.click("#live-start")
        page.wait_for_selector("#scene-edited svg line", state="attached")
        assert tab.wait_for_end().startswith("Finished")
        found = tab.summary()
        base = evaluate(model, episodes=2, seed=0, max_steps=90)
        with edit:
            edited = evaluate(model, episodes=2, seed=0, max_steps=90)
        with edit.control(0):
            control = evaluate(model, episodes=2, seed=0, max_steps=90)
        assert base.lengths.max() <= 90
        means = {"unedited": base.mean, "edited": edited.mean, "control": control.mean}
        assert {arm: one["mean"] for arm, one in found["means"].items()} == means
        assert [row["difference"] for row in found["compared"]] == [
            edited.compare(base).difference, control.compare(base).difference, edited.compare(control).difference,
        ]  # fmt: skip

        page.fill("#live-units", "200")
        page.fill("#live-steps", "")
        page.keyboard.press("Tab")
        page.click("#live-start")
        page.wait_for_selector("#scene-edited svg line", state="attached")
        page.click("#live-stop")
        assert tab.wait_for_end() == "Stopped."

        other = Tab(context)  # a second tab has edits of its own, and a process of its own
        other.page.goto(address.partition("?")[0] + "live")
        other.page.wait_for_selector("#live-edits .note")
        other.page.click("#live-start")
        assert "no edit" in _said(other)
        assert len(workers_of(process.pid)) == 2
        page.click("#live-start")
        page.wait_for_selector("#scene-edited svg line", state="attached")
        page.close()  # in the middle of a run
        assert until(lambda: len(workers_of(process.pid)) == 1, 30)
        assert tab.wrong == [] and other.wrong == []
        left = workers_of(process.pid)
        context.close()
    assert process.returncode == 0
    assert until(lambda: not any(Path(f"/proc/{one}").exists() for one in left), 10)


def _said(tab: Tab) -> str:
    tab.page.wait_for_function("/no edit/.test(document.querySelector('#live-said').textContent)")
    return str(tab.page.inner_text("#live-said"))


@LINUX
def test_a_language_model_is_explored(chromium: Any) -> None:
    with explorer("tiny-gpt2", "--matrices", "blocks.3.mlp.*") as (process, address):
        refuses_strangers(address)
        model = dt_lens.load("tiny-gpt2", check=False)
        context = chromium.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
        tab = Tab(context)
        page = tab.page
        page.goto(address)
        page.wait_for_selector("#overview .nsewdrag")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert edit_of(tab, ("3 W_out", "token_out")) == ("blocks.3.mlp.W_out", 1)
        page.click("text=Read a text with them")
        page.wait_for_selector("#live-edits pre")
        text = "The king went out to sea. He saw a ship, and on the ship there was a light that he did not know."
        page.fill("#text-prompt", "The king went")
        page.fill("#text-tokens", "5")
        page.fill("#text-own", text)
        page.keyboard.press("Tab")
        page.click("#text-start")
        assert tab.wait_for_end().startswith("Finished")

        edit = SingularEdit(model, "blocks.3.mlp.W_out", sv=1, value="zero")
        arms = {"unedited": None, "edited": edit}
        shown = json.loads(page.get_attribute("#text-next", "data-next"))
        losses = json.loads(page.get_attribute("#text-losses", "data-losses"))
        written = page.locator("#text-continued .written").all_inner_texts()
        for place, (arm, evaluation) in enumerate(zip(arms, evaluate(model, [text], edits=arms.values()), strict=True)):
            assert losses[arm]["loss"] == evaluation.mean
            with arms[arm] or _nothing():
                logits = model(model.to_tokens("The king went"))
                p = getattr(logits, "logits", logits)[0, -1].double().softmax(-1)
                whole = model.generate("The king went", max_new_tokens=5)
            assert [value for _, value in shown[arm]] == pytest.approx(p.topk(10).values.tolist(), rel=1e-5)
            assert written[place].split() == whole.split()
        assert page.locator("#text-coloured span").count() > 10

        page.click("text=Live")
        page.wait_for_selector("#live-start")
        page.fill("#live-units", "4")
        page.keyboard.press("Tab")
        page.click("#live-start")
        page.wait_for_function("document.querySelector('#live-table').dataset.summary")
        assert tab.wait_for_end().startswith("Finished")
        base, edited = evaluate(model, edits=[None, edit], windows=4)
        found = tab.summary()["compared"][0]
        assert (found["difference"], found["p"]) == (edited.compare(base).difference, edited.compare(base).p_value)
        for path in ("", "matrix", "edit", "live", "text"):
            page.goto(address.partition("?")[0] + path)
            page.wait_for_selector("#page h1")
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), path
        assert tab.wrong == []
        context.close()
        assert until(lambda: not workers_of(process.pid), 30)
    assert process.returncode == 0


@contextmanager
def _nothing() -> Iterator[None]:
    yield
