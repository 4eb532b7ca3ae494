"""The findings of an atlas in sentences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from dt_lens.report.style import signed
from dt_lens.statistics.multiplicity import q_values
from dt_lens.statistics.outcomes import mcnemar
from dt_lens.study.atlas.result import Atlas
from dt_lens.study.atlas.tables import ALPHA, LARGE, RANKED

__all__ = ["correlation_of", "covered", "joined", "sentences", "shares_for"]

HALF = 0.5  # of the unedited model's mean, or five times what the task calls large
# Two sizes to compare by how well they predict damage: their names, their rows, and the row of their difference.
PREDICTORS = (
    (
        "Sigma",
        "the output energy on the {actor}'s own inputs",
        "sigma",
        "output_energy",
        "output_energy minus sigma",
    ),
    (
        "Sigma of plain directions",
        "that of as many activation-aware directions",
        "plain sigma",
        "activation-aware sigma",
        "activation-aware minus plain",
    ),
)


def sentences(atlas: Atlas) -> list[str]:
    """The answer in a few plain sentences."""
    everything, n, terms = shares_for(atlas, "all"), len(atlas.directions), atlas.terms
    if not atlas.directions["damage"].any():
        said = f"no {atlas.words[0]} of {n:,} directions changed the mean {terms.outcome}, so there is no damage."
        return [f"**Nothing changed**: {said}", *_unfinished(atlas)]
    more = f"{100 * LARGE:.0f} % of it" if np.isfinite(atlas.unit) else f"{atlas.large:g}{_scale(atlas)}"
    large = f", and more than {more} for **{everything['large']:.0f}**" if np.isfinite(atlas.large) else ""
    costs = (
        f"costs the {terms.actor} {terms.outcome}" if terms.sign > 0 else f"raises the {terms.actor}'s {terms.outcome}"
    )
    of_value = "" if atlas.value == "zero" else f" ({atlas.value})"
    lines = [
        (
            f"{atlas.words[1]} one singular direction{of_value} {costs} (q < 0.05) for "
            f"**{everything['hurts']} of {n:,}** directions ({100 * everything['share']:.1f} %){large}."
        )
    ]
    lines += _beside_controls(atlas)
    for kind, column in ((kind, column) for kind, columns in atlas.matches.items() for column in columns):
        row, equal = (correlation_of(atlas, kind, column, response) for response in ("damage", "damage at equal size"))
        if row is not None and equal is not None and np.isfinite(row["rho"]):
            lines.append(_predicts(row, equal))
    lines += _repeats(atlas)
    for names in PREDICTORS:
        if _is_known(atlas, names[-1]):
            lines.append(_better(atlas, *(name.format(actor=terms.actor) for name in names)))
    return lines + _unfinished(atlas)


def _unfinished(atlas: Atlas) -> list[str]:
    """How much of the sweep is missing."""
    n, controlled, awaited = len(atlas.directions), shares_for(atlas, "all")["controlled"], atlas.planned_controls
    if n == atlas.planned and controlled >= awaited:
        return []
    missing = f", and random changes beside {controlled:,} of {awaited:,}" if awaited else ""
    return [f"The sweep is not finished: {n:,} of {atlas.planned:,} directions are measured{missing}."]


def shares_for(atlas: Atlas, what: str) -> dict[str, Any]:
    """The row of ``Atlas.shares`` for ``"all"``, a kind of matrix or a matrix."""
    return _row(atlas.shares[atlas.shares["what"] == what]) or {}


def _row(rows: pd.DataFrame) -> dict[str, Any] | None:
    """The first row by its columns."""
    return None if rows.empty else {str(key): value for key, value in rows.iloc[0].to_dict().items()}


def _beside_controls(atlas: Atlas) -> list[str]:
    """What random changes cost, and what the directions that have some cost beyond them."""
    found = shares_for(atlas, "all")
    n, k = len(atlas.directions), found["controlled"]
    if not k:
        return []
    whose = f"{k:,} of {n:,}" if k < n else f"all {n:,}"
    beside = f"Beside {whose} directions{covered(atlas)} random changes of the same size were made in the same place"
    if np.isfinite(atlas.large):
        beside += (
            f": **{found['controls_large']:.0f} of {found['controls']:,}** random changes cost more than "
            f"{_sizes(atlas)[0][1]}, "
            f"and **{found['controlled_large']:.0f} of {k:,}** of those directions, counted likewise (whatever their q)"
        )
    lines = [f"{beside}."]
    if np.isfinite(found["beyond"]):
        lost, low, high = (_lost(atlas, found[name]) for name in ("beyond", "beyond_low", "beyond_high"))
        interval = f"[{low}, {high}]" if np.isfinite(found["beyond_low"]) else "(no interval: all are equal)"
        shares, points = f" of the {atlas.terms.outcome}", _scale(atlas) or f" points of {atlas.terms.outcome}"
        deed = "removal" if atlas.value == "zero" else "the edit"
        lines.append(
            f"On average over {'those ' if k < n else ''}directions, {deed} costs **{lost}**"
            f"{shares if np.isfinite(atlas.unit) else points} {interval} "
            f"beyond a random change (p = {found['beyond_p_value']:.2g}, a pair for each direction)."
        )
    lines += _pair_by_pair(atlas)
    many = atlas.directions[atlas.directions["controls"] >= RANKED]
    if len(many):
        above, least = (many["rank_p_value"] <= ALPHA).sum(), q_values(many["rank_p_value"]).min()
        lines.append(
            f"**{above} of {len(many):,}** directions with {RANKED} random changes or more beside them cost more "
            f"than those (by rank, p ≤ {ALPHA}; the least q of the {len(many):,} is {least:.2g}). Of as many named "
            f"beforehand {ALPHA * len(many):.2g} would by chance; of directions chosen for their damage many more "
            f"would: where nothing is special, the costliest of 127 costs more than {RANKED} others with probability "
            f"{127 / (127 + RANKED):.2f}."
        )
    return lines


def _pair_by_pair(atlas: Atlas) -> list[str]:
    """Each direction against its one random change: an answer without selection."""
    pairs = atlas.directions[atlas.directions["controls"] == 1]
    if not (len(pairs) and np.isfinite(atlas.large)):
        return []
    other, own = pairs["control_damage"], pairs["control_damage"] + pairs["beyond"]
    parts = []
    for size, words in _sizes(atlas):
        a, b = own > size, other > size
        only = (a & ~b).sum()
        parts.append(
            f"in {only} {'pair' if only == 1 else 'pairs'} only the direction costs more than {words}, in "
            f"{(b & ~a).sum()} only the change (McNemar's exact p = {mcnemar(a, b):.2g})"
        )
    return [f"Each direction against its one random change: {'; '.join(parts)}."]


def _sizes(atlas: Atlas) -> list[tuple[float, str]]:
    """Two sizes of loss to count by, with words for them: a large one, and five times that."""
    if np.isfinite(atlas.unit):
        return [(share * atlas.unit, f"{100 * share:.0f} %") for share in (LARGE, HALF)]
    return [(size, f"{size:g}{_scale(atlas)}") for size in (atlas.large, HALF / LARGE * atlas.large)]


def _scale(atlas: Atlas) -> str:
    """What the outcome is measured in, after a number; empty where that has no name."""
    return atlas.terms.in_scale


def covered(atlas: Atlas) -> str:
    """Which directions have random changes beside them, in parentheses; empty if all have."""
    if atlas.options.get("halving"):
        return f" (those that successive halving kept, selected for moving the {atlas.terms.outcome})"
    whole, parts = list[str](), list[str]()
    for kind in dict.fromkeys(atlas.directions["kind"]):
        found = shares_for(atlas, kind)
        if found["controlled"] == found["directions"]:
            whole.append(kind)
        elif found["controlled"]:
            parts.append(f"{found['controlled']:,} of {kind}'s {found['directions']:,}")
        else:
            parts.append(f"none of {kind}")
    if not parts:
        return ""
    return f" ({', '.join(([f'all of {joined(whole)}'] if whole else []) + parts)})"


def joined(words: list[str]) -> str:
    """Words as a list in a sentence.

    >>> joined(["W_in", "W_out", "OV"])
    'W_in, W_out and OV'
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _lost(atlas: Atlas, value: float) -> str:
    """A loss as a share of the unedited mean, or in the outcome's own units where that share means nothing."""
    if np.isfinite(atlas.unit):
        return f"{100 * value / atlas.unit:+.1f} %"
    if atlas.terms.digits is not None:
        return f"{value:+,.{atlas.terms.digits}f}"
    return f"{value:+,.0f}" if abs(value) >= 100 else f"{value:+.3g}"


