"""What a sweep will do, decided before anything runs: its arms, its blocks, and the options that identify it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = [
    "FORMAT",
    "FORMATS",
    "Arm",
    "Block",
    "Plan",
    "block_size_of",
    "edit_of",
    "identity_of",
    "merge_arms",
    "split_units",
    "summarise",
    "sv_of",
]

FORMAT = 3
FORMATS = (2, 3)  # those that can be read; 2 had no tasks, and agents only
LARGEST = 16  # units of a block: as many episodes as an agent runs side by side
SIDES = ("query", "key", "read", "neuron", "head", "write")  # left of a matrix before right, for any matrix

# What all arms of a file share, besides the task and its provenance: a file can take more arms and more units, but none
# that differ in one of these.
IDENTITY = ("seed", "fold_layernorm", "halving")
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
    sv: int | None = None  # None also for an edit of several directions
    value: str | None = None
    control: int | None = None  # the control's seed
    match: str | None = None  # what a control shares with its edit: frobenius, output
    directions: str | None = None  # plain, activation
    record: dict[str, Any] | None = None  # of the edit, as its to_dict gives it


class Block(NamedTuple):
    """One arm with a block of the task's units: what is run, written and resumed whole."""

    number: int
    arm: int
    first: int  # number of the first unit
    size: int

    @property
    def units(self) -> range:
        """The numbers of the units."""
        return range(self.first, self.first + self.size)


@dataclass(frozen=True)
class Plan:
    """Everything that decides a sweep's results: another run with the same plan resumes where one stopped."""

    options: Mapping[str, Any]  # plain JSON values
    arms: Sequence[Arm]
    provenance: Sequence[str] = ()  # the options on which the bits of an outcome depend, besides model and setting
    catalogue: Sequence[str] = ()  # names of all matrices, in the order of a table
    block_size: int | None = None  # None for the default

    def difference(self, other: Mapping[str, Any]) -> str | None:
        """Why a file with the options ``other`` cannot hold this plan, in words; ``None`` if it can."""
        mine = json.loads(json.dumps(self.options))
        if other["format"] not in FORMATS:
            return f"its format is {short(other['format'])} and this version of dt-lens writes {FORMAT}"
        here, there = self._identity(mine), self._identity(other)
        for name in {**here, **there}:
            one, two = differing(there.get(name), here.get(name))
            if one != two and not (name in UNKNOWN_IN_OLD_FILES and one is None):
                return f"its {name} is {short(one)} and this one's {short(two)}"
        here, there = mine.get("activations") or {}, other.get("activations") or {}
        if here and there and here["digest"] != there["digest"]:
            return f"its activations are {there['digest']} and this one's {here['digest']}"
        return None

    def _identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What is shared by all arms of a file with these options, by name."""
        task = options["task"]
        own = {name: task[name] for name in ("outcome", "better", "measures")}
        return {
            "task": task["task"],
            "model": options["model"],
            **own,
            **task["setting"],
            **{name: options.get(name) for name in (*IDENTITY, *self.provenance)},
        }

    def repeats_sample(self, other: Mapping[str, Any]) -> bool:
        """Whether a little of what the unedited model does comes to the same bits here as for the options ``other``.

        True as well where this cannot be known: in old files, which do not hold it, and for a model that never repeats.
        """
        here, there = self.options.get("sample"), other.get("sample")
        return here is None or there is None or here == there


def differing(one: Any, other: Any) -> tuple[Any, Any]:
    """The entries in which two mappings differ; anything else unchanged."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return one, other
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return {name: one.get(name) for name in names}, {name: other.get(name) for name in names}


def short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def block_size_of(units: int, wanted: int | None) -> int:
    """Units in a block: about ``LARGEST``, in blocks of nearly equal size.

    >>> [block_size_of(n, None) for n in (12, 16, 20, 100)]
    [12, 16, 10, 15]
    """
    return min(units, wanted) if wanted else math.ceil(units / math.ceil(units / LARGEST))


def split_units(units: Iterable[int], wanted: int | None) -> Iterator[tuple[int, int]]:
    """Split ``units`` into blocks: the first unit of each and how many it has; no block spans a gap.

    >>> list(split_units([0, 1, 2, 3, 4, 9], 3)), list(split_units(range(20), None))
    ([(0, 3), (3, 2), (9, 1)], [(0, 10), (10, 10)])
    """
    ordered, first = sorted(units), 0
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


def edit_of(record: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The record of an edit, also from that of its control; empty for the baseline."""
    found = record or {}
    return found["of"] if found.get("kind") == "control" else found


def sv_of(record: Mapping[str, Any]) -> tuple[int, ...]:
    """The directions of an edit's record."""
    sv = record.get("sv", ())
    return tuple(sv) if isinstance(sv, Sequence) else (sv,)


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
        edit = edit_of(arm.record)
        where = named[arm.matrix], arm.directions != "plain", sv_of(edit), SIDES.index(arm.side), values[arm.value]
        # Given edits may differ in nothing but their seed or their folding.
        return (*where, identity_of(edit), *control)

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
        if arm.kind == "edit" and arm.matrix is not None:
            directions.setdefault(arm.matrix, {}).update(dict.fromkeys(sv_of(edit_of(arm.record))))
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
