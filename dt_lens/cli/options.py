"""Arguments and options that several commands share, and functions that parse their text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from dt_lens.cli.completion import VALUES, complete_matrix, complete_model, one_of
from dt_lens.cli.output import say
from dt_lens.errors import DtLensError

__all__ = [
    "Context",
    "Deterministic",
    "Device",
    "EditMatrices",
    "EditSide",
    "EditSv",
    "EditValue",
    "EditsFrom",
    "Environment",
    "Failure",
    "Fresh",
    "Given",
    "Json",
    "Matrices",
    "MaxSteps",
    "Model",
    "Quiet",
    "Raw",
    "Seed",
    "Target",
    "Text",
    "WeightsOnly",
    "Windows",
    "Workers",
    "activations_of",
    "edits_of",
    "failure_rule",
    "given_values",
    "json_object",
    "load_model",
    "number",
    "split",
    "task_options",
    "to_float",
]

Model = Annotated[
    str,
    typer.Argument(
        help="A bundled model (hopper, taxi, doorkey, unlockpickup, tiny-gpt2), a file or folder, or a hub id of "
        "Hugging Face's.",
        autocompletion=complete_model,
    ),
]
Given = Annotated[
    list[str] | None,
    typer.Option(
        "--given",
        "-g",
        metavar="NAME=VALUE",
        help="A value that the checkpoint does not record, such as n_heads=1, or adapter=NAME; may be repeated.",
    ),
]
Matrices = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated names or patterns, such as '*.W_in,*.OV.*'; all matrices by default.",
        autocompletion=complete_matrix,
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed; the same seed gives the same results.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Number of worker processes; one per core by default.")]
Target = Annotated[
    float | None, typer.Option(help="Target return, in the environment's units; the agent's own by default.")
]
Environment = Annotated[
    str | None,
    typer.Option("--environment", "--env", help="Id of a Gymnasium environment; the model's own by default."),
]
Failure = Annotated[
    str | None,
    typer.Option(
        metavar="RULE",
        help="What counts as failing: terminated (the environment ends the episode), truncated (the time limit does), "
        "or a return to fall below; what the agent's dt_lens.json says by default, else a guess.",
        autocompletion=one_of("terminated", "truncated"),
    ),
]
Deterministic = Annotated[
    bool | None,
    typer.Option(
        "--deterministic/--stochastic",
        help="Of an agent with discrete actions: take the likeliest action, or sample one, by the episode's seed; what "
        "the agent's dt_lens.json says by default, else the likeliest.",
    ),
]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Cut episodes after this many steps.")]
Text = Annotated[Path | None, typer.Option(help="For a language model: a text file; its held-out text by default.")]
Context = Annotated[int | None, typer.Option(min=2, help="For a language model: tokens in a window.")]
Windows = Annotated[int | None, typer.Option(min=1, help="For a language model: the largest number of windows.")]
EditMatrices = Annotated[
    list[str] | None,
    typer.Option(
        "--edit",
        metavar="MATRIX",
        help="A matrix to edit, such as blocks.0.mlp.W_in; may be repeated.",
        autocompletion=complete_matrix,
    ),
]
EditSv = Annotated[
    list[str] | None,
    typer.Option(
        "--sv",
        help="Directions to edit, such as 0, 0-3 (both ends included) or 0,2; --sv=-1 is the last. One --sv for each "
        "--edit, or one for all; 0 by default.",
    ),
]
EditSide = Annotated[
    list[str] | None,
    typer.Option(
        "--side",
        help="The side to edit, read or write, if the matrix has both.",
        autocompletion=one_of("read", "write"),
    ),
]
EditValue = Annotated[
    list[str] | None,
    typer.Option(
        "--value",
        help="What the singular vector becomes: constant (the default), zero, flip, random, a number that multiplies "
        "sigma, replace:EMBEDDING:LABEL, towards:EMBEDDING:LABEL:DEGREES, or the JSON of a record's value.",
        autocompletion=one_of(*VALUES),
    ),
]
EditsFrom = Annotated[
    Path | None, typer.Option(help="Take the edits from a .json file that edit.save or save_edits wrote.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Use weights and embeddings as stored, without folding LayerNorm in.")]
Device = Annotated[str, typer.Option(help="The device to train on: cpu, cuda, ...")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start again instead of resuming a run in the folder.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and no tables; docs/command_line.md describes it.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show neither progress nor hints; warnings stay.")]
WeightsOnly = Annotated[
    bool,
    typer.Option(
        "--weights-only",
        help="Read only the weights of a language model, from its files as needed: for models bigger than memory.",
    ),
]


def load_model(model: str, given: list[str] | None, check: bool = True, weights_only: bool = False) -> Any:
    """Load the model that a command names, or only its weights, and print what had to be assumed of it.

    Raises:
        DtLensError: if an item of ``given`` is not NAME=VALUE, or the model cannot be loaded.
    """
    values = given_values(given)
    from dt_lens.lens.assumed import notes
    from dt_lens.lens.loading import load, open_checkpoint

    loaded = open_checkpoint(model, **values) if weights_only else load(model, check=check, **values)
    for note in notes(loaded):
        say(f"{model}: {note}", err=True)
    return loaded


def given_values(given: list[str] | None) -> dict[str, Any]:
    """The values that ``--given`` names.

    Raises:
        DtLensError: if an item is not NAME=VALUE.
    """
    values: dict[str, Any] = {}
    for item in given or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise DtLensError(f"--given is {item!r}; expected NAME=VALUE, such as n_heads=1.")
        name = name.strip().replace("-", "_")
        if not name or name in ("source", "check"):
            raise DtLensError(
                f"--given is {item!r}; {name or 'nothing'} is not a value that a checkpoint may lack, such as n_heads."
            )
        try:
            values[name] = json.loads(value)
        except RecursionError:
            raise DtLensError(f"--given is {item[:40]!r}...; its value is nested too deeply.") from None
        except ValueError:
            values[name] = value
    return values


def activations_of(model: Any, file: Path | None, needed: bool, seed: int, tell: Any) -> Any:
    """The file that ``--activations`` names, or activations collected from the model if a null needs them.

    Args:
        model: a wrapped model.
        file: the option's value.
        needed: whether the null that is asked for needs activations.
        seed: of an agent's episodes. A language model reads its held-out text, which needs no seed.
        tell: receives the progress.
    """
    if file is not None or not needed:
        return file
    from dt_lens.behaviour.collect_activations import collect_activations

    return collect_activations(model, seed=seed if model.can_act else 0, progress=tell)


def split(text: str | None, option: str) -> list[str] | None:
    """Split an option's text at commas that stand in no parentheses; ``None`` if the option was not given.

    Raises:
        DtLensError: if the text has no part.
    """
    if text is None:
        return None
    parts = [part.strip() for part in re.findall(r"(?:\([^()]*\)|[^,])+", text) if part.strip()]
    if not parts:
        raise DtLensError(
            f"--{option} is {text!r}, which names nothing; give one name or several with commas, or leave it out."
        )
    return parts


def to_float(text: str, option: str) -> float:
    """Parse one number of an option.

    Raises:
        DtLensError: if the text is not a number.
    """
    try:
        return float(text)
    except ValueError:
        raise DtLensError(f"--{option} holds {text!r}; expected numbers separated by commas.") from None


def json_object(text: str, option: str) -> dict[str, Any]:
    """Parse named values in JSON.

    Raises:
        DtLensError: if the text is not a JSON object.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise DtLensError(f'--{option} is {text[:80]!r}; expected a JSON object, such as {{"is_slippery": false}}.')
    return values


