"""What the shell completes: bundled models, the names of their matrices and embeddings, and words of options.

It runs at every press of Tab, so it reads a bundled model's ``config.json`` and imports nothing heavy. Of any other
checkpoint nothing is completed: finding out would take seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dt_lens.zoo.models import bundled

__all__ = [
    "NULLS",
    "VALUES",
    "complete_embedding",
    "complete_matrix",
    "complete_model",
    "complete_subject",
    "embedding_names",
    "matrix_names",
    "one_of",
]

# Names that other rooms know, which import too much for a press of Tab; a test compares them.
NULLS = ("haar", "covariance", "spectrum", "bands", "untrained", "shuffled")
VALUES = ("constant", "zero", "flip", "random", "replace:", "towards:")

_OF_LAYER = ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O")
_OF_HEAD = ("attn.OV", "attn.QK")
_OF_MLP = ("mlp.W_in", "mlp.W_out")
_OF_AGENT = ("state_in", "action_in", "reward_in", "timestep_in", "action_out", "state_out", "reward_out")
_OF_TEXT = ("token_in", "token_out", "position_in")


def matrix_names(model: str) -> list[str]:
    """The names of a bundled model's matrices, in their order; none of another model."""
    config = _config(model)
    names = []
    for layer in range(config.get("n_layer", 0)):
        names += [f"blocks.{layer}.{part}" for part in _OF_LAYER]
        names += [f"blocks.{layer}.{part}.{head}" for head in range(config["n_head"]) for part in _OF_HEAD]
        names += [f"blocks.{layer}.{part}" for part in _OF_MLP]
    return names


def embedding_names(model: str) -> list[str]:
    """The names of a bundled model's embeddings, in their order; none of another model."""
    config = _config(model)
    if not config:
        return []
    return list(_OF_AGENT if config["model_type"] == "decision_transformer" else _OF_TEXT)


def complete_model(incomplete: str) -> list[str]:
    """The bundled models whose names begin so, and files beside them; where there is no model, the shell adds files."""
    names = [name for name in bundled() if name.startswith(incomplete)]
    if names and incomplete:
        found = sorted(file for file in Path().iterdir() if file.name.startswith(incomplete))
        names += [f"{file}/" if file.is_dir() else str(file) for file in found if file.name not in names]
    return names


def one_of(*words: str) -> Callable[[str], Iterator[str]]:
    """A function that completes one of some words; after a comma the next one of a list."""

    def complete(incomplete: str) -> Iterator[str]:
        return _completed(incomplete, words)

    return complete


def complete_subject(incomplete: str) -> list[str]:
    """What ``dt-lens bench`` measures."""
    try:
        from dt_lens_benchmarks.subjects import SUBJECTS
    except ModuleNotFoundError:
        return []
    return [name for name in SUBJECTS if name.startswith(incomplete)]


def complete_matrix(ctx: Any, incomplete: str) -> Iterator[str]:
    """The matrices, of the model that was typed before, whose names begin so; after a comma the next one of a list."""
    return _completed(incomplete, matrix_names(_model(ctx)))


def complete_embedding(ctx: Any, incomplete: str) -> Iterator[str]:
    """The same for embeddings."""
    return _completed(incomplete, embedding_names(_model(ctx)))


def _completed(incomplete: str, names: Iterable[str]) -> Iterator[str]:
    before, comma, begun = incomplete.rpartition(",")
    return (f"{before}{comma}{name}" for name in names if name.startswith(begun))


def _model(ctx: Any) -> str:
    """The model that was typed; after an option without its value yet, typer has left it among the arguments."""
    return str(ctx.params.get("model") or next(iter(ctx.args), ""))


def _config(model: str) -> dict[str, Any]:
    folder = bundled().get(model)
    return {} if folder is None else dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
