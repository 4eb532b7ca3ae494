"""The command `train-text`: a small language model from text files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dt_lens.arguments import require_writable
from dt_lens.cli.options import Device, Fresh, Seed
from dt_lens.cli.output import print_next, progress, say, training_in
from dt_lens.training.settings import TextSettings

if TYPE_CHECKING:
    from dt_lens.training.text import TextProgress

EXAMPLES = (
    "dt-lens train-text *.txt --out runs/text",
    "dt-lens train-text notes.txt --steps 200 --out runs/notes",
)


def train_text(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Text files in UTF-8; of .html files the text is taken, .gz and .dz files are unpacked."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; an interrupted run in it is resumed.")] = Path(
        "runs/text"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps.")] = TextSettings.steps,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in a batch.")] = TextSettings.batch_size,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = TextSettings.context,
    vocabulary: Annotated[
        int, typer.Option(min=257, help="Tokens of the tokenizer, including the 256 bytes.")
    ] = TextSettings.vocabulary,
    d_model: Annotated[int, typer.Option(min=1, help="Width of the residual stream.")] = TextSettings.d_model,
    layers: Annotated[int, typer.Option(min=1, help="Number of blocks.")] = TextSettings.n_layers,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads in each block.")] = TextSettings.n_heads,
    dropout: Annotated[float, typer.Option(min=0.0, help="Dropout rate in training.")] = TextSettings.dropout,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = TextSettings.lr,
    unwrap: Annotated[
        bool,
        typer.Option("--unwrap", help="Join the lines of each paragraph, for text that is wrapped at a page's width."),
    ] = False,
    held_out: Annotated[float, typer.Option(help="Share of the text to hold out of training.")] = TextSettings.held_out,
    eval_every: Annotated[
        int, typer.Option(min=0, help="Steps between held-out losses; 0 for the last step only.")
    ] = 250,
    seed: Seed = TextSettings.seed,
    device: Device = "cpu",
    fresh: Fresh = False,
) -> None:
    """Train a small GPT-2 and its tokenizer on text files and write them in Hugging Face's format."""
    require_writable(out / "checkpoint.pt")
    from dt_lens.training.text import train_text as fit

    settings = TextSettings(
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
        seed=seed,
    )
    reached = ""
    with progress() as tell, training_in(out):

        def report(p: TextProgress) -> None:
            nonlocal reached
            reached = f"step {p.step:,} of {p.steps:,}  loss {p.loss:.3f}"
            reached += f"  held out {p.held_out:.3f}" if p.held_out else ""
            tell(reached, p.step / p.steps)

        tell("reading the text and making its tokenizer", 0.0)

        fit(
            sources,
            out,
            settings,
            eval_every=eval_every,
            device=device,
            resume=not fresh,
            report=report,
        )
    say(f"Trained to {reached}" if reached else "All steps were done already.")
    say(f"The model: {out}")
    print_next("study", out)
