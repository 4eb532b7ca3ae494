"""Named sets of labelled directions in the residual stream, and the registry that keeps models apart."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dt_lens.arguments import names
from dt_lens.errors import DtLensError, a_type, as_written, nearest
from dt_lens.lens.printing import Printed, Rows, grid_html, listed

__all__ = ["Embedding", "EmbeddingRegistry"]

StreamSide = Literal["in", "out"]


@dataclass(frozen=True, eq=False, repr=False)
class Embedding(Printed):
    """``n`` labelled directions in the residual stream.

    Attributes:
        directions: ``[n, d_model]``, raw: what the embedding or head itself holds; live where it is a view of a weight.
            Anything that ``torch.as_tensor`` takes will do.
        labels: one for each direction; numbered when left out.
        kind: what the directions stand for: ``"state"``, ``"action"``, ``"reward"`` (the return-to-go), ``"timestep"``,
            ``"token"``, ...
        side: ``"in"`` for what is put into the stream, ``"out"`` for what is read out of it.
        trained: whether the weights had a loss; an untrained head is a built-in null.
        layernorm: the scale ``[d_model]`` of the LayerNorm between these directions and the stream, if any.
        rms: that norm does not centre (RMSNorm).
        unit_offset: that norm multiplies by 1 + ``layernorm``.
        owner: the identity of the model they belong to; ``None`` for the user's own until they are registered.

    Raises:
        DtLensError: for directions that are not a matrix, are empty or not finite, for labels that do not fit, or a
            side that is neither ``"in"`` nor ``"out"``.

    >>> Embedding(torch.eye(3), ["x", "y", "z"]).kind
    'user'
    """

    directions: Tensor  # [n, d_model]; checked below, with an error sentence, since users make these
    labels: Sequence[str] = ()
    kind: str = "user"
    side: StreamSide = "in"
    trained: bool = True
    layernorm: Tensor | None = None  # [d_model]
    rms: bool = False
    unit_offset: bool = False
    owner: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.directions, Tensor) and self.directions.is_floating_point()):
            try:
                made = torch.as_tensor(self.directions).to(torch.float64)
            except (TypeError, ValueError, RuntimeError) as error:
                raise DtLensError(
                    f"Directions must be numbers [n, d_model], not {as_written(self.directions)}."
                ) from error
            object.__setattr__(self, "directions", made)
        if self.directions.ndim != 2 or not self.directions.numel():
            raise DtLensError(f"Directions have shape {list(self.directions.shape)}; expected [n, d_model].")
        if not isinstance(self.side, str) or self.side not in ("in", "out"):
            raise DtLensError(
                f"side is {self.side!r}; it must be 'in' (put into the stream) or 'out' (read out of it)."
            )
        if isinstance(self.labels, str) or not isinstance(self.labels, Iterable):
            raise DtLensError(f"labels is {as_written(self.labels)}; give a list with one label for each direction.")
        # Unlike isfinite, aminmax makes no copy of a large table.
        if not all(bool(torch.isfinite(end)) for end in self.directions.aminmax()):
            raise DtLensError("Directions hold NaN or infinite values; every entry must be finite.")
        n = len(self.directions)
        labels = [str(label) for label in self.labels] or [f"{self.kind} {i}" for i in range(n)]
        if len(labels) != n:
            raise DtLensError(f"There are {len(labels)} labels for {n} directions; give one label for each.")
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.directions)

    def _shown(self) -> tuple[str, Rows]:
        n, d = self.directions.shape
        title = f"Embedding{' ' + self.name if self.name else ''}: {n} direction{'s' * (n != 1)} in {d} dimensions"
        side = "in: put into the stream" if self.side == "in" else "out: read out of the stream"
        rows = [("kind", self.kind), ("side", side), ("labels", listed(self.labels, 6))]
        return title, rows if self.trained else [*rows, ("trained", "no (a built-in null)")]

    @property
    def scale(self) -> Float[Tensor, " d_model"] | None:
        """What the norm between these directions and the stream multiplies by, ``[d_model]``; ``None`` without one."""
        if self.layernorm is None or not self.unit_offset:
            return self.layernorm
        return self.layernorm.double() + 1

    @property
    def effective(self) -> Float[Tensor, "n d_model"]:
        """The directions ``[n, d_model]`` as they act on the stream, up to length: through the LayerNorm in between.

        A change ``e`` of a token before a LayerNorm of scale ``w`` moves the stream by ``diag(w) C e``, with ``C`` the
        centring; a head ``e`` behind one reads the stream along ``C diag(w) e``. The LayerNorm's division, and the part
        of its derivative along the token itself, depend on the token and are left out, as in every folding.
        """
        if self.scale is None:
            return self.directions
        e, w = self.directions.double(), self.scale.double()
        if self.rms:
            return w * e
        if self.side == "in":
            return w * (e - e.mean(-1, keepdim=True))
        return w * e - (w * e).mean(-1, keepdim=True)

    def index(self, label: str) -> int:
        """The row of a label.

        Raises:
            DtLensError: for an unknown label, with the nearest known one.
        """
        if label not in self.labels:
            raise DtLensError(f"{self.name or 'The embedding'} has no label {label!r}." + nearest(label, self.labels))
        return list(self.labels).index(label)


@dataclass(eq=False)
class EmbeddingRegistry(Mapping[str, Embedding]):
    """A model's embeddings by name, extensible in one line.

    ``registry["mine"] = Embedding(vectors, labels)`` adds a set; ``registry.relabel("state_in", [...])`` swaps labels.
    Embeddings of another model or of another dimension are refused, so that directions of different models are never
    compared by accident.

    Attributes:
        d_model: the stream's dimension.
        owner: the identity of the model.

    Raises:
        DtLensError: on getting or deleting an unknown name (with the nearest known one), and on setting a value that is
            not an ``Embedding``, has another dimension, or belongs to another model.
    """

    d_model: int
    owner: str
    _sets: dict[str, Embedding] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Embedding:
        if not isinstance(name, str) or name not in self._sets:
            raise DtLensError(
                f"There is no embedding {name!r}; there are {', '.join(self._sets)}." + nearest(name, self._sets)
            )
        return self._sets[name]

    def __setitem__(self, name: str, embedding: Embedding) -> None:
        if not isinstance(name, str):
            raise DtLensError(f"An embedding's name is {as_written(name)}; it must be text.")
        if not isinstance(embedding, Embedding):
            raise DtLensError(
                f"{name!r} must be an Embedding, not {a_type(embedding)}; write Embedding(directions, labels)."
            )
        if embedding.directions.shape[1] != self.d_model:
            raise DtLensError(
                f"The embedding {name!r} has directions of size {embedding.directions.shape[1]}; this model's stream "
                f"has {self.d_model}."
            )
        if embedding.layernorm is not None and tuple(embedding.layernorm.shape) != (self.d_model,):
            raise DtLensError(
                f"The embedding {name!r} has a LayerNorm scale of shape {list(embedding.layernorm.shape)}; "
                f"this model's stream has {self.d_model}."
            )
        if embedding.owner not in (None, self.owner):
            raise DtLensError(
                f"The embedding {name!r} belongs to another model; to compare across models on purpose, register a "
                "copy with owner=None."
            )
        self._sets[name] = replace(embedding, owner=self.owner, name=name)

    def __delitem__(self, name: str) -> None:
        del self._sets[self[name].name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sets)

    def __len__(self) -> int:
        return len(self._sets)

    def __contains__(self, name: object) -> bool:
        return name in self._sets

    def relabel(self, name: str, labels: Sequence[str]) -> None:
        """Give the set ``name`` other labels, one for each direction.

        Raises:
            DtLensError: for an unknown name, or another number of labels.
        """
        self._sets[name] = replace(self[name], labels=list(labels))

    def select(self, patterns: Sequence[str] | str | None = None) -> list[Embedding]:
        """The sets whose names match any shell-style pattern; all of them for ``None``.

        Raises:
            DtLensError: for something that is not a pattern, or one that matches nothing, with the nearest name.
        """
        if patterns is None:
            return list(self._sets.values())
        chosen: dict[str, Embedding] = {}
        for pattern in names(patterns, "embeddings"):
            matched = [name for name in self._sets if fnmatch.fnmatchcase(name, pattern)]
            chosen |= {name: self[name] for name in matched or [self[pattern].name]}
        return list(chosen.values())

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "kind": found.kind,
                "side": found.side,
                "directions": len(found),
                "trained": "yes" if found.trained else "no (a built-in null)",
                "labels": ", ".join(list(found.labels)[:4]) + (", ..." if len(found) > 4 else ""),
            }
            for name, found in self._sets.items()
        ]

    def __repr__(self) -> str:
        lines = [
            f"{r['name']:<14}{r['kind']:<10}{r['side']:<5}{r['directions']:>6}  trained: {r['trained']:<21} "
            f"{r['labels']}"
            for r in self._rows()
        ]
        return "\n".join([f"EmbeddingRegistry of {len(self)} sets in {self.d_model} dimensions", *lines])

    def _repr_html_(self) -> str:
        rows = self._rows()
        title = f"EmbeddingRegistry of {len(self)} sets in {self.d_model} dimensions"
        return grid_html(rows[0] if rows else (), [row.values() for row in rows], title)
