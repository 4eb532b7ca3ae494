"""Take the screenshots of the docs: ``python docs/pictures/screenshots.py report FILE explorer MODEL site FOLDER``.

Any of the three may be left out. ``report`` opens the ``report.html`` of a study, for example of ``dt-lens study hopper
--out runs/study --episodes 8``; ``explorer`` starts ``dt-lens explore MODEL``, shows a direction, and runs its removal;
``site`` opens the front page of what ``make docs`` built, ``build/site``. Each is written to ``docs/`` at 1280, 768 and
390 pixels, below 250 kB. Look at each file before it is committed. Needs Chromium (``BROWSER_PATH`` names another
browser), and the extras ``dev`` and ``explore``.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
WIDTHS = {1280: 1100, 768: 1100, 390: 1000}  # pixels: the height that is shown at each width
MOST = 250_000  # bytes of a file
COLOURS = (256, 128, 64, 32)


def save(page: Any, name: str, height: int | None = None) -> None:
    """Write what a page shows from its top, in as many colours as its size allows.

    Args:
        page: a page of Playwright.
        name: of the file in ``docs/``.
        height: in pixels; by default that of the page's width.
    """
    from PIL import Image

    width = int(page.viewport_size["width"])
    page.set_viewport_size({"width": width, "height": height or WIDTHS[width]})
    page.wait_for_timeout(1500)  # figures are drawn anew
    page.evaluate("window.scrollTo(0, 0)")
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    for colours in COLOURS:
        kept = io.BytesIO()
        shot.quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            kept, "PNG", optimize=True
        )
        if kept.tell() < MOST:
            break
    else:
        raise SystemExit(f"{name} is {kept.tell():,} bytes in {COLOURS[-1]} colours; show less of the page.")
    (DOCS / name).write_bytes(kept.getvalue())
    print(f"{name}: {shot.width} x {shot.height}, {colours} colours, {kept.tell():,} bytes")


def report(browser: Any, file: str) -> None:
    """The top of a study's report."""
    for width in WIDTHS:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="light")
        page.goto(Path(file).resolve().as_uri())
        page.wait_for_selector("figure.plot .main-svg")
        save(page, f"report_{width}.png")
        page.close()


def site(browser: Any, folder: str) -> None:
    """The front page of the documentation."""
    for width in WIDTHS:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="light")
        page.goto((Path(folder) / "index.html").resolve().as_uri())
        save(page, f"site_{width}.png", 1000)
        page.close()


def explorer(browser: Any, model: str) -> None:
    """The explorer's overview, a matrix with one of its directions, and a live run."""
    command = [sys.executable, "-m", "dt_lens", "explore", model, "--no-browser", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", said)
            if found is None:
                raise SystemExit(f"The explorer has not started: {said}")
            explored(browser, found[0])
        finally:
            process.send_signal(signal.SIGTERM)


def explored(browser: Any, address: str) -> None:
    """The pages of a running explorer."""
    light = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = light.new_page()
    page.set_default_timeout(180_000)
    page.goto(address)
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(address.partition("?")[0])
        page.wait_for_selector("#overview .nsewdrag")
        save(page, f"explorer_overview_{width}.png")
    live = address.partition("?")[0] + "matrix?matrix=blocks.0.mlp.W_out&sv=1&embedding=action_out"
    for width, height in ((1280, 1900), (390, 1500)):
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(live)
        page.wait_for_selector("#heatmap .nsewdrag")
        page.wait_for_selector("#direction h2")
        save(page, f"explorer_matrix_{width}.png", height)
    page.click("text=Edit this direction")
    page.click("#edit-add")
    page.wait_for_selector("#edit-code")
    page.click("text=Run them live")
    page.wait_for_selector("#live-edits pre")
    for field, value in (("units", 8), ("steps", 300)):
        page.fill(f"#live-{field}", str(value))
        page.keyboard.press("Tab")
    page.click("#live-start")
    page.wait_for_function("/^Finished/.test(document.querySelector('#live-said').textContent)")
    save(page, "explorer_live_390.png", 1500)
    page.set_viewport_size({"width": 1280, "height": 900})
    save(page, "explorer_live_1280.png", 1300)
    light.close()


PICTURES = {"report": report, "explorer": explorer, "site": site}


def main(words: list[str]) -> None:
    """Take the screenshots that are asked for: pairs of what and from where."""
    from playwright.sync_api import sync_playwright

    wanted = list(zip(words[::2], words[1::2], strict=False))
    if not wanted or len(words) % 2 or any(what not in PICTURES for what, _ in wanted):
        raise SystemExit(__doc__)
    path = os.environ.get("BROWSER_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("There is no Chromium here; on Debian apt-get install chromium, or name one in BROWSER_PATH.")
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for what, source in wanted:
            PICTURES[what](browser, source)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
