"""Save a figure as an image for a paper, as a page, or as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from dt_lens.arguments import atomic_write, is_finite_number, local_path, require_offers
from dt_lens.errors import DtLensError, because
from dt_lens.report.options import LARGEST, sized

__all__ = ["save_figure"]

IMAGES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
WIDTH, HEIGHT = 700, 450  # plotly's own


def save_figure(
    figure: go.Figure,
    file: str | Path,
    *,
    width: int | None = None,
    height: int | None = None,
    scale: float | None = None,
) -> Path:
    """Save a figure in the format that the file's ending says.

    ``.png``, ``.svg``, ``.pdf``, ``.jpg`` and ``.webp`` need kaleido (``pip install 'dt-lens[images]'``) and a Chrome
    or Chromium browser, which draws the figure; no request leaves the machine, so formulas of MathJax stay as they are
    written. ``.html`` is a page of its own that holds plotly.js, and ``.json`` is read by ``plotly.io.read_json``; both
    need nothing more.

    Args:
        figure: a plotly figure, such as those of ``plot_spectrum``.
        file: its folder is made where there is none.
        width: in pixels; by default the figure's own, else 700, or what it needs to be read if that is more.
        height: in pixels; by default the figure's own, else 450.
        scale: an image has ``scale`` times ``width`` by ``scale`` times ``height`` pixels; 2 is for a dense screen or a
            printed page. 1 by default.

    Returns:
        the file.

    Raises:
        DtLensError: for another ending, a size out of range, a file that cannot be written, and if kaleido or a browser
            is missing.
    """
    require_offers(figure, "figure", "a plotly figure", "to_json", "to_html", "layout")
    path = local_path(file, "file")
    kind = path.suffix.lower()
    if kind not in (*IMAGES, ".html", ".json"):
        raise DtLensError(
            f"{path} ends in {repr(kind) if kind else 'nothing'}; a figure is saved as {', '.join(IMAGES)}, .html or "
            ".json."
        )
    if scale is not None and not (is_finite_number(scale) and 0 < scale <= 100):
        raise DtLensError(f"scale is {scale!r}; it must be a number above 0, such as 2.")
    if scale is not None and kind not in IMAGES:
        raise DtLensError(f"scale is for images, and {path} is not one; leave it out.")
    figure = sized(go.Figure(figure), width, height)  # a copy: the caller's keeps its size
    drawn = _image(figure, path, kind, 1.0 if scale is None else float(scale)) if kind in IMAGES else b""
    with atomic_write(path) as part:
        if kind == ".html":
            part.write_text(figure.to_html(include_plotlyjs=True), encoding="utf-8")
        elif kind == ".json":
            part.write_text(figure.to_json(), encoding="utf-8")
        else:
            part.write_bytes(drawn)
    return path


def _image(figure: go.Figure, path: Path, kind: str, scale: float) -> bytes:
    """The figure as the bytes of an image file."""
    width, height = (figure.layout.width or _least_width(figure)), (figure.layout.height or HEIGHT)
    if scale * max(width, height) > LARGEST:
        raise DtLensError(
            f"{path} would have {scale * width:.0f} x {scale * height:.0f} pixels, and {LARGEST} is the most on a "
            "side; give a smaller width, height or scale."
        )
    try:
        from kaleido import calc_fig_sync
    except ImportError as error:  # not installed, or one before version 1
        raise DtLensError(
            f"Saving {path} needs kaleido, which is not installed; run pip install 'dt-lens[images]', or save the "
            "figure as .html or .json."
        ) from error
    options = {"format": kind[1:], "width": width, "height": height, "scale": scale}
    try:
        # MathJax would be fetched from the network, and no figure here has formulas.
        drawn: bytes = calc_fig_sync(figure.to_dict(), opts=options, kopts={"mathjax": False})
    except Exception as error:  # the browser's, its driver's, and time-outs
        if type(error).__name__ == "ChromeNotFoundError":
            raise DtLensError(
                f"Saving {path} needs a Chrome or Chromium browser, and none was found; install one (on Debian: "
                "apt-get install chromium) or name it in the environment variable BROWSER_PATH, or save the figure as "
                ".html or .json."
            ) from error
        raise DtLensError(
            f"The browser that draws {path} failed ({because(error)}); name another one in the environment variable "
            "BROWSER_PATH, or save the figure as .html or .json."
        ) from error
    return drawn


def _least_width(figure: go.Figure) -> int:
    """The width of a figure that has none of its own: ``style.finish`` notes what it needs to be read."""
    about: Any = figure.layout.meta
    least = about.get("least_width") if isinstance(about, dict) else None
    return max(WIDTH, least) if isinstance(least, int) else WIDTH
