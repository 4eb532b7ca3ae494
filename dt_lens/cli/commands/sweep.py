"""The command `sweep`: many edits with their controls, in one SQLite file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dt_lens.arguments import require_writable
from dt_lens.cli.completion import VALUES, complete_matrix, one_of
from dt_lens.cli.options import (
    Context,
    Deterministic,
    EditMatrices,
    EditsFrom,
    Environment,
    Failure,
    Given,
    Json,
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
from dt_lens.cli.output import cell, print_json, print_next, print_table, progress, require_file, say, write_csv
from dt_lens.errors import DtLensError, nearest

if TYPE_CHECKING:
    import pandas as pd

    from dt_lens.behaviour.sweep.engines.engine import Engine
    from dt_lens.behaviour.terms import Terms

ROWS = 20  # printed

EXAMPLES = (
    "dt-lens sweep hopper --matrices '*.W_in' --sv 0,1 --controls 1 --episodes 12",
    "dt-lens sweep tiny-gpt2 --matrices '*.W_in' --sv 0 --value zero --controls 1",
    "dt-lens sweep hopper --edits-from edit.json --episodes 50 --json",
)


def sweep(
    model: Model,
    matrices: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated names or patterns, such as '*.W_in,*.OV.*'; all matrices by default, or none beside "
            "--edit or --edits-from.",
            autocompletion=complete_matrix,
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
            "value; several with commas, or repeated.",
            autocompletion=one_of(*VALUES),
        ),
    ] = None,
    side: Annotated[
        list[str] | None,
        typer.Option(
            help="The sides to edit, such as read,write; all sides on the residual stream by default. Of --edit as for "
            "evaluate.",
            autocompletion=one_of("read", "write"),
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
            "output energy on the model's own inputs).",
            autocompletion=one_of("frobenius", "output"),
        ),
    ] = "frobenius",
    directions: Annotated[
        str,
        typer.Option(
            help="plain, or activation: weighted by the model's own inputs, so that sigma is the spread of the output.",
            autocompletion=one_of("plain", "activation"),
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
    engine: Annotated[
        str,
        typer.Option(
            help="What runs the sweep: local, or ray for several machines.",
            autocompletion=one_of("local", "ray"),
        ),
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="Address of the Ray cluster, such as 10.0.0.5:6379; this machine's by default.")
    ] = None,
    given: Given = None,
    as_json: Json = False,
) -> None:
    """Edit many directions, each with its controls, over the same units, and store everything in one SQLite file.

    The edits are every direction of --matrices with every --value, and those of --edit or --edits-from. A run that was
    stopped in any way resumes when started again with the same options. With more matrices, directions, values, edits,
    controls, episodes or windows, it runs only the new ones.
    """
    if engine not in ("local", "ray"):
        raise DtLensError(f"--engine is {engine!r}; it must be local or ray." + nearest(engine, ("local", "ray")))
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
    require_writable(folder / "sweep.sqlite")
    require_file(table, ".csv", option="table")
    with progress() as tell:
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
    found, results = planned.table(), planned.results
    status, failures, unedited = results.status(), results.failures(), results.baseline()
    if table:
        write_csv(found, table, index=True)
    if as_json:
        print_json(
            "sweep",
            model=model,
            file=planned.file,
            blocks=status,
            unedited=None if unedited is None else unedited.summary(),
            about=found.attrs,
            table=found.reset_index(),
        )
    else:
        if unedited is not None:
            say(f"Unedited: {unedited}\n")
        elif found.attrs.get("failure_guessed"):
            rule = found.attrs["failure_rule"]
            say(f"failure_rate ({rule}) is by a guess of what counts as failing; give --failure.\n")
        _print_edits(found, planned.task.terms)
        if status["void"]:
            say(f"{status['void']} blocks belong to edits that cannot be applied; the table's notes say why.")
        say(f"\nThe results: {planned.file}")
    if not alone and not failures:
        print_next("atlas", model, "--sweep", folder)
    if failures:
        raise DtLensError(
            f"{status['failed']} blocks could not be run ({failures[0].rstrip('.')}); "
            "run the same command again to retry them."
        )


def _print_edits(found: pd.DataFrame, terms: Terms) -> None:
    """Print the edits with the largest differences, each beside the mean of its controls, and notes on intervals."""
    edits = found[found["kind"] == "edit"]
    largest = edits["difference"].abs().sort_values(ascending=False, kind="stable", na_position="last").index[:ROWS]
    title = f"{len(edits)} edits, the largest differences first"
    if len(edits) > ROWS:
        title = f"The {ROWS} largest differences of {len(edits)} edits"
    print_table(beside_controls(found, terms).loc[largest], title)
    notes = edits.loc[edits["difference_note"] != "", "difference_note"]
    for note, arms in notes.value_counts().items():
        say(f"Intervals of {arms} of {len(edits)} edits: {note}.")
    if len(edits) > ROWS:
        say("All edits and controls: --table FILE.csv, or --json.")


def beside_controls(found: pd.DataFrame, terms: Terms) -> pd.DataFrame:
    """A row per edit with what fits a terminal; where there are controls, with the mean of their differences."""
    import pandas as pd

    edits = found[found["kind"] == "edit"]
    shown = edits[["matrix", "side"]].copy()
    shown["sv"] = edits["svs"].fillna(edits["sv"].astype("string")) if "svs" in edits else edits["sv"]
    shown["value"] = edits["value"]
    for name in ("directions", "rung"):
        if name in edits and edits[name].nunique() > 1:
            shown[name] = edits[name]
    mean = f"mean_{terms.outcome}"
    shown[mean] = edits[mean]
    shown["difference"] = edits["difference"]
    shown["95 %"] = [
        "" if pd.isna(low) else f"[{cell('', low)}, {cell('', high)}]"
        for low, high in zip(edits["difference_low"], edits["difference_high"], strict=True)
    ]
    if (found["kind"] == "control").any():
        of = found[found["kind"] == "control"].groupby("of")["difference"]
        shown["controls"] = of.count().reindex(edits.index).astype("Int64")
        shown["their mean"] = of.mean().reindex(edits.index)
    shown["q"] = edits["q_value"]
    if "failure_rate" in edits:
        shown["failed"] = edits["failure_rate"]
    return shown.dropna(axis=1, how="all")


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
