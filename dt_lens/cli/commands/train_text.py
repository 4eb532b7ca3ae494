"""The command `train-text`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dt_lens.cli.options import Seed
from dt_lens.cli.output import progress


def train_text(
    sources: Annotated[
        list[Path], typer.Argument(help="Text files, in UTF-8; .html ones are stripped, .gz and .dz ones unpacked.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; a run that was stopped there goes on.")] = Path(
        "runs/text"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps.")] = 4_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in a batch.")] = 16,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 128,
    vocabulary: Annotated[int, typer.Option(min=257, help="Tokens that the tokenizer knows.")] = 3_072,
    d_model: Annotated[int, typer.Option(min=1, help="Width of the residual stream.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Blocks.")] = 4,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads of a block.")] = 4,
    dropout: Annotated[float, typer.Option(min=0.0, help="In training only.")] = 0.0,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    unwrap: Annotated[
        bool, typer.Option("--unwrap", help="Join the lines of a paragraph, where they end at a page's width.")
    ] = False,
    held_out: Annotated[float, typer.Option(help="Share of the text that is not trained on.")] = 0.015,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between held-out losses; 0 for the last only.")] = 250,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on from a stopped run in the folder.")] = False,
) -> None:
    """Train a small GPT-2 and its tokenizer on text files; writes Hugging Face's format."""
    from dt_lens.training.text import train_text as fit

    with progress() as tell:

        def report(p: Any) -> None:
            tell(f"loss {p.loss:.3f}" + (f"  held out {p.held_out:.3f}" if p.held_out else ""), p.step / p.steps)

        fit(
            sources,
            out,
            steps=steps,
            batch_size=batch_size,
            context=context,
            vocabulary=vocabulary,
            d_model=d_model,
            n_layers=layers,
            n_heads=heads,
            dropout=dropout,
            lr=lr,
            unwrap=unwrap,
            held_out=held_out,
            eval_every=eval_every,
            seed=seed,
            device=device,
            resume=not fresh,
            report=report,
        )
    print(f"The model: {out}")
