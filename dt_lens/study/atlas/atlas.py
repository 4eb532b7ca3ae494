"""``make_atlas``: what the removal of each singular direction does, beside what the direction matches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.sweep.arms import is_of_sweep
from dt_lens.behaviour.task import Task
from dt_lens.behaviour.tasks import identity_of, terms_in
from dt_lens.behaviour.terms import FailureRule
from dt_lens.edits.singular import SingularEdit
from dt_lens.edits.written import today
from dt_lens.errors import DtLensError, a_type
from dt_lens.lens.matrices import Snapshot, find_matrix
from dt_lens.statistics.outcomes import bootstrap_interval, sign_flip
from dt_lens.study.atlas.result import Atlas
from dt_lens.study.atlas.tables import (
    LARGE,
    MatchColumn,
    correlations_of,
    predictors_of,
    q_where_known,
    reliability_of,
    shares_of,
)
from dt_lens.study.labels import tried_on
from dt_lens.svd.weight_svd import WeightSVD

if TYPE_CHECKING:
    from dt_lens.behaviour.sweep.results import SweepResults

__all__ = ["make_atlas"]

PLACE = ["matrix", "kind", "layer", "head", "sv"]
KINDS = ("W_in", "W_gate", "W_out", "OV")  # in the order of sentences
NAN = float("nan")


def make_atlas(
    model: Any,
    results: SweepResults,
    activations: Any = None,
    *,
    value: str | None = None,
    seed: int = 0,
    failure: FailureRule | None = None,
    task: Task | None = None,
) -> Atlas:
    """Make the atlas of a sweep, of removals in most cases, finished or not.

    Args:
        model: the model that was swept.
        results: the sweep; it must have edits of this ``value``, and a baseline.
        activations: the model's real inputs (``collect_activations``), for energies on them; by default the sweep's
            own energies, if it matched controls by them.
        value: which of the sweep's edits: ``"zero"`` by default, the removals, or, where a sweep has none of these and
            one other value, that. Of the sides of a direction that were edited it is the first.
        seed: of the bootstrap and the permutations.
        failure: what counts as failing; by default what the sweep's file says, else a guess; see ``Evaluation``.
        task: the task of the sweep, where it is one of your own that identifies models in its own way.

    Raises:
        DtLensError: if the sweep is of another model, has no such edits, no baseline, or nothing finished, or if the
            activations of swept activation-aware directions are missing.
    """
    if not hasattr(results, "evaluations"):
        raise DtLensError(f"make_atlas takes the results of a sweep, not {a_type(results)}; see SweepResults.")
    terms = terms_in(results.options)
    own = identity_of(model, terms) if task is None else task.identity(model)[1]
    if own != results.options["model"]:
        raise DtLensError("The sweep is of other weights than this model's; load the model that was swept.")
    evaluations = results.evaluations(failure)
    baseline = evaluations.get(0) if results.options["baseline"] else None
    if baseline is None:
        raise DtLensError(f"The sweep has no {terms.units} of the unedited {terms.actor}; run it with a baseline.")
    terms = baseline.terms
    table = results.table(failure=failure)
    folded = bool(results.options["fold_layernorm"])
    value = _value(table) if value is None else str(today(value))
    edits = table[(table["kind"] == "edit") & (table["value"] == value) & table["sv"].notna()]
    edits = edits.drop(_other_folding(edits.index, evaluations, model, folded))
    edits = edits.drop_duplicates(["matrix", "sv", "directions"])
    plain, weighted = (edits[edits["directions"] == which] for which in ("plain", "activation"))
    if plain.empty:
        known = ", ".join(dict.fromkeys(table["value"] if edits.empty else edits["directions"] + " directions"))
        wanted = f"edits with value {value!r}" if edits.empty else "plain directions"
        choose = "" if not edits.empty else "; name one as value (--value)"
        raise DtLensError(f"The sweep holds no {wanted}; it has {known}{choose}.")
    controls, unit = results.controls(), baseline.mean_size(seed=seed) if terms.large is None else NAN
    large = LARGE * unit if terms.large is None else float(terms.large)
    directions, more = (_measured(some, evaluations, baseline, controls, large, seed) for some in (plain, weighted))
    if directions.empty:
        raise DtLensError("The sweep has not finished a direction yet; run it on.")
    awaited, halving = plain, results.options.get("halving")
    if halving:  # it selects by damage, and runs no controls for what it stops
        directions[["damage_odd", "damage_even", "beyond_odd", "beyond_even"]] = np.nan
        awaited = plain[(plain["rung"] == len(halving)) | plain["p_value"].isna()]
    svd = WeightSVD(model, fold_layernorm=folded)
    directions = _described(directions, svd, activations, value, int(results.options["seed"]))
    directions, columns, untrained = _matched(directions, svd, seed)
    if len(more):
        aware = WeightSVD(model, fold_layernorm=folded, activations=_swept_with(results, activations))
        more, _, _ = _matched(_described(more, aware, None, value), aware, seed)
    return Atlas(
        directions,
        shares_of(directions, large, seed),
        correlations_of(directions, columns, seed),
        reliability_of(directions, seed),
        predictors_of(directions, more, seed),
        more,
        baseline,
        len(plain),
        sum(arm in controls for arm in awaited.index),
        unit,
        untrained,
        dict(results.options),
        large,
        _tried(model, directions, columns),
        value,
    )


def _value(table: pd.DataFrame) -> str:
    """The value of the edits where the caller names none."""
    known = list(dict.fromkeys(table.loc[(table["kind"] == "edit") & table["sv"].notna(), "value"]))
    return str(known[0]) if len(known) == 1 else "zero"


def _other_folding(arms: pd.Index, evaluations: dict[int, Evaluation], model: Any, folded: bool) -> list[int]:
    """The arms whose directions are counted otherwise than the sweep's: edits that were given to it."""
    bare, found = Snapshot.of(model), []
    for arm in arms:
        record = evaluations[arm].edits[0] if arm in evaluations else None
        if record is not None and not is_of_sweep(record, find_matrix(bare, record["matrix"]), folded):
            found.append(arm)
    return found


