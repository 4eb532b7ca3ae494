"""Report the progress of long work: a bar on a terminal or in a notebook, lines in a log, a function, or nothing.

In a notebook there is one bar: what a call does inside itself shows none of its own.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from html import escape
from typing import Any

__all__ = ["Count", "ProgressCallback", "counting", "in_notebook", "progress", "reporting", "silent", "stage"]

ProgressCallback = Callable[[str, float], None]  # what is being done, and the share of the whole that is done
Count = Callable[[float, int], None]  # how many are done, of how many

DELAY = 0.5  # seconds after which a notebook shows a bar: shorter work needs none
EVERY = 0.1  # seconds between two updates of it

# Lines of a log: seconds between two lines at least, and at most; and the share of the whole after which one is due.
LEAST, MOST, STEP = 1.0, 30.0, 0.1

# Whether a call that reports its progress, or was told not to, is running: calls inside it are silent by default.
_inside: ContextVar[bool] = ContextVar("dt_lens_progress", default=False)


def silent(what: str, share: float) -> None:
    """Report nothing."""


def stage(tell: ProgressCallback, start: float, end: float) -> ProgressCallback:
    """A function that reports the progress of one stage, which is the part from ``start`` to ``end`` of the whole.

    >>> stage(lambda what, share: print(what, share), 0.5, 1.0)("drawing", 0.5)
    drawing 0.75
    """
    return lambda what, share: tell(what, start + (end - start) * min(max(share, 0.0), 1.0))


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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console(), transient=True) as bar:
        row = bar.add_task(what, total=total)
        yield lambda done: bar.update(row, completed=round(done, 2))
        bar.update(row, completed=total)


@contextmanager
def progress() -> Iterator[ProgressCallback]:
    """Yield a function that updates a bar, in a notebook or on standard error; without either it prints lines.

    The share that is shown never falls.
    """
    if in_notebook():
        with _notebook_bar() as report:
            yield report
        return
    if not sys.stderr.isatty():
        with _Log() as log:
            yield log.tell
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=_console(), transient=True) as bar:
        row, most = bar.add_task("", total=1.0), 0.0

        def tell(what: str, share: float) -> None:
            nonlocal most
            most = max(most, min(share, 1.0))
            bar.update(row, description=what, completed=most)

        yield tell


def _console() -> Any:
    """A console on standard error that leaves room at the end of a line.

    The ``^C`` of an interrupt would begin another line after a full one, and the bar would not be taken away.
    """
    from rich.console import Console, ConsoleDimensions

    class Narrower(Console):
        @property  # type: ignore[misc]
        def size(self) -> ConsoleDimensions:
            width, height = Console.size.__get__(self)
            return ConsoleDimensions(max(width - 3, 1), height)

    return Narrower(stderr=True)


class _Log:
    """Prints a line on standard error when another kind of work begins, after a tenth of the whole, and by the clock.

    A thread prints too, so that a stage that reports nothing for minutes is seen to go on.
    """

    def __init__(self) -> None:
        self._lock, self._end = threading.Lock(), threading.Event()
        self._begun = time.monotonic()
        self._what, self._share = "", 0.0  # the newest report
        self._kind, self._said, self._tenth = "", "", 0.0  # of the last line
        self._printed = -MOST
        self._clock = threading.Thread(target=self._watch, name="dt-lens-progress", daemon=True)

    def __enter__(self) -> _Log:
        self._clock.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._end.set()
        self._clock.join(LEAST)
        if kind is None and self._what != self._said:  # how it ended
            self._line()

    def tell(self, what: str, share: float) -> None:
        with self._lock:
            self._what, self._share = what, max(self._share, min(share, 1.0))
            self._line_if_due()

    def _watch(self) -> None:
        while not self._end.wait(LEAST):
            with self._lock:
                self._line_if_due()

    def _line_if_due(self) -> None:
        since = time.monotonic() - self._printed
        if not self._what or since < LEAST:
            return
        if since >= MOST or self._share >= self._tenth + STEP or kind_of_work(self._what) != self._kind:
            self._line()

    def _line(self) -> None:
        self._printed = time.monotonic()
        self._kind, self._said, self._tenth = kind_of_work(self._what), self._what, self._share
        took = f"  ({_clock(seconds)})" if (seconds := self._printed - self._begun) >= 1 else ""
        print(f"[{self._share:4.0%}] {self._what}{took}", file=sys.stderr, flush=True)


def kind_of_work(what: str) -> str:
    """What is being done, without its details and numbers.

    >>> kind_of_work("decomposing blocks.0.mlp.W_in"), kind_of_work("3 of 9 blocks of episodes  2/s, 8 s left")
    ('decomposing', ' of  blocks of episodes')
    """
    return re.sub(r"\d[\d,.]*", "", what.partition("  ")[0].partition(" blocks.")[0])


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
