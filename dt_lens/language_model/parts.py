"""A language model's weights as attributes of its blocks, as TransformerLens's models have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["Blocks", "Part"]


class Part:
    """The live weights below one prefix: ``model.blocks[0].attn.W_O``.

    Args:
        prefix: such as ``"blocks.0"``.
        names: the canonical names of all weights.
        weight: gives one of them.
    """

    def __init__(self, prefix: str, names: tuple[str, ...], weight: Callable[[str], Tensor]) -> None:
        self._prefix, self._weight = prefix, weight
        self._names = tuple(name for name in names if name.startswith(f"{prefix}."))

    def __getattr__(self, name: str) -> Any:
        full = f"{self._prefix}.{name}"
        if not name.startswith("_"):
            if full in self._names:
                return self._weight(full)
            if any(known.startswith(f"{full}.") for known in self._names):
                return Part(full, self._names, self._weight)
        raise AttributeError(f"The model has no weight {full!r}; list(model.weights) names those that it has.")

    def __dir__(self) -> list[str]:
        return sorted({name[len(self._prefix) + 1 :].partition(".")[0] for name in self._names})

    def __repr__(self) -> str:
        return f"{self._prefix}: {', '.join(self.__dir__())}"


class Blocks:
    """The blocks of a model, by number."""

    def __init__(self, count: int, names: tuple[str, ...], weight: Callable[[str], Tensor]) -> None:
        self._count, self._names, self._weight = count, names, weight

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"{self._count} blocks; in each, {', '.join(dir(self[0]))}" if self._count else "no blocks"

    def __getitem__(self, layer: int) -> Part:
        return Part(f"blocks.{range(self._count)[layer]}", self._names, self._weight)

    def __iter__(self) -> Iterator[Part]:
        return (self[layer] for layer in range(self._count))