def _swept_with(results: SweepResults, given: Any) -> Any:
    """The activations that weighted the sweep's activation-aware directions."""
    digest = results.options["activations"]["digest"]
    for found in (results.activations(), given):
        if found is not None and found.digest == digest:
            return found
    raise DtLensError(
        f"The sweep's activation-aware directions are weighted by activations {digest}, which are not in its "
        "folder; give their file."
    )


def _measured(
    edits: pd.DataFrame,
    evaluations: dict[int, Evaluation],
    baseline: Evaluation,
    controls: Mapping[int, Sequence[int]],
    large: float,
    seed: int,
) -> pd.DataFrame:
    """A row for each of ``edits`` that has units."""
    rows = []
    for arm, row in edits.iterrows():
        if arm in evaluations:
            own = [evaluations[control] for control in controls.get(arm, ()) if control in evaluations]
            rows.append(_removed(row, evaluations[arm], baseline, own, large, seed))
    found = pd.DataFrame(rows)
    if len(found):
        found["q_value"] = q_where_known(found["p_value"])
    return found


def _removed(
    row: pd.Series, edited: Evaluation, baseline: Evaluation, controls: list[Evaluation], large: float, seed: int
) -> dict[str, Any]:
    """What the removal of one direction did, and what its controls did."""
    terms = baseline.terms
    sign, mean = terms.sign, f"mean_{terms.outcome}"
    ends = ("difference_high", "difference_low") if sign > 0 else ("difference_low", "difference_high")
    found = {
        name: row[name] for name in ("matrix", "layer", "head", "sv", "energy", "output_energy", terms.units, mean)
    }
    found |= {
        "damage": -sign * row["difference"],
        "damage_low": -sign * row[ends[0]],
        "damage_high": -sign * row[ends[1]],
        "p_value": row["p_value"],
    }
    fails = terms.failure is not None
    found |= {"failure_rate": row["failure_rate"]} if fails else {}
    found |= {"mean_length": row["mean_length"]} if terms.lasts is not None else {}
    units = _common([edited, baseline])
    for name, odd in (("damage_odd", 1), ("damage_even", 0)):
        half = units[units % 2 == odd]
        found[name] = float((sign * (_outcomes(baseline, half) - _outcomes(edited, half))).mean()) if len(half) else NAN
    found["controls"] = 0
    found |= dict.fromkeys(
        (
            "controls_large",
            "controls_as_costly",
            "rank_p_value",
            "control_damage",
            *(("control_failure_rate",) if fails else ()),
            "beyond",
            "beyond_low",
            "beyond_high",
            "beyond_p_value",
            "beyond_odd",
            "beyond_even",
        ),
        NAN,
    )
    units = _common([edited, baseline, *controls])
    if controls and len(units):
        outcomes = np.array([_outcomes(control, units) for control in controls])
        costs = (sign * (_outcomes(baseline, units) - outcomes)).mean(1)
        lost = sign * (outcomes.mean(0) - _outcomes(edited, units))
        # By the outcomes themselves: the unedited model's are the same for all of them.
        as_costly = int((sign * outcomes.mean(1) <= sign * _outcomes(edited, units).mean()).sum())
        low, high = bootstrap_interval(lost, seed=seed)
        found |= {
            "controls": len(controls),
            "controls_large": int((costs > large).sum()) if np.isfinite(large) else NAN,
            "controls_as_costly": as_costly,
            "rank_p_value": (1 + as_costly) / (1 + len(controls)),
            "control_damage": float(costs.mean()),
            "beyond": float(lost.mean()),
            "beyond_low": low,
            "beyond_high": high,
            "beyond_p_value": sign_flip(lost, seed=seed),
        }
        for name, odd in (("beyond_odd", 1), ("beyond_even", 0)):
            half = lost[units % 2 == odd]
            found[name] = float(half.mean()) if len(half) else NAN
        if fails:
            found["control_failure_rate"] = float(np.mean([control.failed.mean() for control in controls]))
    return found


