"""What replaces a singular vector: a value by name, a factor, a vector, or a direction of an embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from dt_lens.arguments import is_finite_number
from dt_lens.errors import DtLensError, a_type, as_written, nearest
from dt_lens.lens.embeddings import Embedding, EmbeddingRegistry
from dt_lens.svd.side_labels import unit_rows

__all__ = ["VALUES", "Replacements", "Value", "embedded_direction", "find_direction"]

Value = Literal["constant", "zero", "flip", "random"]
VALUES: tuple[str, ...] = get_args(Value)
FORMS = "{'replace': [embedding, label]} or {'towards': [embedding, label], 'angle': degrees}"
PARALLEL = 1e-6  # the sine of the angle below which two vectors span no plane


class Replacements:
    """Makes the vectors that replace singular vectors on one side of a matrix.

    Args:
        embeddings: the model's.
        folded: whether to use an embedding's effective directions, not its raw ones.
        centred: whether a norm that removes constants is folded into this side.
        residual: whether the side faces the residual stream, where the embeddings are.
        seed: of random vectors.
    """

    def __init__(
        self, embeddings: EmbeddingRegistry, *, folded: bool, centred: bool, residual: bool, seed: int
    ) -> None:
        self._embeddings = embeddings
        self._folded, self._centred, self._residual, self._seed = folded, centred, residual, seed

    def of(self, value: Any, old: Float[Tensor, "k d"]) -> tuple[Float[Tensor, "k d"], Any]:
        """The vectors that replace the unit rows ``old``, and the value as a record keeps it.

        On a centred side the vectors have no mean.

        Raises:
            DtLensError: for an unknown or malformed value.
        """
        meant = embedded_direction(value)
        if meant is not None:
            return self._towards(meant, old)
        new, kept = _wanted(value, old, self._seed)
        if self._centred and kept == "constant":
            new = torch.zeros_like(old)  # to the last bit
        elif self._centred and (kept == "random" or isinstance(kept, list)):
            new = new - new.mean(1, keepdim=True)
        if kept == "random":
            new = new / new.norm(dim=1, keepdim=True)
        return new, kept

    def _towards(
        self, meant: tuple[str, str | int, float | None], old: Float[Tensor, "k d"]
    ) -> tuple[Float[Tensor, "k d"], dict[str, Any]]:
        name, label, angle = meant
        unit, label = self._unit(name, label)
        unit = unit.to(old)
        # A direction has two poles and sigma has no sign: the nearer pole keeps the sign of what the matrix does.
        poles = torch.where(old @ unit < 0, -1.0, 1.0).to(old)[:, None] * unit
        if angle is None:
            return poles, {"replace": [name, label]}
        across = poles - (poles * old).sum(1, keepdim=True) * old
        lengths = across.norm(dim=1, keepdim=True)
        if bool((lengths < PARALLEL).any()):
            which = int((lengths.flatten() < PARALLEL).nonzero()[0])
            raise DtLensError(
                f"Direction {which} of those to be turned already lies along {label!r} of {name}, so there is no plane "
                "to turn it in; leave it out."
            )
        turn = math.radians(angle)
        turned = math.cos(turn) * old + math.sin(turn) * across / lengths
        return turned, {"towards": [name, label], "angle": angle}

    def _unit(self, name: str, label: str | int) -> tuple[Float[Tensor, " d"], str | int]:
        """A label's unit direction as seen from this side; and the label, or its row if the label is not unique."""
        if not self._residual:
            raise DtLensError(
                f"This side does not face the residual stream, where the embedding {name!r} is; edit the other side or "
                "give a vector."
            )
        embedding, row, shown = find_direction(self._embeddings, name, label)
        (unit,) = unit_rows(embedding, torch.tensor([row]), self._folded, self._centred)
        if not bool(unit.any()):
            raise DtLensError(
                f"The direction {embedding.labels[row]!r} of {name} is zero as seen from this side (a LayerNorm "
                "removes constants); name another."
            )
        return unit, shown