def _repeats(atlas: Atlas) -> list[str]:
    """How much the noise of the damages weakens a correlation."""
    equal = atlas.reliability[atlas.reliability["inside"] == "equal size"]
    table = equal[equal["of"] == "damage"].set_index("what")
    kinds = [kind for kind in atlas.matches if kind in table.index]
    if not kinds:
        return []
    values = joined(
        [
            f"**{table['reliability'][kind]:.2f}** [{table['reliability_low'][kind]:.2f}, "
            f"{table['reliability_high'][kind]:.2f}] in {kind}"
            for kind in kinds
        ]
    )
    sure = [kind for kind in kinds if table["reliability_low"][kind] > 0]
    times = [f"{table['reliability'][kind] ** -0.5:.1f} times as large in {kind}" for kind in sure]
    so = f": {joined(times)}" if times else ""
    return [
        (
            f"Damage is measured with noise: among directions of equal size its reliability is {values}. A correlation "
            f"with what directions truly cost is at most about the one with damage over the square root of that{so}."
        )
    ]


def correlation_of(atlas: Atlas, kind: str, column: str, response: str) -> dict[str, Any] | None:
    """The row of ``Atlas.correlations`` for a kind of matrix, a column such as ``"read action_out"`` and a response."""
    table = atlas.correlations
    if table.empty:
        return None
    side, _, embedding = column.partition(" ")
    rows = table[
        (table["what"] == kind)
        & (table["side"] == side)
        & (table["embedding"] == embedding)
        & (table["response"] == response)
    ]
    return _row(rows)