def _common(evaluations: list[Evaluation]) -> NDArray[np.int64]:
    units = evaluations[0].units
    for other in evaluations[1:]:
        units = np.intersect1d(units, other.units)
    return np.asarray(units)


def _outcomes(evaluation: Evaluation, units: NDArray[np.int64]) -> NDArray[np.float64]:
    """The outcomes of ``units``; an evaluation's units are in ascending order."""
    return np.asarray(evaluation.outcomes[np.searchsorted(evaluation.units, units)])


def _described(directions: pd.DataFrame, svd: WeightSVD, activations: Any, value: str, seed: int = 0) -> pd.DataFrame:
    """Add each direction's sigma, the size of its block, and its energy on real inputs."""
    bare = Snapshot.of(svd.model)
    kinds, sigmas, blocks, outputs = [], [], [], []
    for name, sv in zip(directions["matrix"], directions["sv"], strict=True):
        found = svd[name]
        kinds.append(find_matrix(bare, name).kind)
        sigmas.append(float(found.sigma[int(sv)]))
        blocks.append(max(found.indistinct(int(sv), side) for side in found.matrix.residual_sides))
        if activations is not None:
            side, folded = found.matrix.residual_sides[0], svd.fold_layernorm
            how: dict[str, Any] = {"value": value, "seed": seed, "fold_layernorm": folded}
            edit = SingularEdit(svd.model, name, int(sv), side=side, decomposition=found, **how)
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


def _matched(directions: pd.DataFrame, svd: WeightSVD, seed: int) -> tuple[pd.DataFrame, list[MatchColumn], list[str]]:
    """Add a column of absolute cosines for each side and embedding; give these columns, and untrained embeddings."""
    scan = svd.scan(list(dict.fromkeys(directions["matrix"])), embeddings="*", seed=seed)
    starts = [svd[m].block_of(int(sv))[0] for m, sv in zip(directions["matrix"], directions["sv"], strict=True)]
    out, columns = directions.copy(), []
    for (side, embedding), rows in scan.groupby(["side", "embedding"], sort=False):
        match = MatchColumn(f"{side} {embedding}", str(side), str(embedding))
        best = rows.set_index(["matrix", "sv"])["cosine"].abs()
        places = pd.MultiIndex.from_arrays([directions["matrix"], starts])
        out[match.column] = best.reindex(places).to_numpy(dtype=np.float64)
        columns.append(match)
    return out, columns, list(scan.attrs.get("untrained", []))


def _tried(model: Any, directions: pd.DataFrame, columns: Sequence[MatchColumn]) -> dict[str, list[str]]:
    """For each kind of matrix the columns whose cosines may predict damage, on the last of its stream's sides."""
    bare, known, found = Snapshot.of(model), {match.column for match in columns}, dict[str, list[str]]()
    for kind in KINDS:
        of_kind = directions.loc[directions["kind"] == kind, "matrix"]
        if len(of_kind):
            side = find_matrix(bare, str(of_kind.iloc[0])).residual_sides[-1]
            found[kind] = [name for e in tried_on(model.embeddings, side) if (name := f"{side} {e}") in known]
    return found
