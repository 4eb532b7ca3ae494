"""The atlas: what the removal of each singular direction does to the agent, beside what the direction looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dt_lens.behaviour.agents.evaluation import Evaluation
from dt_lens.behaviour.agents.identity import model_id
from dt_lens.errors import DtLensError
from dt_lens.lens.matrices import Snapshot, find_matrix
from dt_lens.statistics.outcomes import bootstrap_interval, sign_flip
from dt_lens.study.atlas.tables import (
    LARGE,
    Sight,
    correlations_of,
    predictors_of,
    q_where_known,
    reliability_of,
    shares_of,
)
from dt_lens.svd.weight_svd import WeightSVD

if TYPE_CHECKING:
    from dt_lens.behaviour.sweep.results import SweepResults

__all__ = ["LARGE", "Atlas", "make_atlas"]

PLACE = ["matrix", "kind", "layer", "head", "sv"]


@dataclass(frozen=True)
class Atlas:
    """What a sweep of removals says about the directions of a model.

    Attributes:
        directions: a row per direction that was measured. ``matrix kind layer head sv block sigma energy`` (the
            Frobenius norm of what was removed) and, where known, ``output_energy`` (its root mean square on real
            inputs); ``mean_return``, ``damage`` (mean return lost to the unedited agent, over paired episodes) with its
            interval, ``p_value`` and ``q_value``, and ``damage_odd`` and ``damage_even``, the same over the episodes of
            odd and of even seed (none with successive halving, which selects by damage); ``failure_rate``;
            ``controls``, the random changes that were measured beside it, ``controls_large``, how many of them lost
            more than a tenth of ``unit``, ``control_damage``, their mean; ``beyond`` (return lost beyond the controls
            at the same seeds) with its interval and ``beyond_p_value``, both of which are about those very controls
            and not about random changes at large; ``controls_as_costly``, how many of them lost as much as the
            direction or more, and ``rank_p_value``, that and one over ``controls`` and one: the chance of a rank as
            high for one more random change, which is about random changes at large, and needs many of them;
            ``damage_per_energy``, ``damage_per_output_energy``; and for each side and embedding the absolute cosine
            with its best label, as ``"write action_out"``.
        shares: how many directions matter, for each matrix, each kind of matrix, and all: ``hurts`` at q < 0.05,
            ``large`` those of them that cost more than a tenth of ``unit``. Of the ``controlled`` directions, which
            have random changes beside them, ``controlled_large`` cost as much, and of their ``controls``
            ``controls_large``, both counted at the same seeds and without q; and what those directions cost
            ``beyond`` their controls on average, with an interval and ``beyond_p_value`` over directions, each of
            which has random changes of its own.
        correlations: for each kind of matrix and each of its matrices, and each side and embedding: the rank
            correlation of the cosine with ``damage``, with ``damage at equal size`` (among directions of near-equal
            energy, on real inputs where that is known), and with ``beyond`` and ``beyond at equal size``: a large
            direction may cost more than a change as large, and match better, for its size alone; interval, ``p_value``,
            ``q_value`` over the table. Those with ``damage_per_energy`` have no p: all damages share the unedited
            agent's luck, which divided by the energy goes with whatever goes with the energy. There is no row of fewer
            than five pairs.
        reliability: how well damage repeats: the rank correlation of odd and even episodes (``halves``), and what
            Spearman and Brown's formula makes of it for all episodes (``reliability``), with an interval; ``inside``
            matrices, and among directions of equal size. A correlation with damage is about the one with what
            directions truly cost, times its square root.
        predictors: how well sizes go with damage, and which does better: ``sigma``, and on real inputs
            ``output_energy``; and where the sweep removed activation-aware directions too, their ``sigma`` and the
            plain one, each with the damage of its own directions, of the same matrices and numbers.
        weighted: as ``directions``, of the activation-aware directions that were removed; mostly none.
        baseline: the unedited agent.
        planned: how many plain directions the sweep has, measured or not.
        planned_controls: how many of them are to have random changes beside them; those that successive halving
            stopped are not.
        unit: the size of the unedited agent's mean return, of which losses are shares; ``nan`` where 0 lies in that
            mean's interval, so that shares of it say nothing.
        untrained: names of embeddings that no loss ever reached: they should predict nothing.
        options: the sweep's.
    """

    directions: pd.DataFrame
    shares: pd.DataFrame
    correlations: pd.DataFrame
    reliability: pd.DataFrame
    predictors: pd.DataFrame
    weighted: pd.DataFrame
    baseline: Evaluation
    planned: int
    planned_controls: int
    unit: float
    untrained: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


def make_atlas(
    model: Any, results: SweepResults, activations: Any = None, *, value: str = "zero", seed: int = 0
) -> Atlas:
    """The atlas of a sweep, finished or not.

    Args:
        model: the one that was swept.
        results: the sweep; it should hold ``value="zero"`` edits, and a baseline.
        activations: the model's real inputs (``collect_activations``), for energies on them; by default the sweep's
            own energies, where it has matched controls by them.
        value: which of the sweep's edits.
        seed: of the bootstrap and the permutations.

    Raises:
        DtLensError: when the sweep is of another model, has no such edits, no baseline, or nothing finished, or when
            activation-aware directions were swept and their activations are not there.
    """
    if not hasattr(results, "evaluations"):
        raise DtLensError(f"make_atlas takes the results of a sweep, not a {type(results).__name__}; see SweepResults.")
    if model_id(model) != results.options["model"]:
        raise DtLensError("The sweep is of other weights than this model's; load the model that was swept.")
    evaluations = results.evaluations()
    baseline = evaluations.get(0) if results.options["baseline"] else None
    if baseline is None:
        raise DtLensError("The sweep has no episodes of the unedited agent; run it with a baseline.")
    table = results.table()
    edits = table[(table["kind"] == "edit") & (table["value"] == value)].drop_duplicates(["matrix", "sv", "directions"])
    plain, weighted = (edits[edits["directions"] == which] for which in ("plain", "activation"))
    if plain.empty:
        known = ", ".join(dict.fromkeys(table["value"] if edits.empty else edits["directions"] + " directions"))
        wanted = f"edits with value {value!r}" if edits.empty else "plain directions"
        raise DtLensError(f"The sweep holds no {wanted}; it has {known}.")
    controls, unit = results.controls(), _unit(baseline, seed)
    directions, more = (_measured(some, evaluations, baseline, controls, unit, seed) for some in (plain, weighted))
    if directions.empty:
        raise DtLensError("The sweep has not finished a direction yet; run it on.")
    awaited, halving = plain, results.options.get("halving")
    if halving:  # it selects by damage, and runs no controls of what it stops
        directions[["damage_odd", "damage_even"]] = np.nan
        awaited = plain[(plain["rung"] == len(halving)) | plain["p_value"].isna()]
    folded = bool(results.options["fold_layernorm"])
    svd = WeightSVD(model, fold_layernorm=folded)
    directions = _described(directions, svd, activations)
    directions, sights, untrained = _seen(directions, svd, seed)
    if len(more):
        aware = WeightSVD(model, fold_layernorm=folded, activations=_swept_with(results, activations))
        more, _, _ = _seen(_described(more, aware, None), aware, seed)
    return Atlas(
        directions,
        shares_of(directions, unit, seed),
        correlations_of(directions, sights, seed),
        reliability_of(directions, seed),
        predictors_of(directions, more, seed),
        more,
        baseline,
        len(plain),
        sum(arm in controls for arm in awaited.index),
        unit,
        untrained,
        dict(results.options),
    )


def _swept_with(results: SweepResults, given: Any) -> Any:
    """The activations that the sweep's directions were weighted by."""
    digest = results.options["activations"]["digest"]
    for found in (results.activations(), given):
        if found is not None and found.digest == digest:
            return found
    raise DtLensError(
        f"The sweep's activation-aware directions are weighted by activations {digest}, which are not beside it; give "
        "their file."
    )


