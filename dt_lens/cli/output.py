"""What commands print and write: tables, JSON, files, progress, and what comes next."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dt_lens.arguments import atomic_write, require_writable
from dt_lens.errors import DtLensError
from dt_lens.progress import ProgressCallback, silent
from dt_lens.progress import progress as shown_progress
from dt_lens.version import __version__

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "SCHEMA",
    "cell",
    "plain",
    "print_json",
    "print_next",
    "print_table",
    "print_written",
    "progress",
    "require_file",
    "say",
    "training_in",
    "usual_output",
    "write_csv",
]

COMPRESSED = (".gz", ".bz2", ".xz", ".zip")  # what pandas writes a table as without another package
NARROW = 14  # characters that a column of words has at least, if its words are as long
# What a narrow terminal does not show, first to last: what the name of a matrix says too, and what others follow from.
LEAST = (
    "head", "layer", "block", "share", "controlled", "controls", "energy", "note_p_value", "margin", "p_value", "z",
    "controls_large", "note_effect", "side", "wanted", "sigma", "beyond", "cosine", "role", "worst", "label",
)  # fmt: skip
SCHEMA = 1  # of --json; docs/command_line.md says when it changes

_quiet: ContextVar[bool] = ContextVar("dt_lens_quiet", default=False)
_machine: ContextVar[TextIO | None] = ContextVar("dt_lens_machine", default=None)


@contextmanager
def usual_output(quiet: bool = False, as_json: bool = False) -> Iterator[None]:
    """What holds for the output of every command.

    Args:
        quiet: show no progress and no hints.
        as_json: keep standard output for ``print_json``: what else is printed goes to standard error.
    """
    before = _quiet.set(quiet), _machine.set(sys.stdout if as_json else None)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.showwarning = _show_warning
            if as_json:
                with redirect_stdout(sys.stderr):
                    yield
            else:
                yield
    finally:
        _quiet.reset(before[0])
        _machine.reset(before[1])


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print a warning as a sentence: a file and a line of code say nothing to who gives a command."""
    say(f"Warning: {' '.join(str(message).split())}", err=True)


@contextmanager
def progress() -> Iterator[ProgressCallback]:
    """Yield a function that reports progress on standard error, or nothing with ``--quiet``."""
    if _quiet.get():
        yield silent
        return
    with shown_progress() as tell:
        yield tell


def print_json(command: str, **found: Any) -> None:
    """Print the result of a command as one JSON object: the schema's number, the command, the version, the result."""
    record = {"schema": SCHEMA, "command": command, "version": __version__, **found}
    text = json.dumps(plain(record), allow_nan=False)
    print(text, file=_machine.get() or sys.stdout, flush=True)


def plain(value: Any) -> Any:
    """A value as JSON has it: a table is a list of records, and a number that is not finite is ``None``.

    >>> plain({"a": (1.5, float("nan")), "file": Path("a/b")})
    {'a': [1.5, None], 'file': 'a/b'}
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    import pandas as pd

    if isinstance(value, pd.DataFrame):
        columns = [[plain(entry) for entry in value[name].tolist()] for name in value.columns]
        return [dict(zip(map(str, value.columns), row, strict=True)) for row in zip(*columns, strict=True)]
    if value is pd.NA:
        return None
    if hasattr(value, "tolist"):  # an array, or one of NumPy's numbers
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def require_file(file: Path | None, *suffixes: str, option: str = "out") -> None:
    """Raise ``DtLensError`` now, before long work, for a file of another kind, or that cannot be written at its end.

    Args:
        file: the value of ``option``. A device and a pipe have no kind.
        suffixes: what the file's name may end in; a compressed table, such as .csv.gz, is a .csv too.
        option: the name of the option.
    """
    if file is None:
        return
    device = file.exists() and not (file.is_file() or file.is_dir())
    kinds = [suffix.lower() for suffix in file.suffixes]
    if kinds[-1:] and kinds[-1] in COMPRESSED and kinds[-2:-1] == [".csv"]:
        kinds.pop()
    if not device and (not kinds or kinds[-1] not in suffixes):
        raise DtLensError(
            f"--{option} is {str(file)!r}, and a {' or '.join(suffixes)} file is written there; give a name that ends "
            "so."
        )
    require_writable(file)


def write_csv(table: pd.DataFrame, file: Path, index: bool = False) -> None:
    """Write a table to a CSV file and print the file's path."""
    with atomic_write(file) as part:
        table.to_csv(part, index=index)
    print_written(file)