def number(text: str) -> str | float:
    """The number that a text holds, or the text itself, such as ``"zero"``."""
    try:
        return float(text)
    except ValueError:
        return text


def failure_rule(text: str | None) -> Any:
    """The failure rule that ``--failure`` names."""
    return None if text is None else number(text)


def edits_of(
    model: Any,
    matrices: list[str] | None,
    sv: list[str] | None,
    sides: list[str] | None,
    values: list[str] | None,
    file: Path | None,
    *,
    raw: bool,
    seed: int,
) -> list[Any]:
    """The edits that a command was given, not in force; none if it was given none.

    Raises:
        DtLensError: for edits that cannot be made, or options that do not fit one another.
    """
    from dt_lens.edits.several import load_edits, written_edits

    of_each = {"sv": sv, "side": sides, "value": values, "raw": raw}
    wrong = [f"--{name}" for name, given in of_each.items() if given]
    if file is not None:
        wrong = ["--edit"] * bool(matrices) + wrong
        if wrong:
            raise DtLensError(f"--edits-from says what the edits are; leave out {' and '.join(wrong)}.")
        return load_edits(model, file)
    if not matrices:
        if wrong:
            raise DtLensError(f"{' and '.join(wrong)} belong to an edit; say which matrix is edited with --edit.")
        return []
    return written_edits(model, matrices, sv or ["0"], sides or [], values or ["constant"], raw=raw, seed=seed)


def task_options(model: Any, **given: Any) -> dict[str, Any]:
    """What says which units a command runs: the options that were given, as ``evaluate`` takes them.

    Args:
        model: the loaded model.
        given: values of options by the name of the option with underscores; ``None`` if it was not given.

    Raises:
        DtLensError: for an option of another kind of model.
    """
    found = {name: value for name, value in given.items() if value is not None}
    of_readers = ("text", "context", "windows")
    wrong = [name for name in found if (name in of_readers) == model.can_act]
    if wrong:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in wrong)
        what = "an agent, which runs in an environment" if model.can_act else "a language model, which reads --text"
        raise DtLensError(f"The model is {what}; leave out {options}.")
    if "failure" in found:
        found["failure"] = failure_rule(found["failure"])
    if "text" in found:
        found["texts"] = found.pop("text")
    return found