def _unit(baseline: Evaluation, seed: int) -> float:
    low, high = bootstrap_interval(baseline.returns, seed=seed)
    return float("nan") if low <= 0 <= high or not baseline.mean else abs(baseline.mean)


def _measured(
    edits: pd.DataFrame,
    evaluations: dict[int, Evaluation],
    baseline: Evaluation,
    controls: Mapping[int, Sequence[int]],
    unit: float,
    seed: int,
) -> pd.DataFrame:
    """A row for each of ``edits`` that has episodes."""
    rows = []
    for arm, row in edits.iterrows():
        if arm in evaluations:
            own = [evaluations[control] for control in controls.get(arm, ()) if control in evaluations]
            rows.append(_removed(row, evaluations[arm], baseline, own, unit, seed))
    found = pd.DataFrame(rows)
    if len(found):
        found["q_value"] = q_where_known(found["p_value"])
    return found


def _removed(
    row: pd.Series, edited: Evaluation, baseline: Evaluation, controls: list[Evaluation], unit: float, seed: int
) -> dict[str, Any]:
    """What the removal of one direction did, and its controls."""
    found = {
        name: row[name]
        for name in ("matrix", "layer", "head", "sv", "energy", "output_energy", "episodes", "mean_return")
    }
    found |= {
        "damage": -row["difference"],
        "damage_low": -row["difference_high"],
        "damage_high": -row["difference_low"],
        "p_value": row["p_value"],
        "failure_rate": row["failure_rate"],
        "mean_length": row["mean_length"],
    }
    seeds = _common([edited, baseline])
    for name, odd in (("damage_odd", 1), ("damage_even", 0)):
        half = seeds[seeds % 2 == odd]
        found[name] = float((_returns(baseline, half) - _returns(edited, half)).mean()) if len(half) else np.nan
    found["controls"] = 0
    found |= dict.fromkeys(
        (
            "controls_large",
            "controls_as_costly",
            "rank_p_value",
            "control_damage",
            "control_failure_rate",
            "beyond",
            "beyond_low",
            "beyond_high",
            "beyond_p_value",
        ),
        np.nan,
    )
    seeds = _common([edited, baseline, *controls])
    if controls and len(seeds):
        returns = np.array([_returns(control, seeds) for control in controls])
        costs = (_returns(baseline, seeds) - returns).mean(1)
        lost = returns.mean(0) - _returns(edited, seeds)
        # By the returns themselves: the unedited agent's are the same beside all of them.
        as_costly = int((returns.mean(1) <= _returns(edited, seeds).mean()).sum())
        low, high = bootstrap_interval(lost, seed=seed)
        found |= {
            "controls": len(controls),
            "controls_large": int((costs > LARGE * unit).sum()) if np.isfinite(unit) else np.nan,
            "controls_as_costly": as_costly,
            "rank_p_value": (1 + as_costly) / (1 + len(controls)),
            "control_damage": float(costs.mean()),
            "control_failure_rate": float(np.mean([control.failed.mean() for control in controls])),
            "beyond": float(lost.mean()),
            "beyond_low": low,
            "beyond_high": high,
            "beyond_p_value": sign_flip(lost, seed=seed),
        }
    return found