def print_written(file: Path) -> None:
    """Print, on standard error, the path of a file that was written; nothing with ``--quiet``."""
    if not _quiet.get():
        print(f"Written: {file}", file=sys.stderr)


def print_next(*words: object) -> None:
    """Print, on standard error, the command that one would give next; nothing with ``--quiet``."""
    if not _quiet.get():
        print(f"Next: {shlex.join(['dt-lens', *map(str, words)])}", file=sys.stderr)


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
    """Print a table to standard output, numbers aligned right, with few digits.

    Where a terminal is too narrow, columns of which nothing can be read are left out rather than all cut, and a last
    line names them. Output to a file or a pipe has all columns.
    """
    import pandas as pd
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 240)
    cells = {str(name): [cell(name, value) for value in table[name]] for name in table.columns}
    numeric = {str(name) for name in table.columns if pd.api.types.is_numeric_dtype(table[name])}
    widths, left_out = _widths(cells, console.width) if sys.stdout.isatty() else (None, [])
    shown = Table(
        title=Text(title), title_justify="left", box=None, pad_edge=False, header_style="bold",
        padding=(0, 2 if widths is None else 1, 0, 0),
    )  # fmt: skip
    for name in cells if widths is None else widths:
        shown.add_column(
            name if widths is None else name.replace("_", " "),
            justify="right" if name in numeric else "left",
            width=None if widths is None else widths[name],
            overflow="fold",
        )
    rows = [cells[name] for name in (cells if widths is None else widths)]
    for row in zip(*rows, strict=True):
        shown.add_row(*map(Text, row))
    console.print(shown)
    if left_out:
        say(
            f"Not shown for lack of room: {', '.join(left_out)}. A wider terminal shows all columns, and so does a "
            "pipe, as in | less -S."
        )


def _widths(cells: Mapping[str, Sequence[str]], room: int) -> tuple[dict[str, int] | None, list[str]]:
    """The widths of the columns that fit into ``room``, and the names of those with contents that do not.

    Widths are ``None`` if all columns fit as they are. A column is never narrower than its longest word.

    >>> _widths({"matrix": ["blocks.0.mlp.W_in"], "head": [""], "p_value": ["1.0e-03"]}, 28)
    ({'matrix': 17, 'p_value': 7}, [])
    """
    natural = {name: max(map(len, [name, *found])) for name, found in cells.items()}
    if sum(natural.values()) + 2 * len(natural) - 2 <= room:
        return None, []
    least = {}
    for name, found in cells.items():
        words = [len(word) for text in [name.replace("_", " "), *found] for word in text.split()]
        least[name] = max(1, *words, min(NARROW, max(map(len, found), default=0)))
        natural[name] = max(least[name], *map(len, found), 1)
    blank = [name for name, found in cells.items() if not any(found)]
    left_out = []
    for name in [*blank, *(name for name in LEAST if name not in blank)]:
        if sum(least.values()) + len(least) - 1 <= room:
            break
        if least.pop(name, None) and name not in blank:
            left_out.append(name)
    spare = room - sum(least.values()) - len(least) + 1
    for _ in range(spare):
        name = max(least, key=lambda name: natural[name] - least[name])
        if natural[name] == least[name]:
            break
        least[name] += 1
    return least, left_out


def say(text: object = "", err: bool = False, flush: bool = False) -> None:
    """Print sentences; on a terminal, lines that are too long are broken between words, below their second column.

    Args:
        text: what is printed, in any number of lines.
        err: print to standard error.
        flush: as for ``print``.
    """
    stream = sys.stderr if err else sys.stdout
    lines = str(text).split("\n")
    if stream.isatty():
        import textwrap

        room = max(40, _columns(stream))
        for number, line in enumerate(lines):
            start = re.match(r"\s*(?:\S+ )*\S+ {2,}(?=\S)|\s*", line)
            hanging = " " * min(len(start.group()) if start else 0, 2 * room // 3)
            if len(line) > room:
                lines[number] = textwrap.fill(
                    line, room, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False,
                    drop_whitespace=True, replace_whitespace=False,
                )  # fmt: skip
    print("\n".join(lines), file=stream, flush=flush)


def _columns(stream: TextIO) -> int:
    """The width of a terminal."""
    import os
    import shutil

    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def cell(name: str, value: Any) -> str:
    """How one value of the column ``name`` is printed."""
    import pandas as pd

    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        small = name in ("p_value", "q_value", "q", "relative error")
        return f"{value:.1e}" if small else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"
    return str(value)
