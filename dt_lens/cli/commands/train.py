"""The commands `train` and `record`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dt_lens.cli.options import (
    Seed,
    to_float,
)
from dt_lens.cli.output import progress


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

    goals = None if targets is None else [to_float(t, "targets") for t in targets.split(",")]
    with progress() as tell:

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