def _common(evaluations: list[Evaluation]) -> NDArray[np.int64]:
    seeds = evaluations[0].seeds
    for other in evaluations[1:]:
        seeds = np.intersect1d(seeds, other.seeds)
    return np.asarray(seeds)


def _returns(evaluation: Evaluation, seeds: NDArray[np.int64]) -> NDArray[np.float64]:
    """At ``seeds``; an evaluation's are in ascending order."""
    return np.asarray(evaluation.returns[np.searchsorted(evaluation.seeds, seeds)])


def _described(directions: pd.DataFrame, svd: WeightSVD, activations: Any) -> pd.DataFrame:
    """With sigma, the block that a direction is of, and its energy on real inputs."""
    from dt_lens.edits.singular import SingularEdit

    bare = Snapshot.of(svd.model)
    kinds, sigmas, blocks, outputs = [], [], [], []
    for name, sv in zip(directions["matrix"], directions["sv"], strict=True):
        found = svd[name]
        start, stop = found.block_of(int(sv))
        kinds.append(find_matrix(bare, name).kind)
        sigmas.append(float(found.sigma[int(sv)]))
        blocks.append(stop - start)
        if activations is not None:
            side, folded = found.matrix.residual_sides[0], svd.fold_layernorm
            edit = SingularEdit(
                svd.model, name, int(sv), side=side, value="zero", fold_layernorm=folded, decomposition=found
            )
            outputs.append(edit.output_energy(activations))
    out = directions.assign(kind=kinds, sigma=sigmas, block=blocks)
    if activations is not None:
        out["output_energy"] = outputs
    out["damage_per_energy"] = out["damage"] / out["energy"]
    first = [*PLACE, "block", "sigma", "energy"]
    if out["output_energy"].notna().any():
        out["damage_per_output_energy"] = out["damage"] / out["output_energy"].where(out["output_energy"] > 0)
        first.append("output_energy")
    else:
        del out["output_energy"]
    return out[[*first, *(c for c in out if c not in first)]]


def _seen(directions: pd.DataFrame, svd: WeightSVD, seed: int) -> tuple[pd.DataFrame, list[Sight], list[str]]:
    """With a column of absolute cosines for each side and embedding."""
    scan = svd.scan(list(dict.fromkeys(directions["matrix"])), embeddings="*", seed=seed)
    starts = [svd[m].block_of(int(sv))[0] for m, sv in zip(directions["matrix"], directions["sv"], strict=True)]
    out, sights = directions.copy(), []
    for (side, embedding), rows in scan.groupby(["side", "embedding"], sort=False):
        sight = Sight(f"{side} {embedding}", str(side), str(embedding))
        best = rows.set_index(["matrix", "sv"])["cosine"].abs()
        places = pd.MultiIndex.from_arrays([directions["matrix"], starts])
        out[sight.column] = best.reindex(places).to_numpy(dtype=np.float64)
        sights.append(sight)
    return out, sights, list(scan.attrs.get("untrained", []))
