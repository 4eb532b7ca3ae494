"""The command `bench`: measure speed beside named peers, on this machine, in this run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dt_lens.cli.completion import complete_subject
from dt_lens.cli.output import print_table, print_written, progress, require_file, say
from dt_lens.errors import DtLensError, nearest

if TYPE_CHECKING:
    import pandas as pd

BUSY = 0.5  # processes that run beside the benchmark, on average over the last minute

EXAMPLES = (
    "dt-lens bench --list",
    "dt-lens bench edits --quick",
)


def bench(
    subjects: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to measure; everything by default. --list names the subjects.",
            autocompletion=complete_subject,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds and smaller sizes: minutes in all.")] = False,
    names: Annotated[bool, typer.Option("--list", help="Name the subjects and exit.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the rows to this .csv file, or as a table to this .md file.")
    ] = None,
) -> None:
    """Measure speed, every figure beside a named peer's in the same run.

    Each subject runs in a process of its own. Timings mean something on an otherwise idle machine only.
    """
    try:
        from dt_lens_benchmarks.subjects import SUBJECTS
    except ModuleNotFoundError as error:
        raise DtLensError("The benchmarks are not installed; install dt-lens again, from its wheel.") from error
    if names:
        for name, what in SUBJECTS.items():
            say(f"{name:<15}{what}")
        return
    for name in subjects or ():
        if name not in SUBJECTS:
            raise DtLensError(
                f"There is no subject {name!r}; the subjects are {', '.join(SUBJECTS)}." + nearest(name, SUBJECTS)
            )
    require_file(out, ".csv", ".md")
    if (busy := _load()) > BUSY:
        say(
            f"This machine is busy (load {busy:.1f}), and what runs beside a benchmark changes its figures.",
            err=True,
        )
    begin = time.monotonic()
    rows: list[dict[str, Any]] = []
    try:
        for row in _measured(list(subjects or SUBJECTS), quick):
            rows.append(row)
    finally:  # what was measured is not lost
        if rows:
            table = _table(rows)
            print_table(table, f"dt-lens bench{' --quick' if quick else ''}, {machine()}")
            say(f"It took {time.monotonic() - begin:.0f} s.", err=True)
            if out is not None:
                _write(table, out, quick)


def machine() -> str:
    """What the benchmarks run on, in words."""
    import torch

    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{time.strftime('%Y-%m-%d')}, {n} cores of {_processor()}, Python {platform.python_version()}, "
        f"torch {torch.__version__.partition('+')[0]}"
    )


def _processor() -> str:
    """The processor's name, as the system gives it."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return " ".join(value.split())
    return platform.processor() or platform.machine()


def _load() -> float:
    """How many processes ran at a time in the last minute; 0 where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


def _measured(subjects: Sequence[str], quick: bool) -> Iterator[dict[str, Any]]:
    """The rows of some subjects, as they come, each with its subject."""
    with progress() as tell:
        for number, subject in enumerate(subjects):
            tell(f"measuring {subject}", number / len(subjects))
            words = [sys.executable, "-m", "dt_lens_benchmarks", subject, *(["--quick"] if quick else [])]
            with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
                try:
                    assert process.stdout is not None
                    for line in process.stdout:
                        yield {"subject": subject, **json.loads(line)}
                except BaseException:
                    process.kill()
                    raise
            if process.returncode:
                raise DtLensError(f"The benchmark {subject} failed with status {process.returncode}; see above.")
        tell("measured", 1.0)


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows as a table, with the two figures and their unit in one column each."""
    import pandas as pd

    table = pd.DataFrame(rows)
    table["met"] = [{True: "yes", False: "no"}.get(met, "") for met in table["met"]]
    return table.rename(columns={"peer_value": "peer's"})


def _write(table: pd.DataFrame, out: Path, quick: bool) -> None:
    from dt_lens.arguments import atomic_write

    with atomic_write(out) as part:
        if out.suffix.lower() != ".md":
            table.to_csv(part, index=False)
        else:
            shown = table.map(lambda value: f"{value:.3g}" if isinstance(value, float) else str(value))
            lines = ["| " + " | ".join(cells) + " |" for cells in (list(shown.columns), *shown.to_numpy().tolist())]
            lines.insert(1, "|---" * len(shown.columns) + "|")
            title = f"`dt-lens bench{' --quick' if quick else ''}`, {machine()}."
            Path(part).write_text("\n".join([title, "", *lines, ""]), encoding="utf-8")
    print_written(out)
