"""Report the progress of long work: a bar on a terminal or in a notebook, lines in a log, a function, or nothing.

In a notebook there is one bar: what a call does inside itself shows none of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from html import escape
from typing import Any

__all__ = ["Count", "ProgressCallback", "counting", "in_notebook", "progress", "reporting", "silent"]

ProgressCallback = Callable[[str, float], None]  # what is being done, and the share of the whole that is done
Count = Callable[[float, int], None]  # how many are done, of how many

DELAY = 0.5  # seconds after which a notebook shows a bar: shorter work needs none
EVERY = 0.1  # seconds between two updates of it

# Whether a call that reports its progress, or was told not to, is running: calls inside it are silent by default.
_inside: ContextVar[bool] = ContextVar("dt_lens_progress", default=False)


def silent(what: str, share: float) -> None:
    """Report nothing."""


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    interactive = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return getattr(interactive() if interactive else None, "kernel", None) is not None


@contextmanager
def _wanted(given: Any) -> Iterator[Any]:
    """What was asked for; ``None`` is a bar in a notebook, unless a call that reports is running, and else nothing."""
    given = in_notebook() and not _inside.get() if given is None else given
    before = _inside.set(True)
    try:
        yield given
    finally:
        _inside.reset(before)


@contextmanager
def reporting(wanted: bool | ProgressCallback | None) -> Iterator[ProgressCallback]:
    """Yield a function that reports progress: the user's own, a bar's for ``True``, or ``silent`` for ``False``.

    ``None`` is a bar in a notebook, and ``silent`` elsewhere and inside another call that reports.
    """
    with _wanted(wanted) as wanted:
        if callable(wanted):
            yield wanted
        elif wanted:
            with progress() as tell:
                yield tell
        else:
            yield silent


@contextmanager
def counting(wanted: bool | Count | None, total: int, what: str) -> Iterator[Callable[[float], None] | None]:
    """Yield a function that reports how many of ``total`` are done, or ``None`` if ``wanted`` is ``False``.

    It updates a bar labelled ``what`` if ``wanted`` is ``True``, or calls the user's own function. On exit, all are
    reported as done. ``None`` is as for ``reporting``.
    """
    with _wanted(wanted) as wanted, _counting(wanted, total, what) as tell:
        yield tell


@contextmanager
def _counting(wanted: bool | Count, total: int, what: str) -> Iterator[Callable[[float], None] | None]:
    if callable(wanted):
        last = 0.0

        def tell(done: float) -> None:
            nonlocal last
            last = min(done, float(total))
            wanted(last, total)

        yield tell
        if last < total:
            wanted(float(total), total)
        return
    if not wanted:
        yield None
        return
    if in_notebook():
        with _notebook_bar() as report:
            yield lambda done: report(f"{what}  {done:.4g} of {total}", done / max(total, 1))
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task(what, total=total)
        yield lambda done: bar.update(row, completed=round(done, 2))
        bar.update(row, completed=total)


@contextmanager
def progress() -> Iterator[ProgressCallback]:
    """Yield a function that updates a bar, in a notebook or on standard error.

    Without either, it prints a line per kind of work.
    """
    if in_notebook():
        with _notebook_bar() as report:
            yield report
        return
    if not sys.stderr.isatty():
        last = [""]

        def line(what: str, share: float) -> None:
            # Details follow two spaces; decomposing one block after the other is one kind of work.
            kind = what.partition("  ")[0].partition(" blocks.")[0].rstrip("0123456789.")
            if kind != last[0]:
                last[0] = kind
                print(f"[{share:4.0%}] {what}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(row, description=what, completed=share)


@contextmanager
def _notebook_bar() -> Iterator[ProgressCallback]:
    """Yield a function that updates one bar below a notebook's cell, which disappears at the end.

    IPython's display is updated in place, so it needs no widgets; rich and tqdm have a bar of one line only with them.
    """
    from IPython.display import display

    begun, shown, last = time.monotonic(), None, 0.0

    def tell(what: str, share: float) -> None:
        nonlocal shown, last
        now = time.monotonic()
        if (shown is None and now - begun < DELAY) or now - last < EVERY:
            return
        last, share = now, min(max(share, 0.0), 1.0)
        left = f", {_clock((now - begun) * (1 - share) / share)} left" if share > 0.02 else ""
        text = f"{share:4.0%}  {what}  ({_clock(now - begun)}{left})"
        bar = f'<progress value="{share:.3f}" max="1" style="width:20em;vertical-align:middle"></progress>'
        made = {"text/plain": text, "text/html": f"<div>{bar} {escape(text)}</div>"}
        if shown is None:
            shown = display(made, raw=True, display_id=True)
        else:
            shown.update(made, raw=True)

    try:
        yield tell
    finally:
        if shown is not None:
            shown.update({"text/plain": "", "text/html": ""}, raw=True)


def _clock(seconds: float) -> str:
    """Seconds as minutes and seconds.

    >>> _clock(5.2), _clock(3725)
    ('0:05', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
