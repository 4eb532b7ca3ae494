"""The verdict on a direction that was dosed, by the rules in ``docs/steering_registered.md``, and its sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dt_lens.behaviour.printing import places, span
from dt_lens.behaviour.readout import Readout
from dt_lens.statistics.outcomes import Interval
from dt_lens.study.steering.doses import DOES, Candidate

__all__ = ["ALPHA", "verdict_of"]

ALPHA = 0.05
# What "no more than random" adds, by whether the direction beats random ones (on its read side, on the other).
EXCHANGED = {
    (False, True): " in what it {first}, and more in where it puts that",
    (True, False): " in where it puts what it {first}, and more in what that is",
}
# What the random directions have in common with the chosen one on the other side, if not the output energy alone.
MATCHED = {
    "downstream gain": " (these of the same downstream gain instead)",
    "length": " (these only of the same length as well: no later matrix reads what it writes, only the output does)",
}


def verdict_of(
    direction: Candidate, found: Mapping[str, Any], extent: float, readout: Readout, tried: int = 2
) -> tuple[str, str]:
    """The verdict on a direction, and the sentence that says it with its numbers.

    Args:
        direction: the chosen one.
        found: its numbers on fresh units, and those of the random directions.
        extent: what a reach is a share of.
        readout: what was moved.
        tried: how many candidates there were.
    """
    terms = readout.task.terms
    reach, rise = (Interval(*found[f"{name}_interval"]) for name in ("reach", "rise"))
    verdict = "undecided"
    which = ""
    # What is the same in every unit, mostly 0, has no interval: against a margin the value itself counts.
    reach_high, rise_high = (
        found[name] if math.isnan(interval.high) else interval.high
        for name, interval in (("reach", reach), ("rise", rise))
    )
    first = DOES[found["first_side"]]
    if reach_high < readout.least:
        verdict = "none found"
    elif reach.low > 0 and rise_high > readout.rise:
        cost = "by failing" if readout.guard is None else f"at the cost of the {readout.harm}"
        verdict = f"moves the {terms.outcome_name} {cost}"
    elif reach.low > 0:
        own_p = tuple(found[f"{side}_p_value"] <= ALPHA for side in ("read", "put"))
        verdict = "found" if all(own_p) else "no more than random"
        which = EXCHANGED.get(own_p, "").format(first=first)
    share, harmless = bool(readout.points), " without failing" if readout.guard is None else " without that cost"
    moved = _said(found["reach"], reach, share, terms.in_scale)
    risen = _said(found["rise"], rise, readout.guard is None, "" if readout.guard is None else _scale(readout))
    if found["reach"] < 0:
        moved += " (against the sign that it had when it was chosen)"
    of_range = f" of the curve's range of {extent:,.{places(extent)}f}" if share else ""
    rises = "failures rise" if readout.guard is None else f"the {readout.harm} rises"
    harm = f", and {rises} by {risen}" if readout.watches else ""
    if verdict.startswith("moves") and not rise.low > 0:
        harm += " (no rise is shown, and one above the bound is not excluded)"
    sentence = (
        f"The {'best ' if tried > 1 else ''}candidate was {direction.name} ({direction.why}). On fresh "
        f"{_fresh(readout)} its doses move the {terms.outcome_name} by {moved}{of_range}{harm}; of "
        f"{found['random_directions']} random directions of the same output energy, {found['read_as_far']} move it as "
        f"far{harmless if readout.watches else ''} in place of what it {first}, and {found['put_as_far']} in place of "
        f"what it {DOES[found['put_side']]}{MATCHED.get(found.get('put_matched', ''), '')}: {verdict}{which}."
    )
    return verdict, sentence


def _fresh(readout: Readout) -> str:
    terms = readout.task.terms
    return "seeds" if terms.index == "seed" else terms.units


def _scale(readout: Readout) -> str:
    assert readout.guard is not None
    return readout.guard.terms.in_scale


def _said(value: float, interval: Interval, share: bool, scale: str) -> str:
    """A number with its interval: a percentage, or in its own units."""
    if share:
        return f"{100 * value:+.0f} % {span(interval, percent=True, digits=0, sign=True)}"
    return f"{value:+.3f}{scale} {span(interval, digits=3, sign=True)}"
