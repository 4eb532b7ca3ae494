"""Where each canonical weight is stored in a checkpoint: one declaration for live models and for files.

Every rule is a strided view (a slice, a split or a transposition of axes), so that one memory serves both sides, and a
file can be read one tensor, or one part of a fused tensor, at a time. A rule's einops pattern says which axes the
stored tensor has, in its order; so it also says the shape that the file must show. ``nn.Linear`` stores (out, in) and
GPT-2's ``Conv1D`` (in, out): where both are square nothing but the pattern, and certify, can tell them apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor

from dt_lens.errors import DtLensError, nearest

__all__ = ["At", "Interleaved", "Layout", "Part", "Stored"]


class Part(NamedTuple):
    """The ``which``-th of the parts of a fused tensor, side by side along ``axis``.

    ``of`` is the number of parts where they are equal, else the axes that each of them spans: ``("head e", "kv e",
    "kv e")``. A number among the axes stands for itself.
    """

    axis: int
    which: int
    of: int | tuple[str, ...]


class Interleaved(NamedTuple):
    """The ``which``-th of the ``of`` equal parts of each head of a fused tensor: head 0's query, key, value, head 1's.

    The pattern says where: it has an axis ``part`` in the stored tensor, and begins with it in the canonical one.
    """

    which: int
    of: int


class At(NamedTuple):
    """A family's rule for one canonical weight; ``{l}`` in ``key`` stands for the layer.

    ``pattern`` leads from the stored tensor, or its part, to the canonical one, with axes named ``vocab``, ``ctx``,
    ``d`` (d_model), ``head``, ``kv`` (heads of keys and values), ``e`` (d_head) and ``mlp``. ``when`` is a flag of the
    configuration; where it is false the weight does not exist.
    """

    key: str
    pattern: str
    part: Part | Interleaved | None = None
    when: str | None = None


class Stored(NamedTuple):
    """Where one canonical weight of one model is stored: a rule with its sizes filled in."""

    key: str
    pattern: str
    sizes: tuple[tuple[str, int], ...]
    shape: tuple[int, ...]  # of the whole stored tensor
    span: tuple[int, int, int] | None = None  # axis, start, stop of the part
    which: int | None = None  # of the interleaved parts

    @classmethod
    def of(cls, rule: At, sizes: Mapping[str, int], layer: int | None = None) -> Stored:
        """The rule for one layer of a model of these sizes."""
        key = rule.key if layer is None else rule.key.replace("{l}", str(layer))
        before = rule.pattern.split(" -> ")[0]
        span, which = None, None
        if isinstance(rule.part, Interleaved):
            sizes, which = {**sizes, "part": rule.part.of}, rule.part.which

        def width(group: str) -> int:
            return math.prod(int(axis) if axis.isdigit() else sizes[axis] for axis in group.strip("()").split())

        shape = [width(group) for group in re.findall(r"\([^)]*\)|\S+", before)]
        if isinstance(rule.part, Part):
            axis, index, of = rule.part
            widths = [shape[axis]] * of if isinstance(of, int) else [width(group) for group in of]
            start = sum(widths[:index])
            span, shape[axis] = (axis, start, start + widths[index]), sum(widths)
        used = {axis: sizes[axis] for axis in re.findall(r"\w+", before)}
        return cls(key, rule.pattern, tuple(sorted(used.items())), tuple(shape), span, which)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The part of the stored tensor that is this weight."""
        whole = [slice(None)] * len(self.shape)
        if self.span is not None:
            axis, start, stop = self.span
            whole[axis] = slice(start, stop)
        return tuple(whole)

    def view(self, tensor: Tensor) -> Tensor:
        """The canonical weight as a view of the whole stored tensor."""
        return self._arrange(tensor if self.span is None else tensor[self.slices])

    def read(self, file: Any, key: str | None = None) -> Tensor:
        """The canonical weight from an open safetensors file; only its own part is read or kept.

        Args:
            file: what ``safetensors.safe_open`` gives.
            key: the tensor's name in the file; ``self.key`` when omitted.
        """
        key = self.key if key is None else key
        if self.span is not None:
            return self._arrange(file.get_slice(key)[self.slices])
        found = self._arrange(file.get_tensor(key))
        return found if self.which is None else found.clone()  # a view would keep the other parts in memory

    def _arrange(self, tensor: Tensor) -> Tensor:
        found = rearrange(tensor, self.pattern, **dict(self.sizes))
        return found if self.which is None else found[self.which]


@dataclass(frozen=True)
class Layout:
    """All weights of one model, and which other keys a checkpoint of it may hold.

    Attributes:
        entries: where each canonical weight is stored, in the order of the forward pass.
        ignored: whole keys (regular expressions) that the model does not compute with.
        prefix: what older checkpoints leave out in front of every key but the unembedding's.
        n_layers: the number of blocks.
        block: the keys of a block begin with this, ``{l}`` for the layer.
        renamed: what files call some tensors, and their keys here.
    """

    entries: Mapping[str, Stored]
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    n_layers: int = 0
    block: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)

    def key_map(self, held: Iterable[str]) -> dict[str, str]:
        """Map this layout's keys to the checkpoint's own, which are the same or lack the prefix.

        Raises:
            DtLensError: naming a key that is missing, or one that this model has no place for.
        """
        held = list(held)
        bare = bool(self.prefix) and not any(key.startswith(self.prefix) for key in held)
        needed = {entry.key for entry in self.entries.values()}
        own: dict[str, str] = {}
        for key in held:
            full = self.renamed.get(key, key)
            full = f"{self.prefix}{key}" if bare and full == key and key not in needed else full
            if full in own:
                raise DtLensError(f"The checkpoint has {own[full]!r} and {key!r}, two names of one tensor; keep one.")
            if full in needed:
                own[full] = key
            elif not any(re.fullmatch(pattern, full) for pattern in self.ignored):
                raise DtLensError(self._unknown(key, full, needed))
        for entry in self.entries.values():
            if entry.key not in own:
                raise DtLensError(
                    f"The checkpoint has no tensor {entry.key!r}, which a model of its configuration needs."
                )
        return own

    def _unknown(self, key: str, full: str, needed: set[str]) -> str:
        pattern = re.escape(self.block).replace(re.escape("{l}"), r"([0-9]{1,6})\b")
        found = re.match(pattern, full) if self.block else None
        if found and int(found[1]) >= self.n_layers:
            return (
                f"The checkpoint has a tensor {key!r} of block {int(found[1])}, and its configuration says there are "
                f"{self.n_layers} blocks; the two do not belong together."
            )
        return f"The checkpoint has a tensor {key!r} that a model of its configuration has no place for." + nearest(
            key, needed
        )

    def require(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
        """``key_map``, with the shapes checked too.

        Args:
            shapes: the shape of every tensor that the checkpoint holds.

        Raises:
            DtLensError: naming a key that is missing, unknown, or of a shape that does not fit.
        """
        own = self.key_map(shapes)
        for entry in self.entries.values():
            shape = tuple(shapes[own[entry.key]])
            if shape != entry.shape:
                raise DtLensError(
                    f"The tensor {own[entry.key]!r} has shape {list(shape)}; {list(entry.shape)} was expected."
                )
        return own

    def views(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every canonical weight as a view of the checkpoint's tensors.

        Raises: as ``require``.
        """
        own = self.require({key: tensor.shape for key, tensor in tensors.items()})
        return {name: entry.view(tensors[own[entry.key]]) for name, entry in self.entries.items()}
