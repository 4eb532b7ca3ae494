"""What commands print and write: tables, files, progress."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dt_lens.arguments import atomic_write
from dt_lens.progress import progress

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["print_table", "print_written", "progress", "training_in", "write_csv"]


def write_csv(table: pd.DataFrame, file: Path, index: bool = False) -> None:
    """Write a table to a CSV file and print the file's path."""
    with atomic_write(file) as part:
        table.to_csv(part, index=index)
    print_written(file)


def print_written(file: Path) -> None:
    """Print, on standard error, the path of a file that was written."""
    print(f"Written: {file}", file=sys.stderr)


@contextmanager
def training_in(out: Path) -> Iterator[None]:
    """Say, at a Ctrl-C before the first step, what ``out`` holds; a training run itself says which step it keeps."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if stop.args:
            raise
        file = out / "checkpoint.pt"
        raise KeyboardInterrupt(
            f"Stopped before training went on; {file} is kept, and the same command, without --fresh, resumes from it."
            if file.exists()
            else "Stopped before the first step; nothing is kept, and the same command starts again."
        ) from None


def print_table(table: pd.DataFrame, title: str) -> None:
    """Print a table to standard output, numbers aligned right, with few digits."""
    import pandas as pd
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Output to a file or a pipe is not cut to the width of a terminal.
    console = Console(width=None if sys.stdout.isatty() else 240)
    shown = Table(
        title=Text(title), title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0)
    )
    for name in table.columns:
        shown.add_column(str(name), justify="right" if pd.api.types.is_numeric_dtype(table[name]) else "left")
    for row in table.itertuples(index=False):
        shown.add_row(*(Text(cell(name, value)) for name, value in zip(table.columns, row, strict=True)))
    console.print(shown)


def cell(name: str, value: Any) -> str:
    """How one value of the column ``name`` is printed."""
    import pandas as pd

    if value is None or value is pd.NA:
        return ""
    if isinstance(value, float):
        small = name in ("p_value", "q_value", "q", "relative error")
        return f"{value:.1e}" if small else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"
    return str(value)
