"""Arguments that several commands share, and how their text is read."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from dt_lens.errors import DtLensError

__all__ = [
    "Agent",
    "Environment",
    "Given",
    "Matrices",
    "MaxSteps",
    "Model",
    "Raw",
    "Seed",
    "Target",
    "WeightsOnly",
    "Workers",
    "indices",
    "load_model",
    "number",
    "split",
    "to_float",
]

Model = Annotated[
    str, typer.Argument(help="A bundled model (hopper, tiny-gpt2), a file or folder, or a Hugging Face hub id.")
]
Agent = Annotated[str, typer.Argument(help="A bundled agent (hopper), a file or folder, or a Hugging Face hub id.")]
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
Environment = Annotated[
    str | None, typer.Option("--environment", "--env", help="A Gymnasium id; the model's own by default.")
]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Cut episodes after this many steps.")]
Raw = Annotated[bool, typer.Option("--raw", help="Weights and embeddings as stored, no LayerNorm folded in.")]
WeightsOnly = Annotated[
    bool,
    typer.Option(
        "--weights-only", help="Read a language model's weights from its files as needed; bigger than memory."
    ),
]


def load_model(model: str, given: list[str] | None, check: bool = True, weights_only: bool = False) -> Any:
    values: dict[str, Any] = {}
    for item in given or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise DtLensError(f"--given is {item!r}; expected NAME=VALUE, such as n_heads=1.")
        try:
            values[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            values[name.replace("-", "_")] = value
    from dt_lens.lens.loading import load, open_checkpoint

    return open_checkpoint(model, **values) if weights_only else load(model, check=check, **values)


def split(text: str | None, option: str) -> list[str] | None:
    """The parts between commas; ``None`` where the option was not given."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise DtLensError(
            f"--{option} is {text!r}, which names nothing; name one or several with commas, or leave it out."
        )
    return parts


def to_float(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DtLensError(f"--{option} holds {text!r}; expected numbers separated by commas.") from None


def number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def indices(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DtLensError(f"--sv is {text!r}; expected an index or several with commas, such as 0,1.") from None
