"""Successive halving: every edit gets a few episodes, the half with larger differences more,
and those left at the end all of them.

The rungs before the last only select. They have seeds of their own, and an edit's p-value and effect come from the
seeds of the last rung alone, which the selection never saw; an edit that was stopped counts with p = 1. So an edit
without effect gets p <= alpha with probability at most alpha, as without halving. Algorithm: Jamieson and Talwalkar,
"Non-stochastic best arm identification and hyperparameter optimization", 2016.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
    """Episodes of each rung before the last, from ``None``, a number, ``"4,8"`` or a sequence.

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
    except (TypeError, ValueError):
        raise DtLensError(
            f"halving is {halving!r}; it must be the episodes of each rung before the last, such as 4,8."
        ) from None
    return found


def rungs_of(options: Mapping[str, Any], episodes: int | None = None) -> list[range]:
    """The seeds of each rung of a sweep with these options; the last rung has ``episodes``, by default the options'.

    >>> rungs_of({"seed": 3, "episodes": 20, "halving": [4, 8]})
    [range(3, 7), range(7, 15), range(15, 35)]
    """
    first, rungs = int(options["seed"]), []
    for count in (*(options.get("halving") or ()), episodes or options["episodes"]):
        rungs.append(range(first, first + count))
        first += count
    return rungs


def halving_state(
    rungs: Sequence[range], differences: Mapping[int, Mapping[int, float]], missing: Mapping[int, Collection[int]]
) -> HalvingState:
    """Which rung each edit has reached, computed from the outcomes alone.

    At the end of each rung but the last, half of its edits, rounded up, are promoted: those whose mean paired
    difference over all episodes so far is largest in absolute value; among equals the earlier edit.

    Args:
        rungs: the seeds of each rung.
        differences: of returns from the unedited agent, by edit and seed; an edit without episodes has an empty entry.
        missing: seeds of an edit that could not be run. Such an edit is stopped, and the others do not wait for it.
    """
    reached, stopped = dict.fromkeys(differences, 0), set[int]()
    for rung, seeds in enumerate(rungs[:-1]):
        competing = [arm for arm in differences if arm not in stopped]
        whole = [arm for arm in competing if all(seed in differences[arm] for seed in seeds)]
        for arm in competing:
            if any(seed not in differences[arm] and seed not in missing.get(arm, ()) for seed in seeds):
                return HalvingState(rung, reached, frozenset(stopped))
        so_far = range(rungs[0].start, seeds.stop)
        size = {arm: abs(float(np.mean([differences[arm][seed] for seed in so_far]))) for arm in whole}
        size = {arm: -1.0 if np.isnan(value) else value for arm, value in size.items()}
        best = set(sorted(whole, key=lambda arm: -size[arm])[: -(-len(whole) // 2)])
        reached |= dict.fromkeys(best, rung + 1)
        stopped |= set(competing) - best
    return HalvingState(len(rungs) - 1, reached, frozenset(stopped))


def read_halving_state(db: sqlite3.Connection, rungs: Sequence[range]) -> HalvingState:
    """The state of the sweep in an open file."""
    kinds: dict[int, str] = dict(db.execute("SELECT arm, kind FROM arms ORDER BY arm").fetchall())
    if len(rungs) == 1:
        return HalvingState(0, {arm: 0 for arm, kind in kinds.items() if kind == "edit"})
    returns: dict[int, dict[int, float]] = {arm: {} for arm in kinds}
    rows = db.execute(
        "SELECT arm, episodes.seed, return FROM episodes JOIN units USING (unit) JOIN arms USING (arm) "
        "WHERE kind <> 'control' AND episodes.seed < ?",
        (rungs[-1].start,),
    )
    for arm, seed, total in rows:
        returns[arm][seed] = float("nan") if total is None else total
    missing: dict[int, set[int]] = {}
    for arm, seed, episodes in db.execute(
        "SELECT arm, seed, episodes FROM units WHERE status IN ('failed', 'void') AND seed < ?", (rungs[-1].start,)
    ):
        missing.setdefault(arm, set()).update(range(seed, seed + episodes))
    baseline = next((arm for arm, kind in kinds.items() if kind == "baseline"), None)
    unedited = {} if baseline is None else returns[baseline]
    lost = set() if baseline is None else missing.get(baseline, set())
    edits = [arm for arm, kind in kinds.items() if kind == "edit"]
    return halving_state(
        rungs,
        {arm: {seed: r - unedited[seed] for seed, r in returns[arm].items() if seed in unedited} for arm in edits},
        {arm: missing.get(arm, set()) | lost for arm in edits},
    )
