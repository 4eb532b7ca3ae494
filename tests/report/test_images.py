"""Figures are saved in the format, and images with the pixels, that were asked for; what is missing is named."""

from __future__ import annotations

import os
import shutil
import struct
import sys
import types
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io
import pytest

from dt_lens.errors import DtLensError
from dt_lens.report.images import save_figure
from dt_lens.report.style import finish

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture
def figure() -> go.Figure:
    return finish(go.Figure(go.Scatter(x=[1, 2], y=[3, 5])), "A <title>", "and more", height=320, wide=900)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What kaleido is asked for; it draws nothing."""
    asked: list[dict[str, Any]] = []

    def calc_fig_sync(figure: dict[str, Any], opts: dict[str, Any], kopts: dict[str, Any]) -> bytes:
        asked.append({**opts, **kopts, "points": list(figure["data"][0]["y"])})
        return b"image"

    kaleido = types.ModuleType("kaleido")
    monkeypatch.setattr(kaleido, "calc_fig_sync", calc_fig_sync, raising=False)
    monkeypatch.setitem(sys.modules, "kaleido", kaleido)
    return asked


def failing(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    """Kaleido, with a browser that raises an error of this name."""

    def calc_fig_sync(*_: Any, **__: Any) -> bytes:
        raise type(name, (RuntimeError,), {})(message)

    kaleido = types.ModuleType("kaleido")
    monkeypatch.setattr(kaleido, "calc_fig_sync", calc_fig_sync, raising=False)
    monkeypatch.setitem(sys.modules, "kaleido", kaleido)


def test_an_image_has_the_pixels_that_were_asked_for(figure: go.Figure, tmp_path: Path) -> None:
    if find_spec("kaleido") is None:
        pytest.skip("kaleido is not installed (dt-lens[images])")
    if not (os.environ.get("BROWSER_PATH") or any(map(shutil.which, BROWSERS))):
        pytest.skip("there is no Chrome or Chromium to draw with")
    data = save_figure(figure, tmp_path / "made" / "figure.png", width=420, height=260, scale=1.5).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (630, 390)
    root = ET.fromstring(save_figure(figure, tmp_path / "figure.svg", width=420).read_text(encoding="utf-8"))
    assert root.tag.endswith("svg") and (root.get("width"), root.get("height")) == ("420", "320")
    assert "A <title>" in "".join(root.itertext())


def test_sizes_go_to_the_browser_and_the_figure_keeps_its_own(
    figure: go.Figure, drawn: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert save_figure(figure, tmp_path / "a.png").read_bytes() == b"image"
    save_figure(figure, str(tmp_path / "a.PDF"), width=300, height=200, scale=3)
    save_figure(go.Figure(go.Scatter(y=[1.0])), tmp_path / "b.svg")
    assert [(one["format"], one["width"], one["height"], one["scale"]) for one in drawn] == [
        ("png", 900, 320, 1.0),  # as wide as it must be to be read
        ("pdf", 300, 200, 3.0),
        ("svg", 700, 450, 1.0),
    ]
    assert drawn[0]["points"] == [3, 5] and not any(one["mathjax"] for one in drawn), "nothing is fetched"
    assert (figure.layout.width, figure.layout.height) == (None, 320)


def test_pages_and_data_need_neither_kaleido_nor_a_browser(
    figure: go.Figure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "kaleido", None)
    again = plotly.io.read_json(save_figure(figure, tmp_path / "a.json", width=500))
    assert list(again.data[0].y) == [3, 5] and again.layout.width == 500
    page = save_figure(figure, tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "Plotly.newPlot" in page and len(page) > 1_000_000, "holds plotly.js"
    assert 'src="http' not in page


def test_a_missing_kaleido_is_one_sentence(figure: go.Figure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(DtLensError, match=r"needs kaleido.*pip install 'dt-lens\[images\]'.*\.html or \.json\.$"):
        save_figure(figure, tmp_path / "a.png")
    # Before version 1 it had no such function.
    monkeypatch.setitem(sys.modules, "kaleido", types.ModuleType("kaleido"))
    with pytest.raises(DtLensError, match="needs kaleido"):
        save_figure(figure, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_missing_browser_is_one_sentence(figure: go.Figure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing(monkeypatch, "ChromeNotFoundError", "No browser found.")
    with pytest.raises(DtLensError, match=r"Chrome or Chromium browser, and none was found; install one.*BROWSER_PATH"):
        save_figure(figure, tmp_path / "a.svg")
    failing(monkeypatch, "BrowserFailedError", "The browser\nclosed.")
    with pytest.raises(DtLensError, match=r"a\.svg failed \(The browser closed\); name another"):
        save_figure(figure, tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"file": "a.gif"}, "ends in '.gif'; a figure is saved as .png, "),
        ({"file": "a"}, "ends in nothing"),
        ({"file": "a.html", "scale": 2}, "scale is for images"),
        ({"scale": 0}, "scale is 0; it must be a number above 0"),
        ({"scale": 90, "width": 4000}, "360000 x 28800 pixels, and 16000 is the most"),
        ({"width": 2.5}, "width"),
        ({"figure": {"data": []}}, "figure"),
    ],
)
def test_what_cannot_be_saved_is_one_sentence(
    given: dict[str, Any], said: str, figure: go.Figure, drawn: list[dict[str, Any]], tmp_path: Path
) -> None:
    options = {"figure": figure, "file": "a.png", **given}
    with pytest.raises(DtLensError) as error:
        save_figure(options.pop("figure"), tmp_path / options.pop("file"), **options)
    assert said in str(error.value) and not list(tmp_path.iterdir()) and not drawn
