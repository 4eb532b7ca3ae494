"""Successive halving: every edit gets a few units, the half with larger differences more,
and those left at the end all of them.

The rungs before the last only select. They have units of their own, and an edit's p-value and effect come from the
units of the last rung alone, which the selection never saw; an edit that was stopped counts with p = 1. So an edit
without effect gets p <= alpha with probability at most alpha, as without halving. Algorithm: Jamieson and Talwalkar,
"Non-stochastic best arm identification and hyperparameter optimization", 2016.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dt_lens.behaviour.sweep.schema import quoted
from dt_lens.errors import DtLensError

__all__ = ["HalvingState", "halving_state", "parse_halving", "read_halving_state", "rungs_of"]


@dataclass(frozen=True)
class HalvingState:
    """How far a sweep has come. One without halving is always on its only rung.

    Attributes:
        rung: the current one; the last one also when everything is done.
        reached: the rung that each edit has entered, by arm.
        stopped: edits that were not promoted.
    """

    rung: int
    reached: Mapping[int, int]
    stopped: frozenset[int] = frozenset()


def parse_halving(halving: Any) -> list[int] | None:
    """Units of each rung before the last, from ``None``, a number, ``"4,8"`` or a sequence.

    >>> parse_halving("4, 8"), parse_halving(4), parse_halving(None)
    ([4, 8], [4], None)

    Raises:
        DtLensError: if it is anything else.
    """
    if halving is None:
        return None
    try:
        parts = halving.split(",") if isinstance(halving, str) else [halving] if np.ndim(halving) == 0 else halving
        found = [int(part) for part in parts]
        if not found or any(n < 1 or (not isinstance(p, str) and n != p) for n, p in zip(found, parts, strict=True)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise DtLensError(
            f"halving is {halving!r}; it must be the number of units of each rung before the last, such as 4,8."
        ) from None
    return found


def rungs_of(options: Mapping[str, Any], units: int | None = None) -> list[range]:
    """The units of each rung of a sweep with these options; the last rung has ``units``, by default the options'.

    >>> rungs_of({"first": 3, "units": 20, "halving": [4, 8]})
    [range(3, 7), range(7, 15), range(15, 35)]
    """
    first, rungs = int(options["first"]), []
    for count in (*(options.get("halving") or ()), units or options["units"]):
        rungs.append(range(first, first + count))
        first += count
    return rungs


def halving_state(
    rungs: Sequence[range], differences: Mapping[int, Mapping[int, float]], missing: Mapping[int, Collection[int]]
) -> HalvingState:
    """Which rung each edit has reached, computed from the outcomes alone.

    At the end of each rung but the last, half of its edits, rounded up, are promoted: those whose mean paired
    difference over all units so far is largest in absolute value; among equals the earlier edit.

    Args:
        rungs: the units of each rung.
        differences: of outcomes from the unedited model, by edit and unit; an edit without any has an empty entry.
        missing: units of an edit that could not be run. Such an edit is stopped, and the others do not wait for it.
    """
    reached, stopped = dict.fromkeys(differences, 0), set[int]()
    for rung, units in enumerate(rungs[:-1]):
        competing = [arm for arm in differences if arm not in stopped]
        whole = [arm for arm in competing if all(unit in differences[arm] for unit in units)]
        for arm in competing:
            if any(unit not in differences[arm] and unit not in missing.get(arm, ()) for unit in units):
                return HalvingState(rung, reached, frozenset(stopped))
        so_far = range(rungs[0].start, units.stop)
        size = {arm: abs(float(np.mean([differences[arm][unit] for unit in so_far]))) for arm in whole}
        size = {arm: -1.0 if np.isnan(value) else value for arm, value in size.items()}
        best = set(sorted(whole, key=lambda arm: -size[arm])[: -(-len(whole) // 2)])
        reached |= dict.fromkeys(best, rung + 1)
        stopped |= set(competing) - best
    return HalvingState(len(rungs) - 1, reached, frozenset(stopped))


def read_halving_state(db: sqlite3.Connection, rungs: Sequence[range], outcome: str) -> HalvingState:
    """The state of the sweep in an open file, whose arms are judged by the measure ``outcome``."""
    kinds: dict[int, str] = dict(db.execute("SELECT arm, kind FROM arms ORDER BY arm").fetchall())
    if len(rungs) == 1:
        return HalvingState(0, {arm: 0 for arm, kind in kinds.items() if kind == "edit"})
    outcomes: dict[int, dict[int, float]] = {arm: {} for arm in kinds}
    rows = db.execute(
        f"SELECT arm, outcomes.unit, outcomes.{quoted(outcome)} FROM outcomes JOIN blocks USING (block) "
        "JOIN arms USING (arm) WHERE kind <> 'control' AND outcomes.unit < ?",
        (rungs[-1].start,),
    )
    for arm, unit, value in rows:
        outcomes[arm][unit] = float("nan") if value is None else value
    missing: dict[int, set[int]] = {}
    for arm, first, count in db.execute(
        "SELECT arm, first, count FROM blocks WHERE status IN ('failed', 'void') AND first < ?", (rungs[-1].start,)
    ):
        missing.setdefault(arm, set()).update(range(first, first + count))
    baseline = next((arm for arm, kind in kinds.items() if kind == "baseline"), None)
    unedited = {} if baseline is None else outcomes[baseline]
    lost = set() if baseline is None else missing.get(baseline, set())
    edits = [arm for arm, kind in kinds.items() if kind == "edit"]
    return halving_state(
        rungs,
        {arm: {unit: x - unedited[unit] for unit, x in outcomes[arm].items() if unit in unedited} for arm in edits},
        {arm: missing.get(arm, set()) | lost for arm in edits},
    )