def _predicts(row: dict[str, Any], equal: dict[str, Any]) -> str:
    return (
        f"{row['kind']}: |cosine| with {row['embedding']} against damage has rank correlation "
        f"**{signed(row['rho'])}** {_interval(row)} over {row['n']} directions: {_relation(row)}. Among directions of "
        f"equal size it is **{signed(equal['rho'])}** {_interval(equal)}: {_relation(equal)}."
    )


def _predictor(atlas: Atlas, name: str) -> dict[str, Any] | None:
    """The row of ``Atlas.predictors`` over all matrices."""
    table = atlas.predictors
    rows = table[(table["what"] == "all") & (table["predictor"] == name)] if len(table) else table
    return _row(rows)


def _is_known(atlas: Atlas, name: str) -> bool:
    found = _predictor(atlas, name)
    return found is not None and bool(np.isfinite(found["rho"]))


def _better(atlas: Atlas, first: str, second: str, *names: str) -> str:
    one, other, difference = (_predictor(atlas, name) or {} for name in names)
    if difference["low"] > 0:
        verdict = "the second predicts better"
    else:
        verdict = "the first predicts better" if difference["high"] < 0 else "neither is seen to predict better"
    return (
        f"{first} against damage has rank correlation **{signed(one['rho'])}** {_interval(one)}, {second} "
        f"**{signed(other['rho'])}** {_interval(other)}; the difference is {signed(difference['rho'])} "
        f"{_interval(difference)}: {verdict}."
    )


def _interval(row: dict[str, Any]) -> str:
    return f"[{signed(row['low'])}, {signed(row['high'])}]"


def _relation(row: dict[str, Any]) -> str:
    if not np.isfinite([row["low"], row["high"]]).all():
        return "too few directions to say"
    if row["low"] <= 0 <= row["high"]:
        return "no relation is seen"
    if not row["q_value"] < ALPHA:  # one interval in twenty lies beside 0 by chance, and the table has many
        return f"not decided, since among all tests of the table it is no discovery (q = {row['q_value']:.2g})"
    return f"a closer match goes with {'more' if row['low'] > 0 else 'less'} damage"
