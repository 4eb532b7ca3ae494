"""The command `sweep`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dt_lens.cli.options import (
    Agent,
    Environment,
    Given,
    Matrices,
    MaxSteps,
    Raw,
    Seed,
    Target,
    Workers,
    load_model,
    split,
)
from dt_lens.cli.output import print_table, progress, resumable, write_csv
from dt_lens.errors import DtLensError

if TYPE_CHECKING:
    from dt_lens.behaviour.sweep.engines.engine import Engine
    from dt_lens.progress import Tell

ROWS = 20  # printed
HIDDEN = ("of", "layer", "head", "directions", "match", "failure_low", "failure_high", "survival", "note")
LINE_SECONDS = 10.0  # between lines of a log


def sweep(
    model: Agent,
    matrices: Matrices = None,
    sv: Annotated[
        str,
        typer.Option(
            help="Singular directions, one edit each: indices and ranges with commas, such as 0,1 or 0-9, or all; "
            "negative ones count from the smallest sigma."
        ),
    ] = "0",
    edits: Annotated[
        str,
        typer.Option(
            help="What a singular vector becomes: constant, zero, flip, random, scale:0.5, replace:EMBEDDING:LABEL, "
            "towards:EMBEDDING:LABEL:DEGREES; with commas."
        ),
    ] = "constant",
    controls: Annotated[int, typer.Option(min=0, help="Random edits of the same size beside each edit.")] = 0,
    control_match: Annotated[
        str,
        typer.Option(
            help="What a control has in common with its edit: frobenius (the norm of the change), or output (that and "
            "what it does to the matrix's output on the agent's own inputs)."
        ),
    ] = "frobenius",
    directions: Annotated[
        str,
        typer.Option(
            help="plain, or activation: weighted by the agent's own inputs, so that sigma is the output's spread."
        ),
    ] = "plain",
    activations: Annotated[
        Path | None, typer.Option(help="A file of dt-lens activations; collected where needed by default.")
    ] = None,
    sides: Annotated[
        str | None, typer.Option(help="Which sides to edit, such as read,write; all on the stream by default.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes of every arm; all arms share their seeds.")] = 20,
    halving: Annotated[
        str | None,
        typer.Option(
            help="Successive halving: the episodes of each rung before the last, such as 4,8; the stronger half of the "
            "edits goes on, and those left get --episodes on fresh seeds."
        ),
    ] = None,
    seed: Seed = 0,
    environment: Environment = None,
    target_return: Target = None,
    max_steps: MaxSteps = None,
    baseline: Annotated[bool, typer.Option(help="Run the unedited agent too; differences need it.")] = True,
    raw: Raw = False,
    out: Annotated[Path | None, typer.Option(help="Folder for sweep.sqlite; dt-lens-sweep/MODEL by default.")] = None,
    table: Annotated[Path | None, typer.Option(help="Write the table, a row per edit, to this .csv file too.")] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="Episodes of a unit of work; about 16.")] = None,
    workers: Workers = None,
    engine: Annotated[str, typer.Option(help="What runs the episodes: local, or ray for many machines.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster, such as 10.0.0.5:6379; the one of this machine by default.")
    ] = None,
    given: Given = None,
) -> None:
    """Edit many directions, each beside its controls, over the same seeds, and keep everything in one SQLite file.

    Stopped in any way and started again with the same options, it goes on where it was. With more matrices,
    directions, edits, controls or episodes it runs those too.
    """
    if engine not in ("local", "ray"):
        raise DtLensError(f"--engine is {engine!r}; it must be local or ray.")
    if address is not None and engine != "ray":
        raise DtLensError("--address is of a Ray cluster; give --engine ray with it.")
    folder = out or Path("dt-lens-sweep") / Path(model).name
    with _telling() as tell:
        tell("loading", 0.0)
        loaded = load_model(model, given)
        from dt_lens.behaviour.sweep.sweep import Sweep

        planned = Sweep(
            loaded,
            folder,
            matrices=split(matrices, "matrices"),
            sv=sv,
            sides=split(sides, "sides"),
            edits=split(edits, "edits") or [],
            controls=controls,
            control_match=control_match,
            directions=directions,
            activations=activations,
            episodes=episodes,
            halving=halving,
            seed=seed,
            environment=environment,
            target_return=target_return,
            max_steps=max_steps,
            block_size=block_size,
            baseline=baseline,
            fold_layernorm=not raw,
            workers=workers,
        )
        with resumable():
            planned.run(tell, _engine(engine, address, workers))
    found = planned.table()
    unedited = planned.results.baseline()
    if unedited is not None:
        print(f"Unedited: {unedited}\n")
    shown = found.drop(columns=[name for name in HIDDEN if name in found]).dropna(axis=1, how="all")
    largest = found["difference"].abs().sort_values(ascending=False, kind="stable").index[:ROWS]
    title = "Edits and controls" if len(found) <= ROWS else f"The {ROWS} largest differences of {len(found)} arms"
    print_table(shown if len(found) <= ROWS else shown.loc[largest], title)
    status, failures = planned.results.status(), planned.results.failures()
    if status["void"]:
        print(f"{status['void']} units are of edits that cannot be put in force; the table's notes say why.")
    if table:
        write_csv(found, table, index=True)
    print(f"\nThe results: {planned.file}")
    if failures:
        raise DtLensError(
            f"{status['failed']} units could not be run ({failures[0].rstrip('.')}); the same command tries them again."
        )


def _engine(name: str, address: str | None, workers: int | None) -> Engine | None:
    """What was asked for; ``None`` for processes of this machine."""
    if name == "local":
        return None
    from dt_lens.behaviour.sweep.engines.cluster import RayEngine

    return RayEngine(address, workers)


@contextmanager
def _telling() -> Iterator[Tell]:
    """A bar on a terminal; in a log a line now and then, since a sweep may run for days."""
    with progress() as tell:
        if sys.stderr.isatty():
            yield tell
            return
        last, printed = "", -LINE_SECONDS

        def line(what: str, share: float) -> None:
            nonlocal last, printed
            if what != last and (share >= 1 or time.monotonic() >= printed + LINE_SECONDS):
                last, printed = what, time.monotonic()
                print(f"[{share:4.0%}] {what}", file=sys.stderr, flush=True)

        yield line
