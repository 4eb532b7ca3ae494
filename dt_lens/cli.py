"""The command line: each command a thin call of the Python API, errors as one sentence and exit status 2.

Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dt_lens.errors import DtLensError
from dt_lens.version import __version__

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["app", "main"]

app = typer.Typer(
    name="dt-lens",
    help="What the weights of a decision transformer do: singular directions, honest nulls, edits, paired rollouts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="A bundled model (hopper), a file or folder, or a Hugging Face hub id.")]
Given = Annotated[
    list[str] | None,
    typer.Option(
        "--given", "-g", metavar="NAME=VALUE", help="What the checkpoint does not tell, such as n_heads=1; repeatable."
    ),
]
Matrices = Annotated[
    str | None, typer.Option(help="Comma-separated names or patterns, such as '*.W_in,*.OV.*'; all by default.")
]
Seed = Annotated[int, typer.Option(min=0, help="Everything that samples repeats exactly with the same seed.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Worker processes; one a core by default.")]
Target = Annotated[float | None, typer.Option(help="The return to ask for, in the environment's units.")]
Raw = Annotated[bool, typer.Option("--raw", help="Weights and embeddings as stored, no LayerNorm folded in.")]


def main() -> None:
    """The entry point ``dt-lens``."""
    try:
        app(standalone_mode=True)
    except DtLensError as error:
        print(f"dt-lens: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("dt-lens: stopped.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (`dt-lens scan hopper | head`); there is nobody to tell.
        sys.stderr.close()
        sys.exit(141)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"dt-lens {__version__}")
        raise typer.Exit


@app.command()
def study(
    model: Model,
    episodes: Annotated[int, typer.Option(min=2, help="Paired episodes of every arm.")] = 50,
    matrices: Annotated[str, typer.Option(help="Which matrices to scan and to choose from.")] = "*.W_in,*.W_out,*.OV.*",
    edits: Annotated[int, typer.Option(min=1, help="Strong directions to edit, each with a weak one as contrast.")] = 2,
    value: Annotated[
        str, typer.Option(help="What a singular vector becomes: constant, zero, flip, random, or a number.")
    ] = "constant",
    target_return: Target = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the report; dt-lens-study/MODEL by default.")] = None,
    workers: Workers = None,
    video: Annotated[bool, typer.Option(help="Draw the worst-hit agent beside the unedited one.")] = True,
    given: Given = None,
) -> None:
    """The main job: scan, choose directions by itself, edit them beside controls, measure, report.

    Stopped and started again with the same settings, it goes on where it was.
    """
    folder = out or Path("dt-lens-study") / Path(model).name
    with _progress() as tell:
        tell("loading", 0.0)
        loaded = _load(model, given)
        from dt_lens.study.page import sentences
        from dt_lens.study.pipeline import Study

        command = shlex.join(["dt-lens", *sys.argv[1:]])
        result = Study(
            loaded,
            folder,
            model,
            _split(matrices) or [],
            episodes,
            edits,
            _number(value),
            seed,
            target_return,
            workers,
            video,
            command,
        ).run(tell)
    shown = [
        "role",
        "matrix",
        "side",
        "sv",
        "label",
        "cosine",
        "energy",
        "difference",
        "control_difference",
        "q",
        "verdict",
    ]
    _print_table(result.verdicts[shown], "Edits and their controls: mean paired difference of the return")
    for sentence in sentences(result):
        print(sentence.replace("**", ""))
    if result.video.reason:
        print(result.video.reason)
    print(f"\nThe report: {result.report}")


@app.command()
def scan(
    model: Model,
    top: Annotated[int, typer.Option(min=0, help="How many of the strongest matches to print; 0 for all.")] = 20,
    matrices: Matrices = None,
    embeddings: Annotated[
        str | None, typer.Option(help="Compare every side with these; natural pairings by default.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Only the first RANK directions of each matrix.")] = None,
    raw: Raw = False,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Write the whole table to this .csv file.")] = None,
    given: Given = None,
) -> None:
    """What every singular direction matches best, with p and q values under a random rotation."""
    with _progress() as tell:
        tell("loading", 0.0)
        loaded = _load(model, given)
        from dt_lens.svd import WeightSVD

        tell("decomposing", 0.3)
        svd = WeightSVD(loaded, rank, fold_layernorm=not raw)
        table = svd.scan(_split(matrices), seed=seed, embeddings=_split(embeddings))
    best = table.sort_values(["z"], ascending=False, kind="stable")
    _print_table(best.head(top) if top else best, f"The strongest of {len(table):,} comparisons")
    found = table["q_value"] < 0.05
    untrained = table["embedding"].isin(table.attrs["untrained"])
    print(f"{int(found.sum()):,} of {len(table):,} comparisons are discoveries at q < 0.05.")
    if untrained.any():
        print(f"With heads that were never trained: {int((found & untrained).sum())} of {int(untrained.sum()):,}.")
    if out:
        _write(out, lambda: table.to_csv(out, index=False))


@app.command()
def top(
    model: Model,
    matrix: Annotated[str, typer.Argument(help="A matrix, such as blocks.0.mlp.W_in.")],
    embedding: Annotated[str, typer.Argument(help="An embedding, such as action_out.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many directions.")] = 8,
    side: Annotated[str | None, typer.Option(help="read, write, query or key, where the matrix has two.")] = None,
    labels: Annotated[int, typer.Option(min=1, help="Labels at each pole.")] = 3,
    raw: Raw = False,
    given: Given = None,
) -> None:
    """The labels that a matrix's first directions point towards and away from."""
    loaded = _load(model, given)
    from dt_lens.svd import WeightSVD

    table = WeightSVD(loaded, fold_layernorm=not raw).top(matrix, embedding, k, side, labels)  # type: ignore[arg-type]
    rows = []
    for (sv, sigma), poles in table.groupby(["sv", "sigma"], sort=False):
        named = {
            pole: ", ".join(f"{r.label} {r.cosine:+.2f}" for r in group.itertuples())
            for pole, group in poles.groupby("pole", sort=False)
        }
        rows.append({"sv": sv, "sigma": sigma, "towards": named.get("+", ""), "away": named.get("-", "")})
    import pandas as pd

    _print_table(pd.DataFrame(rows), f"{matrix} × {embedding}")


