"""Report the progress of long work: a bar on a terminal, lines in a log, a function of the user's, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Count", "ProgressCallback", "counting", "progress", "reporting", "silent"]

ProgressCallback = Callable[[str, float], None]  # what is being done, and the share of the whole that is done
Count = Callable[[float, int], None]  # how many are done, of how many


def silent(what: str, share: float) -> None:
    """Report nothing."""


@contextmanager
def reporting(wanted: bool | ProgressCallback) -> Iterator[ProgressCallback]:
    """Yield a function that reports progress: the user's own, a bar's for ``True``, or ``silent`` for ``False``."""
    if callable(wanted):
        yield wanted
    elif wanted:
        with progress() as tell:
            yield tell
    else:
        yield silent


@contextmanager
def counting(wanted: bool | Count, total: int, what: str) -> Iterator[Callable[[float], None] | None]:
    """Yield a function that reports how many of ``total`` are done, or ``None`` if ``wanted`` is ``False``.

    It updates a bar labelled ``what`` if ``wanted`` is ``True``, or calls the user's own function. On exit, all are
    reported as done.
    """
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
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task(what, total=total)
        yield lambda done: bar.update(row, completed=round(done, 2))
        bar.update(row, completed=total)


@contextmanager
def progress() -> Iterator[ProgressCallback]:
    """Yield a function that updates a bar on standard error; without a terminal, it prints a line per kind of work."""
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
