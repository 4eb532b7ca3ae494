"""How an observation becomes the flat state vector that a decision transformer reads, and the names of its numbers.

Numbers are those of ``gymnasium.spaces.flatten``: a discrete value becomes one-hot, a ``Dict`` or ``Tuple`` is joined.
A ``Dict`` is taken in the order of its sorted keys, as Gymnasium sorts those of a plain dictionary: a data set stores
its parts by name, so another order would not survive it. A text, such as MiniGrid's mission, is not a number: the
facts of a model say that it is ignored, or which texts there are, and then it is one-hot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from dt_lens.errors import DtLensError, as_written

__all__ = ["Part", "StateVector", "is_text", "leaves", "ordered", "part_names"]

Space = spaces.Space[Any]
Path = tuple[str | int, ...]


def is_text(space: Space) -> bool:
    """Whether a space's values are texts: Gymnasium's ``Text``, or a class of its own such as MiniGrid's missions."""
    return space.dtype is not None and np.dtype(space.dtype).kind == "U"


def ordered(space: spaces.Dict) -> list[str]:
    """The keys of a ``Dict``, sorted; as they stand where they cannot be compared."""
    try:
        return sorted(space.spaces)
    except TypeError:
        return list(space.spaces)


def leaves(space: Space, ignores: Sequence[str] = (), path: Path = ()) -> Iterator[tuple[str, Path, Space]]:
    """The parts of an observation that are not ``Dict`` or ``Tuple``, in order: name, where it is, its space.

    A name is the keys and places on the way joined by points, such as ``"mission"``, ``"1"`` or ``"goal.colour"``; it
    is empty for an observation that has no parts. A part named in ``ignores`` is left out, with all that is in it.
    """
    name = ".".join(map(str, path))
    if path and name in ignores:
        return
    if isinstance(space, spaces.Dict):
        for key in ordered(space):
            yield from leaves(space[key], ignores, (*path, key))
    elif isinstance(space, spaces.Tuple):
        for place, part in enumerate(space.spaces):
            yield from leaves(part, ignores, (*path, place))
    else:
        yield name, path, space


def part_names(space: Space) -> list[str]:
    """The names of all parts of an observation, and of what holds them."""
    found: dict[str, None] = {}
    for _, path, _ in leaves(space):
        found |= dict.fromkeys(".".join(map(str, path[:end])) for end in range(1, len(path) + 1))
    return list(found)


@dataclass(frozen=True)
class Part:
    """One part of an observation: ``size`` numbers of the state vector."""

    name: str
    path: Path
    space: Space | None  # None for a text
    texts: tuple[str, ...]  # that it may be, if it is a text
    size: int
    channels_last: bool = False  # an image whose channels the model reads first
    pixels: float = 1.0  # what its whole numbers are divided by

    @property
    def one_hot(self) -> bool:
        """Whether its numbers are zeros and ones that say which value it has."""
        return self.space is None or isinstance(self.space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary)

    @property
    def shown(self) -> str:
        """Its name in labels: ``"mission"``, ``"observation 1"``, ``"observation"``."""
        return f"observation {self.name}".strip() if not self.name or self.name[0].isdigit() else self.name

    @property
    def labels(self) -> list[str]:
        """``[size]``, such as ``"direction = 2"``, ``"image (3, 4, 2)"``, ``"mission: get the red key"``."""
        shown, space = self.shown, self.space
        if space is None:
            return [f"{shown}: {text}" for text in self.texts]
        if isinstance(space, spaces.Discrete):
            return [f"{shown} = {int(space.start) + i}" for i in range(self.size)]
        if isinstance(space, spaces.MultiDiscrete):
            starts, sizes = np.ravel(space.start), np.ravel(space.nvec)
            places = np.ndindex(space.nvec.shape)
            return [
                f"{shown} {_place(at)} = {int(start) + i}"
                for at, start, n in zip(places, starts, sizes, strict=True)
                for i in range(int(n))
            ]
        shape = space.shape
        if not shape or self.size != int(np.prod(shape)):
            return [shown] if self.size == 1 else [f"{shown} {i}" for i in range(self.size)]
        return [f"{shown} {_place(at)}" for at in np.ndindex(shape)]

    def flat(self, value: Any, whose: str) -> NDArray[np.float64]:
        """Its value as ``[size]``."""
        if self.channels_last or self.pixels != 1:
            value = np.moveaxis(np.asarray(value), -1, 0) if self.channels_last else value
            return np.asarray(value, dtype=np.float64).reshape(-1) / self.pixels
        if self.space is not None:
            return np.asarray(spaces.flatten(self.space, value), dtype=np.float64).reshape(-1)
        found = np.zeros(self.size)
        if value not in self.texts:
            raise DtLensError(
                f"{whose} gave the text {as_written(str(value))} as {self.shown!r}, which is none of the {self.size} "
                f"that this model reads; train on data that have it, or with ignores=[{self.name!r}]."
            )
        found[self.texts.index(value)] = 1.0
        return found


