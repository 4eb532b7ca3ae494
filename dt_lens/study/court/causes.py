"""Claim 8: does a direction that gathers labels by a factor change actions most where that factor matters?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from dt_lens.behaviour.situations import Situations
from dt_lens.behaviour.task import Task
from dt_lens.edits.edit import Edit
from dt_lens.edits.singular import SingularEdit
from dt_lens.lens.activations import Activations
from dt_lens.progress import ProgressCallback, silent
from dt_lens.study.court.case import Case
from dt_lens.study.court.claims import ALPHA, Finding, NotApplicable
from dt_lens.study.court.rotation_null import NullComparison, compare_with_null, weights_finding

__all__ = ["acts_where_it_matters", "clustered_directions"]

MOST = 12  # directions that are edited
CONTROLS = 199  # of each: with nineteen, no p could stay below 0.05 after Holm over eight claims
OF_EDITS = 0.2  # the margin, as a share of the mean total variation over edits and situations
EDIT = "zero"


class Direction(NamedTuple):
    """A direction that clusters: where it is, and the factors from the one that it clusters by most to the least."""

    matrix: str
    side: Any  # as SingularEdit takes it
    sv: int
    factors: tuple[str, ...]


def clustered_directions(case: Case, table: pd.DataFrame, most: int = MOST) -> list[Direction]:
    """The single directions of a table of ``clusters`` that are found at alpha, each once, the surest first.

    Args:
        case: the model, for which directions are single.
        table: with the columns ``matrix side sv effect p_value q_value`` and ``p_F`` for every factor F.
        most: how many at most.
    """
    factors = [
        name.removeprefix("p_") for name in map(str, table.columns) if name.startswith("p_") and name != "p_value"
    ]
    found = table[table.q_value <= ALPHA].sort_values(["p_value", "effect"], ascending=[True, False], kind="stable")
    directions: list[Direction] = []
    for row in found.drop_duplicates(["matrix", "sv"]).to_dict("records"):
        start, stop = case.decomposition(row["matrix"]).block_of(int(row["sv"]))
        if stop - start > 1:
            continue
        tried = [name for name in factors if np.isfinite(row[f"p_{name}"])]
        # Of equal p, the one that the table names first.
        order = sorted(tried, key=lambda name: (row[f"p_{name}"], name != row["factor"]))
        directions.append(Direction(row["matrix"], row["side"], int(row["sv"]), tuple(order)))
    return directions[:most]


@dataclass(frozen=True)
class _Changed:
    """How much each edit, and each of its controls, changes what the model does: total variation, per situation.

    Attributes:
        situations: what the model is faced with.
        edits: of each direction.
        controls: of each direction's controls.
    """

    situations: Situations
    edits: Float64[np.ndarray, "direction n"]
    controls: Float64[np.ndarray, "direction control n"]

    def contrast(self, factors: Sequence[str | None], where: Bool[np.ndarray, " n"]) -> NullComparison | None:
        """The mean over directions of the change where a factor matters less elsewhere, against the controls'.

        Args:
            factors: for each direction, the factor; ``None`` leaves the direction out.
            where: the situations that count.

        Returns:
            ``None`` if no direction is left.
        """
        edits, controls = [], []
        for number, factor in enumerate(factors):
            if factor is None:
                continue
            matters = self.situations.matters[factor]
            here, elsewhere = where & matters, where & ~matters
            edits.append(self.edits[number, here].mean() - self.edits[number, elsewhere].mean())
            controls.append(self.controls[number][:, here].mean(1) - self.controls[number][:, elsewhere].mean(1))
        return compare_with_null(float(np.mean(edits)), np.mean(controls, axis=0)) if edits else None


def _varies(kind: Situations, factor: str, where: Bool[np.ndarray, " n"]) -> bool:
    """Whether a factor matters in some of the situations ``where``, and not in all."""
    return factor in kind.matters and 0 < kind.matters[factor][where].mean() < 1


def acts_where_it_matters(
    case: Case,
    task: Task,
    kinds: Sequence[Situations],
    table: pd.DataFrame,
    activations: Activations,
    *,
    tell: ProgressCallback = silent,
    controls: int | None = None,
) -> Finding:
    """Claim 8: the mean change of actions where a direction's own factor matters, less elsewhere.

    Args:
        case: the model.
        task: it says what the model chooses.
        kinds: the task's situations.
        table: of ``clusters``.
        activations: what the model reads in its task, to match the controls' output energy.
        tell: receives the progress.
        controls: how many of each edit; 199 by default.

    Raises:
        NotApplicable: if no direction clusters, or no factor matters in some of the situations only.
    """
    directions = clustered_directions(case, table)
    if not directions:
        raise NotApplicable("no single direction clusters by a factor")
    usable = [d for d in directions if all(_varies(kind, d.factors[0], kind.reachable) for kind in kinds)]
    if not usable:
        raise NotApplicable(
            "the factors that directions cluster by matter in all situations or in none: "
            + _in_words(directions, kinds)
        )
    changes = _changes(case, task, usable, kinds, activations, CONTROLS if controls is None else controls, tell)
    own = [d.factors[0] for d in usable]
    weakest = [_weakest(d, kinds) for d in usable]
    compared, quiet, parts, numbers = [], [], [], dict[str, Any]()
    for changed in changes:
        kind, where = changed.situations, changed.situations.reachable
        found = changed.contrast(own, where)
        assert found is not None
        margin = OF_EDITS * float(changed.edits[:, where].mean())
        compared.append((found, margin))
        control = changed.contrast(weakest, where)
        quiet.append(0.0 if control is None else control.p_value)  # a control that cannot be made is not quiet
        parts.append(
            f"{kind.name} ({int(where.sum())} contexts) by {found.statistic:+.3f} of probability, where random changes "
            f"of the same output energy give {found.mean:+.3f} (p = {found.p_value:.2g})"
        )
        numbers |= _numbers(changed, own, found, control)
    weaker, margin = min(compared, key=lambda both: both[0].excess)
    both = weaker._replace(
        p_value=max(found.p_value for found, _ in compared), critical=max(found.critical for found, _ in compared)
    )
    names = ", ".join(f"{name} ({own.count(name)})" for name in dict.fromkeys(own))
    others = [d for d in directions if d not in usable]
    left = f"Left out, since they matter everywhere or nowhere: {_in_words(others, kinds)}. " if others else ""
    said = (
        f"Of {len(directions)} directions that cluster, {len(usable)} were removed, by their factors: {names}. {left}"
        f"Actions change more where the factor matters: {'; '.join(parts)}. "
    )
    controlled = sum(factor is not None for factor in weakest)
    said += (
        f"With each direction's weakest factor instead, p = {min(quiet):.2g}."
        if controlled == len(usable)
        else f"With the weakest factor of the {controlled} that have another to try, p = {min(quiet):.2g}."
        if controlled
        else "No direction has another factor that can be tried, so there is no control."
    )
    numbers |= {"directions": [d._asdict() for d in usable], "left_out": len(directions) - len(usable)}
    return weights_finding(both, margin, min(quiet) >= ALPHA, said, numbers)


def _in_words(directions: Sequence[Direction], kinds: Sequence[Situations]) -> str:
    """Of each factor, how many directions cluster by it, and in which share of the situations it matters."""
    own = [direction.factors[0] for direction in directions]
    parts = []
    for name in dict.fromkeys(own):
        shares = [kind.matters[name][kind.reachable].mean() for kind in kinds if name in kind.matters]
        where = " and ".join(f"{100 * share:.0f} %" for share in shares)
        parts.append(f"{name} ({own.count(name)} directions; {f'in {where}' if where else 'no change of it is known'})")
    return ", ".join(parts)


def _weakest(direction: Direction, kinds: Sequence[Situations]) -> str | None:
    """The factor that a direction clusters by least, of those that matter in some of the situations only."""
    for factor in reversed(direction.factors[1:]):
        if all(_varies(kind, factor, kind.reachable) for kind in kinds):
            return factor
    return None


def _numbers(
    changed: _Changed, own: Sequence[str], found: NullComparison, control: NullComparison | None
) -> Mapping[str, Any]:
    kind = changed.situations
    where, apart = kind.reachable, ~kind.reachable
    numbers: dict[str, Any] = {
        "statistic": found.statistic, "chance": found.mean, "p_value": found.p_value,
        "mean_change": float(changed.edits[:, where].mean()),
        "mean_change_of_controls": float(changed.controls[:, :, where].mean()),
        "situations": int(where.sum()),
        "matters": {name: float(there[where].mean()) for name, there in kind.matters.items()},
    }  # fmt: skip
    if control is not None:
        numbers |= {"weakest_factor": control.statistic, "weakest_factor_p": control.p_value}
    if apart.any() and all(_varies(kind, factor, apart) for factor in own):
        unreachable = changed.contrast(own, apart)
        assert unreachable is not None
        numbers |= {"unreachable": unreachable.statistic, "unreachable_p": unreachable.p_value}
    return {f"{kind.name}_{name}": value for name, value in numbers.items()}


def _changes(
    case: Case,
    task: Task,
    directions: Sequence[Direction],
    kinds: Sequence[Situations],
    activations: Activations,
    controls: int,
    tell: ProgressCallback,
) -> list[_Changed]:
    """Remove every direction, and make every control's change, and see what the model chooses in each situation."""
    before = [task.choices(case.model, kind) for kind in kinds]
    edits = [np.zeros((len(directions), len(kind))) for kind in kinds]
    beside = [np.zeros((len(directions), controls, len(kind))) for kind in kinds]
    for number, direction in enumerate(directions):
        edit = SingularEdit(
            case.model, direction.matrix, direction.sv, side=direction.side, value=EDIT,
            decomposition=case.decomposition(direction.matrix),
        )  # fmt: skip
        for which, moved in enumerate(_moved(case, task, edit, kinds, before)):
            edits[which][number] = moved
        for j in range(controls):
            tell("changing directions that cluster", (number + (1 + j) / (1 + controls)) / len(directions))
            control = edit.control(case.seed + j, activations)
            for which, moved in enumerate(_moved(case, task, control, kinds, before)):
                beside[which][number, j] = moved
    return [_Changed(kind, *changed) for kind, *changed in zip(kinds, edits, beside, strict=True)]


def _moved(
    case: Case, task: Task, edit: Edit, kinds: Sequence[Situations], before: Sequence[Tensor]
) -> Iterator[Float64[np.ndarray, " n"]]:
    """The total variation distance between what the model chooses with an edit and without, in each situation."""
    with edit:
        for kind, chances in zip(kinds, before, strict=True):
            difference = task.choices(case.model, kind) - chances
            yield np.asarray(torch.sum(difference.abs(), -1).numpy() / 2)