@app.command()
def evaluate(
    model: Model,
    environment: Annotated[
        str | None, typer.Option("--environment", "--env", help="A Gymnasium id; the model's own by default.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="How many episodes; episode i starts from seed + i.")] = 100,
    seed: Seed = 0,
    target_return: Target = None,
    edit: Annotated[
        str | None, typer.Option(metavar="MATRIX", help="Also measure with this matrix edited, and compare.")
    ] = None,
    sv: Annotated[str, typer.Option(help="Which directions to edit: 0 or 0,1.")] = "0",
    side: Annotated[str | None, typer.Option(help="The side to edit, where the matrix has two.")] = None,
    value: Annotated[
        str, typer.Option(help="What a singular vector becomes: constant, zero, flip, random, or a number.")
    ] = "constant",
    workers: Workers = None,
    out: Annotated[Path | None, typer.Option(help="Write a row per episode to this .csv file.")] = None,
    given: Given = None,
) -> None:
    """Run an agent for many episodes and say how it does; with --edit, how an edited one does beside it."""
    loaded = _load(model, given)
    from dt_lens.behaviour.evaluate import evaluate as run
    from dt_lens.edits import SingularEdit

    def measured(what: str) -> Any:
        with _progress() as tell:
            return run(
                loaded,
                environment,
                episodes=episodes,
                seed=seed,
                target_return=target_return,
                workers=workers,
                progress=lambda done, total: tell(what, done / total),
            )

    change = None
    if edit is not None:
        change = SingularEdit(loaded, edit, _indices(sv), side=side, value=_number(value), seed=seed)  # type: ignore[arg-type]
    baseline = measured("episodes")
    print(baseline)
    frames = {"unedited": baseline.to_frame()}
    if change is not None:
        with change:
            edited = measured("edited episodes")
        print(f"\n{edited.compare(baseline)}")
        if change.note:
            print(change.note)
        frames["edited"] = edited.to_frame()
    if out:
        import pandas as pd

        table = frames["unedited"] if change is None else pd.concat(frames, names=["arm"]).reset_index(level=0)
        _write(out, lambda: table.to_csv(out, index=False))


@app.command()
def certify(model: Model, seed: Seed = 0, given: Given = None) -> None:
    """Prove by a forward pass that every matrix's name, orientation, scale and heads are right."""
    loaded = _load(model, given, check=False)
    from dt_lens.certification import certify as prove

    certificate = prove(loaded, seed)
    import pandas as pd

    _print_table(
        pd.DataFrame({"matrix": certificate.errors.keys(), "relative error": certificate.errors.values()}),
        f"{model}: certified",
    )
    print(certificate)


@app.command()
def train(
    dataset: Annotated[str, typer.Argument(help="A Minari data set id, local or downloadable.")] = "hopper/climb-v0",
    out: Annotated[Path, typer.Option(help="The folder to write; a run that was stopped there goes on.")] = Path(
        "runs/hopper"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps.")] = 6_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in a batch.")] = 64,
    context: Annotated[int, typer.Option(min=1, help="Steps that the agent looks back.")] = 20,
    d_model: Annotated[int, typer.Option(min=1, help="Width of the residual stream.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Blocks.")] = 3,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads of a block.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    seed: Seed = 0,
    targets: Annotated[
        str | None, typer.Option(help="Comma-separated target returns to evaluate at, the default first.")
    ] = None,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations; 0 for none.")] = 2_000,
    eval_episodes: Annotated[int, typer.Option(min=1, help="Episodes at each target.")] = 8,
    environment: Annotated[
        str | None, typer.Option("--environment", "--env", help="Where to evaluate; the data set's own by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on from a stopped run in the folder.")] = False,
) -> None:
    """Train a decision transformer on a Minari data set; writes Hugging Face's format."""
    from dt_lens.training.train import train as fit

    goals = None if targets is None else [_float(t, "targets") for t in targets.split(",")]
    with _progress() as tell:

        def report(p: Any) -> None:
            returns = ", ".join(f"{target:g} → {got:.0f}" for target, got in p.returns.items())
            tell(f"loss {p.loss:.4f}" + (f"  target → return {returns}" if returns else ""), p.step / p.steps)

        fit(
            dataset,
            out,
            steps=steps,
            batch_size=batch_size,
            context=context,
            d_model=d_model,
            n_layers=layers,
            n_heads=heads,
            lr=lr,
            seed=seed,
            targets=goals,
            eval_every=eval_every,
            eval_episodes=eval_episodes,
            environment=environment,
            device=device,
            resume=not fresh,
            report=report,
        )
    print(f"The model: {out}")


@app.command()
def record(
    environment: Annotated[
        str, typer.Argument(help="A Gymnasium id with flat continuous states and actions.")
    ] = "Hopper-v5",
    dataset: Annotated[str, typer.Option(help="The Minari id to store it under.")] = "hopper/climb-v0",
    steps: Annotated[int, typer.Option(min=1, help="Environment steps of the search for the expert.")] = 2_500_000,
    pace_steps: Annotated[int, typer.Option(min=1, help="Environment steps of the search for each pace.")] = 400_000,
    paces: Annotated[
        str, typer.Option(help="Comma-separated fractions of the expert's speed; empty for none.")
    ] = "0.75,0.55,0.35,0.15",
    candidates: Annotated[int, typer.Option(min=1, help="Episodes to roll out.")] = 3_000,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes to keep at most.")] = 1_500,
    seed: Seed = 0,
    workers: Workers = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where the state is kept, so that a stopped recording goes on.")
    ] = None,
) -> None:
    """Train an expert by random search and store its climb, from random to expert, as a Minari data set."""
    from dt_lens.training.record import record as make

    fractions = [_float(p, "paces") for p in paces.split(",") if p.strip()]
    with _progress() as tell:
        stored = make(
            environment,
            dataset,
            seed=seed,
            steps=steps,
            paces=fractions,
            pace_steps=pace_steps,
            candidates=candidates,
            episodes=episodes,
            workers=workers,
            folder=folder,
            report=lambda phase, done, total, words: tell(f"{phase}: {words}", min(1.0, done / max(total, 1))),
        )
    print(f"The data set: {stored}")


