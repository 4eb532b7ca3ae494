"""What a sweep will do, decided before anything runs: its arms, its episodes, and the options that identify it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dt_lens.behaviour.agents.lanes import MOST_LANES

__all__ = ["SOFTWARE", "Arm", "Block", "Plan", "block_size_of", "identity_of", "merge_arms", "split_seeds", "summarise"]

FORMAT = 2
SOFTWARE = ("torch", "gymnasium", "mujoco", "numpy")  # another version of one of these may give other bits
SIDES = ("query", "key", "read", "neuron", "head", "write")  # left of a matrix before right, for any matrix

# What all arms of a file share: a file can take more arms and more episodes, but none that differ in one of these.
IDENTITY = (
    "model",
    "environment",
    "environment_kwargs",
    "target_return",
    "time_limit",
    "seed",
    "fold_layernorm",
    "halving",
    *(f"version of {name}" for name in SOFTWARE),
    "registration",
)
UNKNOWN_IN_OLD_FILES = ("registration",)  # accepted where a file lacks it, and then written


class Arm(NamedTuple):
    """One condition: the unedited model, an edit, or a control of an edit. Its record identifies it."""

    number: int  # its place in the table, from 0
    kind: str  # baseline, edit, control
    of: int | None = None  # the edit whose control this is
    matrix: str | None = None
    layer: int | None = None
    head: int | None = None
    side: str | None = None
    sv: int | None = None
    value: str | None = None
    control: int | None = None  # the control's seed
    match: str | None = None  # what a control shares with its edit: frobenius, output
    directions: str | None = None  # plain, activation
    record: dict[str, Any] | None = None  # of the edit, as its to_dict gives it


class Block(NamedTuple):
    """One arm with one block of seeds: a unit of work without its weights."""

    number: int
    arm: int
    seed: int
    episodes: int


@dataclass(frozen=True)
class Plan:
    """Everything that decides a sweep's results: another run with the same plan resumes where one stopped."""

    options: Mapping[str, Any]  # plain JSON values
    arms: Sequence[Arm]
    catalogue: Sequence[str] = ()  # names of all matrices, in the order of a table
    block_size: int | None = None  # None for the default

    def difference(self, other: Mapping[str, Any]) -> str | None:
        """Why a file with the options ``other`` cannot hold this plan, in words; ``None`` if it can."""
        mine = json.loads(json.dumps(self.options))
        if other["format"] != FORMAT:
            return f"its format is {_short(other['format'])} and this version of dt-lens writes {FORMAT}"
        for name in IDENTITY:
            there, here = _differing(other.get(name), mine.get(name))
            if there != here and not (name in UNKNOWN_IN_OLD_FILES and there is None):
                return f"its {name} is {_short(there)} and this one's {_short(here)}"
        here, there = mine.get("activations") or {}, other.get("activations") or {}
        if here and there and here["digest"] != there["digest"]:
            return f"its activations are {there['digest']} and this one's {here['digest']}"
        return None

    def repeats_first_steps(self, other: Mapping[str, Any]) -> bool:
        """Whether the agent's first steps come to the same bits here as for the file with the options ``other``.

        True as well where this cannot be known: in old files, which do not hold them, and for an agent whose first
        steps never repeat.
        """
        here, there = self.options.get("steps"), other.get("steps")
        return here is None or there is None or here == there


def _differing(one: Any, other: Any) -> tuple[Any, Any]:
    """The entries in which two mappings differ; anything else unchanged."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return one, other
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return {name: one.get(name) for name in names}, {name: other.get(name) for name in names}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def block_size_of(episodes: int, wanted: int | None) -> int:
    """Episodes per unit: about ``MOST_LANES``, in units of nearly equal size, so that none leaves lanes empty.

    >>> [block_size_of(n, None) for n in (12, 16, 20, 100)]
    [12, 16, 10, 15]
    """
    return min(episodes, wanted) if wanted else math.ceil(episodes / math.ceil(episodes / MOST_LANES))


def split_seeds(seeds: Iterable[int], wanted: int | None) -> Iterator[tuple[int, int]]:
    """Split ``seeds`` into units: the first seed and the number of episodes of each; no unit spans a gap.

    >>> list(split_seeds([0, 1, 2, 3, 4, 9], 3)), list(split_seeds(range(20), None))
    ([(0, 3), (3, 2), (9, 1)], [(0, 10), (10, 10)])
    """
    ordered, first = sorted(seeds), 0
    for end in range(1, len(ordered) + 1):
        if end < len(ordered) and ordered[end] == ordered[end - 1] + 1:
            continue
        size = block_size_of(end - first, wanted)
        for start in range(first, end, size):
            yield ordered[start], min(size, end - start)
        first = end


def identity_of(record: Mapping[str, Any] | None) -> str:
    """What identifies an arm across runs, as text: its edit's record, which the baseline does not have."""
    return json.dumps(record, sort_keys=True)


def merge_arms(arms: Iterable[Arm], kept: Iterable[Arm], catalogue: Sequence[str]) -> list[Arm]:
    """The arms of both, each once, ordered and numbered as in one plan of them all.

    The baseline comes first, then matrices as in ``catalogue``, ascending directions, sides, values in the order of
    ``arms``, and each edit is followed by its controls.
    """
    arms, kept = list(arms), list(kept)
    named = {name: place for place, name in enumerate(catalogue)}
    values = {value: place for place, value in enumerate(dict.fromkeys(arm.value for arm in (*arms, *kept)))}

    def place(arm: Arm) -> tuple[Any, ...]:
        if arm.matrix is None or arm.side is None:
            return (-1,)
        control = arm.kind == "control", arm.match or "", arm.control or 0
        where = named[arm.matrix], arm.directions != "plain", arm.sv, SIDES.index(arm.side), values[arm.value]
        return (*where, *control)

    every = {identity_of(arm.record): arm for arm in (*kept, *arms)}
    ordered = sorted(every.items(), key=lambda item: place(item[1]))
    numbers = {identity: number for number, (identity, _) in enumerate(ordered)}
    return [
        arm._replace(
            number=number,
            of=numbers[identity_of(arm.record["of"])] if arm.kind == "control" and arm.record is not None else None,
        )
        for number, (_, arm) in enumerate(ordered)
    ]


def summarise(arms: Sequence[Arm]) -> dict[str, Any]:
    """Which arms there are, in the form of a file's options."""
    directions: dict[str, dict[int, None]] = {}
    controls: dict[int, int] = {}
    for arm in arms:
        if arm.kind == "edit" and arm.matrix is not None and arm.sv is not None:
            directions.setdefault(arm.matrix, {})[arm.sv] = None
        elif arm.of is not None:
            controls[arm.of] = controls.get(arm.of, 0) + 1
    return {
        "matrices": list(directions),
        "sv": {name: list(chosen) for name, chosen in directions.items()},
        "sides": sorted({arm.side for arm in arms if arm.side is not None}),
        "edits": list(dict.fromkeys(arm.value for arm in arms if arm.value is not None)),
        "controls": max(controls.values(), default=0),
        "control_match": sorted({arm.match for arm in arms if arm.match is not None}),
        "directions": sorted({arm.directions for arm in arms if arm.directions is not None}),
        "baseline": any(arm.kind == "baseline" for arm in arms),
    }