def _place(at: tuple[int, ...]) -> str:
    return str(at[0]) if len(at) == 1 else str(tuple(map(int, at)))


@dataclass(frozen=True)
class StateVector:
    """The parts of an observation that make up the state vector, in order. Make one with ``StateVector.of``."""

    parts: tuple[Part, ...]
    whose: str = "The environment"  # for messages

    @classmethod
    def of(
        cls,
        space: Space,
        ignores: Sequence[str] | None = None,
        texts: Mapping[str, Sequence[str]] | None = None,
        whose: str = "The environment",
        image: Sequence[int] | None = None,
        pixels: float = 1.0,
    ) -> StateVector:
        """The vector of a space's observations.

        Args:
            space: of the observations.
            ignores, texts: as in ``RunFacts``.
            whose: what gives the observations, for messages.
            image: (channels, height, width) of the image that the model's state encoder reads, if it reads one. An
                observation that is such an image with its channels last, as Gymnasium's usually are, is turned.
            pixels: what the whole numbers of that image are divided by: 255 for an encoder that reads them from 0 to 1.

        Raises:
            DtLensError: for a text that is neither ignored nor known, and for a space that is not of one size.
        """
        found = []
        for name, path, leaf in leaves(space, ignores or ()):
            if is_text(leaf):
                if name not in (texts or {}):
                    raise DtLensError(_undeclared(whose, name))
                known = tuple((texts or {})[name])
                found.append(Part(name, path, None, known, len(known)))
                continue
            try:
                found.append(Part(name, path, leaf, (), int(spaces.flatdim(leaf))))
            except (NotImplementedError, ValueError) as error:
                part = f" {name!r}" if name else ""
                raise DtLensError(
                    f"{whose}'s observations{part} ({leaf}) cannot be flattened into a state vector."
                ) from error
        if image is not None and len(found) == 1 and isinstance(only := found[0].space, spaces.Box):
            scale = pixels if only.dtype == np.uint8 else 1.0
            found = [replace(found[0], channels_last=_channels_last(only, tuple(image)), pixels=scale)]
        return cls(tuple(found), whose)

    @property
    def size(self) -> int:
        """How many numbers a state has."""
        return sum(part.size for part in self.parts)

    @property
    def one_hot(self) -> NDArray[np.bool_]:
        """``[size]``, true for the numbers of discrete parts: zeros and ones, which are not normalised."""
        return np.repeat([part.one_hot for part in self.parts], [part.size for part in self.parts]).astype(bool)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """``[size]`` names of the numbers; ``None`` for an observation that is one ``Box`` or one ``Discrete``."""
        only = self.parts[0].space if len(self.parts) == 1 and not self.parts[0].path else None
        if isinstance(only, spaces.Box | spaces.Discrete):
            return None
        return tuple(label for part in self.parts for label in part.labels)

    def flat(self, observation: Any) -> NDArray[np.float64]:
        """An observation as ``[size]``.

        Raises:
            DtLensError: for a text that is not known.
        """
        found = []
        for part in self.parts:
            value = observation
            for key in part.path:
                value = value[key]
            if isinstance(part.space, spaces.Box) and len(part.space.shape) == 1 and part.pixels == 1:
                found.append(np.asarray(value, dtype=np.float64))
            else:
                found.append(part.flat(value, self.whose))
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0), *found])


def _channels_last(space: spaces.Box, image: tuple[int, ...]) -> bool:
    if len(space.shape) != 3 or space.shape == image:
        return False
    return (space.shape[2], *space.shape[:2]) == image


def _undeclared(whose: str, name: str) -> str:
    shown = f"a text, {name!r}," if name else "a text"
    return (
        f"{whose} gives {shown} which this model neither reads nor declares unused; give "
        f"ignores=[{name!r}] (-g 'ignores=[\"{name}\"]') if it does not read it, texts={{{name!r}: [...]}} if it reads "
        "it one-hot, or an environment with a wrapper that turns it into numbers, such as "
        "minigrid.wrappers.DictObservationSpaceWrapper."
    )