def embedded_direction(value: Any) -> tuple[str, str | int, float | None] | None:
    """Read a value that names an embedding's direction: (embedding, label or row, angle); ``None`` for other values.

    The angle is ``None`` if the direction replaces the vector.

    Raises:
        DtLensError: for a value that names a direction in a malformed way.
    """
    if isinstance(value, Mapping):
        keys, angle = set(value), value.get("angle")
        if keys not in ({"replace"}, {"towards", "angle"}):
            raise DtLensError(f"value is {dict(value)!r}; with an embedding it must be {FORMS}.")
        pair = value.get("replace", value.get("towards"))
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) and isinstance(value[0], str):
        pair, angle = value[:2], value[2] if len(value) > 2 else None
        keys = {"replace"} if len(value) == 2 else {"towards"}
        if len(value) > 3:
            raise DtLensError(f"value is {value!r}; give (embedding, label), or (embedding, label, degrees) to turn.")
    else:
        return None
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise DtLensError(f"value names {pair!r}; with an embedding it must be {FORMS}.")
    name, label = pair
    if not isinstance(name, str):
        raise DtLensError(f"An embedding is named by text, such as 'action_out', not {name!r}.")
    if isinstance(label, bool) or not isinstance(label, str | Integral):
        raise DtLensError(f"A label of {name} is text, or the number of its row, not {label!r}.")
    label = label if isinstance(label, str) else int(label)
    if "replace" in keys:
        return name, label, None
    if not is_finite_number(angle):
        raise DtLensError(f"The angle is {as_written(angle)}; it must be a number of degrees.")
    return name, label, float(angle)


def find_direction(embeddings: EmbeddingRegistry, name: str, label: str | int) -> tuple[Embedding, int, str | int]:
    """The embedding, the row of a label in it, and the label, or the row if an earlier one has the same label.

    Raises:
        DtLensError: for an embedding, a label or a row that does not exist.
    """
    embedding = embeddings[name]
    row = embedding.index(label) if isinstance(label, str) else label
    if not -len(embedding) <= row < len(embedding):
        raise DtLensError(f"{name} has {len(embedding)} directions, 0 to {len(embedding) - 1}, and no {row}.")
    row %= len(embedding)
    found = embedding.labels[row]
    return embedding, row, found if embedding.index(found) == row else row


def _wanted(value: Any, old: Float[Tensor, "k d"], seed: int) -> tuple[Tensor, Any]:
    """The vectors that a value other than an embedding's direction asks for, and the value as a record keeps it."""
    k, d = old.shape
    if isinstance(value, str):
        if value not in VALUES:
            raise DtLensError(
                f"value is {value!r}; it must be one of {', '.join(VALUES)}, a number, or a vector of {d} numbers."
                + nearest(value, VALUES)
            )
        if value == "random":
            return torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(old), value
        made = {"constant": torch.full_like(old, 1 / d), "zero": torch.zeros_like(old), "flip": -old}
        return made[value], value
    try:
        given = torch.as_tensor(value).detach()
        vector = torch.as_tensor(value, dtype=None if given.is_complex() else torch.float64).detach().to(old.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DtLensError(
            f"value is {a_type(value)}; it must be one of {', '.join(VALUES)}, a number, a vector, {FORMS}."
        ) from error
    if given.dtype == torch.bool or given.is_complex() or tuple(vector.shape) not in ((), (d,)):
        raise DtLensError(
            f"value holds {given.dtype} numbers of shape {list(vector.shape)}; it must be one of {', '.join(VALUES)}, "
            f"a real number, or a vector of {d} real numbers, the size of this side."
        )
    if not bool(torch.isfinite(vector).all()):
        raise DtLensError("value holds NaN or infinite numbers; all must be finite.")
    return (vector.expand(k, d) if vector.ndim else old * vector), vector.tolist()
