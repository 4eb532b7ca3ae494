"""The verdict of a study in sentences: which direction was changed, what it costs, and what that is compared with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dt_lens.behaviour.printing import places
from dt_lens.behaviour.terms import Terms
from dt_lens.lens.token_text import spelled
from dt_lens.report.spectra import q_text
from dt_lens.report.style import signed
from dt_lens.study.result import StudyResult

__all__ = ["ALPHA", "HURTS", "correlation", "direction", "outcome_places", "place", "sentences", "unchanged"]

ALPHA = 0.05
HURTS = "hurts more than its control"
ROLES = {"strong": "best matches", "weak": "contrasts", "first": "first directions", "given": "given edits"}
LEADS = ("strong", "given", "first", "weak")  # whose edit the first sentence is about, if it hurts
DOES = {"read": "reads", "write": "writes", "query": "reads, as a query,", "key": "reads, as a key,"}
ALIKE = 1.5  # changes whose sizes differ by less than this factor are compared without a word about it


def sentences(result: StudyResult) -> list[str]:
    """The verdict in three sentences: one edit beside what it is compared with, all edits counted, and the unedited."""
    if said := unchanged(result):
        return [*said, _unedited(result)]
    return [_headline(result), _counts(result), _unedited(result)]


def _unedited(result: StudyResult) -> str:
    base, terms = result.baseline, result.baseline.terms
    lasts = ""
    if terms.lasts is not None:
        lasts = f", and {100 - 100 * float(base.ended.mean()):.0f} % of them last to the limit"
    mean = f"{base.mean:,.{outcome_places(result)}f}".replace("-", "−")
    over = f"over {len(base)} {terms.units}{lasts}"
    return f"Unedited, the {terms.actor}'s mean {terms.outcome_name} is **{mean}**{terms.in_scale} {over}."


def place(matrix: object) -> str:
    """A matrix in words.

    >>> place("blocks.2.mlp.W_out"), place("blocks.0.attn.OV.1"), place("predict.action")
    ('block 2 `W_out`', 'block 0 `OV`, head 1', '`predict.action`')
    """
    found = re.fullmatch(r"blocks\.(\d+)\.(?:attn|mlp)\.([A-Za-z_]+)(?:\.(\d+))?", str(matrix))
    if found is None:
        return f"`{matrix}`"
    return f"block {found[1]} `{found[2]}`" + (f", head {found[3]}" if found[3] else "")


def direction(row: Mapping[Any, Any]) -> str:
    """A direction by what it matches, where that is more than chance, and by its place.

    >>> row = {"matrix": "blocks.2.mlp.W_out", "side": "write", "sv": 1, "embedding": "action_out"}
    >>> direction({**row, "label": "thigh torque", "q_value": 0.001})
    'the direction that writes **thigh torque** (block 2 `W_out`, sv 1)'
    >>> direction({**row, "label": "thigh torque", "q_value": 0.5})
    'a direction that matches no label better than chance does (block 2 `W_out`, sv 1)'
    """
    where = f"({place(row['matrix'])}, sv {row['sv']})"
    if not row["q_value"] < ALPHA:
        return f"a direction that matches no label better than chance does {where}"
    return f"the direction that {DOES.get(str(row['side']), 'faces')} **{spelled(str(row['label']))}** {where}"


def _headline(result: StudyResult) -> str:
    """What the edit that says most costs, beside its control and its contrast."""
    rows: list[dict[Any, Any]] = result.verdicts.to_dict("records")
    at = _leading(rows)
    row, terms, k = rows[at], result.baseline.terms, outcome_places(result)
    own = _cost(row, "", terms, k, result.baseline.mean)
    control = _cost(row, "control_", terms, k)
    more = len(set(result.edits[at].sv)) - 1  # a user's own edit may be of several directions
    others = f" and {more} more direction{'s' * (more > 1)} of the matrix" if more else ""
    said = f"Changing {direction(row)}{others} {own}; a random change of equal size in the same place {control}"
    if row["verdict"] == HURTS:
        said += f", and the difference is more than chance (q {_equals(row['q'])})"
    elif row["q"] < ALPHA:
        said += f": the edit {row['verdict']} (q {_equals(row['q'])})"
    else:
        said += f", and no difference between the two is shown (q {_equals(row['q'])})"
    weak = _contrast_of(rows, at)
    return said + (f"; {_beside_contrast(row, weak, terms, k)}." if weak is not None else ".")


def _leading(rows: list[dict[Any, Any]]) -> int:
    """The edit that the first sentence is about: one that hurts, of best matches first; else of best matches."""

    def order(at: int) -> tuple[bool, int, float]:
        row = rows[at]
        role = LEADS.index(row["role"]) if row["role"] in LEADS else len(LEADS)
        return row["verdict"] != HURTS, role, -float(row["damage_beyond_control"])

    return min(range(len(rows)), key=order)


def _contrast_of(rows: list[dict[Any, Any]], at: int) -> dict[Any, Any] | None:
    """The contrast of a best match: the row after it, in the same matrix and on the same side."""
    row = rows[at]
    if row["role"] != "strong" or at + 1 >= len(rows):
        return None
    after = rows[at + 1]
    fits = after["role"] == "weak" and (after["matrix"], after["side"]) == (row["matrix"], row["side"])
    return after if fits else None


def _beside_contrast(row: dict[Any, Any], weak: dict[Any, Any], terms: Terms, k: int) -> str:
    said = f"a contrast, a direction of the same matrix that matches nothing well (sv {weak['sv']}), "
    said += _cost(weak, "", terms, k)
    ratio = float(weak["energy"]) / float(row["energy"]) if row["energy"] else 1.0
    if not 1 / ALIKE < ratio < ALIKE:
        said += f" with a change {100 * ratio:.0f} % as large"
    if row["verdict"] != HURTS:
        return said
    if weak["verdict"] == HURTS:
        return said + ", also more than its control, so the match alone does not explain it"
    if weak["q"] < ALPHA:
        return said + f": it {weak['verdict']} (q {_equals(weak['q'])})"
    said += ", for which no difference from its control is shown"
    if ratio <= 1 / ALIKE:
        return said + "; it is the smaller change, so size may explain that as well as the match"
    return said + ": a sign that the match matters"


def _cost(row: Mapping[Any, Any], prefix: str, terms: Terms, k: int, of: float | None = None) -> str:
    """What a change costs in words; "nothing that shows" where its interval holds 0.

    Pairs that all differ by the same amount, as in a world without chance, have no interval.
    """
    change, low, high = (float(row[f"{prefix}difference{end}"]) for end in ("", "_low", "_high"))
    harm, whole = terms.sign * change < 0, _of(of, k, terms)
    if change == 0:
        return f"does not change the mean {terms.outcome_name}"
    while round(abs(change), k) == 0 and k < 9:
        k += 1
    size, bare = f"**{abs(change):,.{k}f}**", np.isnan(low) or np.isnan(high)
    without = " (no interval)" if bare else ""
    if not bare and not (low > 0 or high < 0):
        inside = f"{signed(change, k)} [{signed(low, k)}, {signed(high, k)}]"
        nothing = "costs" if terms.sign > 0 else "changes"
        return f"{nothing} nothing that shows ({inside}{whole})"
    if terms.sign > 0:
        return f"{'costs' if harm else 'gains'} {size}{whole}{without}"
    return f"{'raises' if harm else 'lowers'} the {terms.outcome_name} by {size}{whole}{without}"


def _of(mean: float | None, k: int, terms: Terms) -> str:
    if mean is None:
        return ""
    number = f"{mean:,.{k}f}".replace("-", "−")
    # A loss is a part of a mean above 0 only.
    return f" of {number}" if terms.sign > 0 and mean > 0 else f" from {number}{terms.in_scale}"


def _equals(q: float) -> str:
    text = q_text(q)
    return text if text.startswith("<") else f"= {text}"


def _counts(result: StudyResult) -> str:
    """How many edits hurt more than their controls, role by role, and why that matters."""
    table, terms = result.verdicts, result.baseline.terms
    hurts = table["verdict"] == HURTS
    parts = []
    for role, what in ROLES.items():
        rows = table["role"] == role
        if rows.any() and not rows.all():
            parts.append(f"{int((hurts & rows).sum())} of {int(rows.sum())} {what}")
    of_roles = f": {', '.join(parts)}" if parts else ""
    said = (
        f"Of {len(table)} edit{'s' * (len(table) != 1)} **{int(hurts.sum())}** hurt more than a random change of "
        f"equal size (q < {ALPHA:g}){of_roles}. Only what goes beyond such a change can be due to the direction."
    )
    better = int((table["verdict"] == "improves more than its control").sum())
    if better:
        said += f" **{better}** improve{'s' * (better == 1)} the {terms.actor} more than a random change does."
    if not (terms.sign * table["difference"] < 0).any():
        said += f" No edit {'lowers' if terms.sign > 0 else 'raises'} the mean {terms.outcome_name}."
    return said


def correlation(result: StudyResult) -> str:
    """Whether cosine predicts damage here, in a sentence."""
    found, n = result.spearman, len(result.verdicts)
    if np.isnan(found.rho):
        why = "one of the two does not vary" if n > 2 else f"there are only {n}"
        return f"These edits cannot show whether cosine predicts damage: {why}."
    # Of fewer than four edits there is none.
    between = "" if np.isnan(found.low) else f" [{signed(found.low)}, {signed(found.high)}]"
    # By p, not by the interval: with a handful of pairs a bootstrap interval is too short.
    clear = (
        "so this number of edits does not decide whether cosine predicts damage"
        if found.p_value >= ALPHA
        else "so cosine predicts damage here"
        if found.rho > 0
        else "so larger cosines go with less damage here"
    )
    return (
        f"Across the {n} edits, Spearman's correlation of |cosine| with damage beyond the control is "
        f"**{signed(found.rho)}**{between}, p = {found.p_value:.2g}, {clear}."
    )


def outcome_places(result: StudyResult) -> int:
    """How many decimals the outcomes have in a sentence."""
    given = result.baseline.terms.digits
    return places(*result.baseline.outcomes) if given is None else given


def unchanged(result: StudyResult) -> list[str]:
    """That no edit and no control changed an outcome, and what else they changed, in sentences; empty if one did."""
    base, arms, terms = result.baseline, (*result.edited, *result.controls), result.baseline.terms
    outcomes = base.outcomes
    if any((arm.outcomes != outcomes).any() for arm in arms):
        return []
    equal = np.ptp(outcomes) == 0
    same = f"; for all of them it is **{outcomes[0]:,.6g}**" if equal else ""
    failures = [float(arm.failed.mean()) for arm in arms]
    lasting = terms.lasts is not None
    other = any((arm.failed != base.failed).any() or (lasting and (arm.lengths != base.lengths).any()) for arm in arms)
    nothing = (
        f"**{f'No {terms.outcome_name}' if other else 'Nothing'} changed**: no edit and no control changed the "
        f"{terms.outcome_name} of any {terms.unit}{same}. So this study shows nothing of damage; it takes larger "
        f"edits, other directions, or a task in which the {terms.actor} is not so sure of its {terms.outcome_name}."
    )
    if not other:
        return [nothing]
    said = (
        f"But {terms.units} went otherwise: **{100 * base.failed.mean():.0f} %** of them fail unedited, and "
        f"{100 * min(failures):.0f} % to {100 * max(failures):.0f} % under edits and controls"
    )
    if lasting:
        lengths = [float(arm.lengths.mean()) for arm in arms]
        said += (
            f"; they last {base.lengths.mean():,.1f} {terms.step}s on average, and {min(lengths):,.1f} to "
            f"{max(lengths):,.1f}"
        )
    return [nothing, f"{said}."]