def _load(model: str, given: list[str] | None, check: bool = True) -> Any:
    values: dict[str, Any] = {}
    for item in given or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise DtLensError(f"--given is {item!r}; expected NAME=VALUE, such as n_heads=1.")
        try:
            values[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            values[name.replace("-", "_")] = value
    from dt_lens.lens import load

    return load(model, check=check, **values)


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _float(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DtLensError(f"--{option} holds {text!r}; expected numbers separated by commas.") from None


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _indices(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DtLensError(f"--sv is {text!r}; expected an index or several with commas, such as 0,1.") from None


def _write(file: Path, write: Callable[[], object]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        raise DtLensError(
            f"{file} cannot be written: {error.strerror or error}; choose another file or make room."
        ) from error
    print(f"Written: {file}", file=sys.stderr)


def _print_table(table: pd.DataFrame, title: str) -> None:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Into a file or a pipe, nothing is cut to some terminal's width.
    console = Console(width=None if sys.stdout.isatty() else 240)
    shown = Table(
        title=Text(title), title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0)
    )
    for name in table.columns:
        shown.add_column(str(name), justify="right" if pd.api.types.is_numeric_dtype(table[name]) else "left")
    for row in table.itertuples(index=False):
        shown.add_row(*(Text(_cell(name, value)) for name, value in zip(table.columns, row, strict=True)))
    console.print(shown)


def _cell(name: str, value: Any) -> str:
    import pandas as pd

    if value is None or value is pd.NA:
        return ""
    if isinstance(value, float):
        small = name in ("p_value", "q_value", "q", "relative error")
        return f"{value:.1e}" if small else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"
    return str(value)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on standard error; where that is no terminal, a line whenever what is being done changes."""
    if not sys.stderr.isatty():
        last = [""]

        def line(what: str, share: float) -> None:
            kind = what.partition("  ")[0].rstrip("0123456789.")
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
