"""The command `sweep`: many edits with their controls, in one SQLite file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dt_lens.arguments import require_writable
from dt_lens.cli.options import (
    Context,
    Deterministic,
    EditMatrices,
    EditsFrom,
    Environment,
    Failure,
    Given,
    MaxSteps,
    Model,
    Raw,
    Seed,
    Target,
    Text,
    Workers,
    edits_of,
    load_model,
    split,
    task_options,
)
from dt_lens.cli.output import print_table, progress, write_csv
from dt_lens.errors import DtLensError

if TYPE_CHECKING:
    from dt_lens.behaviour.sweep.engines.engine import Engine
    from dt_lens.progress import ProgressCallback

ROWS = 20  # printed
HIDDEN = (
    "of",
    "layer",
    "head",
    "directions",
    "match",
    "failure_low",
    "failure_high",
    "survival",
    "difference_note",
    "note",
)
LINE_SECONDS = 10.0  # between lines of a log


def sweep(
    model: Model,
    matrices: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated names or patterns, such as '*.W_in,*.OV.*'; all matrices by default, or none beside "
            "--edit or --edits-from."
        ),
    ] = None,
    sv: Annotated[
        list[str] | None,
        typer.Option(
            help="Singular directions of --matrices, one edit each: comma-separated indices and ranges, such as 0,1 or "
            "0-9 (both ends included), or all; --sv=-1 is the last. 0 by default. The directions of --edit are edited "
            "together."
        ),
    ] = None,
    value: Annotated[
        list[str] | None,
        typer.Option(
            help="What the singular vector becomes: constant (the default), zero, flip, random, a number that "
            "multiplies sigma, replace:EMBEDDING:LABEL, towards:EMBEDDING:LABEL:DEGREES, or the JSON of a record's "
            "value; several with commas, or repeated."
        ),
    ] = None,
    side: Annotated[
        list[str] | None,
        typer.Option(
            help="The sides to edit, such as read,write; all sides on the residual stream by default. Of --edit as for "
            "evaluate."
        ),
    ] = None,
    edit: EditMatrices = None,
    edits_from: EditsFrom = None,
    edits: Annotated[str | None, typer.Option(hidden=True, help="Another name for --value.")] = None,
    sides: Annotated[str | None, typer.Option(hidden=True, help="Another name for --side.")] = None,
    controls: Annotated[int, typer.Option(min=0, help="Number of random edits of the same size for each edit.")] = 0,
    control_match: Annotated[
        str,
        typer.Option(
            help="What a control has in common with its edit: frobenius (the norm of the change), or output (also the "
            "output energy on the model's own inputs)."
        ),
    ] = "frobenius",
    directions: Annotated[
        str,
        typer.Option(
            help="plain, or activation: weighted by the model's own inputs, so that sigma is the spread of the output."
        ),
    ] = "plain",
    activations: Annotated[
        Path | None, typer.Option(help="A file of dt-lens activations; collected when needed by default.")
    ] = None,
    episodes: Annotated[
        int | None, typer.Option(min=1, help="Episodes of each arm, all over the same seeds; 20 by default.")
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(min=1, help="For a language model: windows of text, the same for each arm; 32 by default."),
    ] = None,
    text: Text = None,
    context: Context = None,
    halving: Annotated[
        str | None,
        typer.Option(
            help="Successive halving: comma-separated episodes or windows of each rung before the last, such as 4,8; "
            "each rung keeps the stronger half of the edits, and the last runs --episodes or --windows fresh ones."
        ),
    ] = None,
    seed: Seed = 0,
    environment: Environment = None,
    target_return: Target = None,
    max_steps: MaxSteps = None,
    deterministic: Deterministic = None,
    failure: Failure = None,
    baseline: Annotated[
        bool, typer.Option(help="Run the unedited model too; differences are computed from it.")
    ] = True,
    raw: Raw = False,
    out: Annotated[Path | None, typer.Option(help="Folder for sweep.sqlite; dt-lens-sweep/MODEL by default.")] = None,
    table: Annotated[
        Path | None, typer.Option(help="Also write the table, a row for each edit, to this .csv file.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Episodes or windows that run together; about 16 by default.")
    ] = None,
    workers: Workers = None,
    engine: Annotated[str, typer.Option(help="What runs the sweep: local, or ray for several machines.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Address of the Ray cluster, such as 10.0.0.5:6379; this machine's by default.")
    ] = None,
    given: Given = None,
) -> None:
    """Edit many directions, each with its controls, over the same units, and store everything in one SQLite file.

    The edits are every direction of --matrices with every --value, and those of --edit or --edits-from. A run that was
    stopped in any way resumes when started again with the same options. With more matrices, directions, values, edits,
    controls, episodes or windows, it runs only the new ones.
    """
    if engine not in ("local", "ray"):
        raise DtLensError(f"--engine is {engine!r}; it must be local or ray.")
    if address is not None and engine != "ray":
        raise DtLensError("--address is the address of a Ray cluster; give --engine ray with it.")
    value = _one_name("value", value, "edits", edits)
    side = _one_name("side", side, "sides", sides)
    if edit and matrices and any(given is not None and len(given) > 1 for given in (sv, value, side)):
        raise DtLensError(
            "With --edit and --matrices together, several --sv, --value or --side may belong to either; give one of "
            "each for both, or the edits in a file with --edits-from."
        )
    folder = out or Path("dt-lens-sweep") / Path(model).name
    require_writable(folder / "sweep.sqlite", table)
    with _long_progress() as tell:
        tell("loading", 0.0)
        loaded = load_model(model, given)
        from dt_lens.behaviour.sweep.settings import SweepSettings
        from dt_lens.behaviour.sweep.sweep import Sweep

        # Beside a file of edits --sv, --side, --value and --raw are of the matrices.
        theirs = bool(edit or edits_from) and not (edits_from and matrices)
        own = (sv, side, value) if theirs else (None, None, None)
        given_edits = edits_of(loaded, edit, *own, edits_from, raw=raw and theirs, seed=seed)
        alone = given_edits and not matrices  # then these are of the given edits
        settings = SweepSettings(
            matrices=split(matrices, "matrices"),
            sv=0 if alone else sv or 0,
            side=[part for text in side for part in split(text, "side") or ()] if side and not alone else None,
            value=None if alone else value,
            edits=given_edits or None,
            controls=controls,
            control_match=control_match,
            directions=directions,
            activations=activations,
            halving=halving,
            seed=seed,
            block_size=block_size,
            baseline=baseline,
            fold_layernorm=not raw,
        )
        of_task = task_options(
            loaded,
            episodes=episodes,
            windows=windows,
            text=text,
            context=context,
            environment=environment,
            target_return=target_return,
            max_steps=max_steps,
            deterministic=deterministic,
            failure=failure,
        )
        planned = Sweep(loaded, folder, settings, workers=workers, **of_task)
        planned.run(tell, _engine(engine, address, workers))
    found = planned.table()
    unedited = planned.results.baseline()
    if unedited is not None:
        print(f"Unedited: {unedited}\n")
    elif found.attrs.get("failure_guessed"):
        print(
            f"failure_rate ({found.attrs['failure_rule']}) is by a guess of what counts as failing; give --failure.\n"
        )
    shown = found.drop(columns=[name for name in HIDDEN if name in found]).dropna(axis=1, how="all")
    largest = found["difference"].abs().sort_values(ascending=False, kind="stable").index[:ROWS]
    title = "Edits and controls" if len(found) <= ROWS else f"The {ROWS} largest differences of {len(found)} arms"
    print_table(shown if len(found) <= ROWS else shown.loc[largest], title)
    notes = found.loc[found["difference_note"] != "", "difference_note"]
    for note, arms in notes.value_counts().items():
        print(f"Intervals of {arms} of {len(found)} arms: {note}.")
    status, failures = planned.results.status(), planned.results.failures()
    if status["void"]:
        print(f"{status['void']} blocks belong to edits that cannot be applied; the table's notes say why.")
    if table:
        write_csv(found, table, index=True)
    print(f"\nThe results: {planned.file}")
    if failures:
        raise DtLensError(
            f"{status['failed']} blocks could not be run ({failures[0].rstrip('.')}); "
            "run the same command again to retry them."
        )


def _one_name(name: str, given: list[str] | None, old: str, text: str | None) -> list[str] | None:
    """An option that also has an old name."""
    if given and text is not None:
        raise DtLensError(f"--{old} is another name for --{name}; give one of them.")
    return [text] if text is not None else given


def _engine(name: str, address: str | None, workers: int | None) -> Engine | None:
    """The engine that ``--engine`` names; ``None`` for processes on this machine."""
    if name == "local":
        return None
    from dt_lens.behaviour.sweep.engines.cluster import RayEngine

    return RayEngine(address, workers)


@contextmanager
def _long_progress() -> Iterator[ProgressCallback]:
    """Show a progress bar on a terminal; in a log, print a line now and then, since a sweep may run for days."""
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
