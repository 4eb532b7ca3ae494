"""The atlas: what the removal of each singular direction does to the agent, beside what the direction looks like."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dt_lens.behaviour.evaluate import model_id
from dt_lens.behaviour.outcomes import Evaluation
from dt_lens.behaviour.statistics import bootstrap_interval, sign_flip
from dt_lens.errors import DtLensError
from dt_lens.matrices import Snapshot, find_matrix
from dt_lens.nulls import q_values
from dt_lens.study.rank_correlation import (
    RankCorrelation,
    at_equal_size,
    rank_correlation,
    rank_correlation_difference,
)
from dt_lens.svd import WeightSVD

if TYPE_CHECKING:
    from dt_lens.behaviour.sweep.results import SweepResults

__all__ = ["LARGE", "Atlas", "make_atlas"]

LARGE = 0.1  # of the unedited agent's return: a loss that nobody overlooks
ALPHA = 0.05
LEAST = 5  # directions to correlate
AT_EQUAL = " at equal size"
RESPONSES = ("damage", f"damage{AT_EQUAL}", "beyond", "damage_per_energy")
PLACE = ["matrix", "kind", "layer", "head", "sv"]


@dataclass(frozen=True)
class Atlas:
    """What a sweep of removals says about the directions of a model.

    Attributes:
        directions: a row per direction that was measured. ``matrix kind layer head sv block sigma energy`` (the
            Frobenius norm of what was removed) and, where known, ``output_energy`` (its root mean square on real
            inputs); ``mean_return``, ``damage`` (mean return lost to the unedited agent, over paired episodes) with its
            interval, ``p_value`` and ``q_value``; ``failure_rate``, ``control_damage``, ``beyond`` (return lost beyond
            the controls at the same seeds) with its interval and ``beyond_p_value``, both of which are about those very
            controls and not about random changes at large; ``damage_per_energy``, ``damage_per_output_energy``; and for
            each side and embedding the absolute cosine with its best label, as ``"write action_out"``.
        shares: how many directions matter, for each matrix, each kind of matrix, and all; and what directions cost
            beyond their controls on average, with an interval and ``beyond_p_value`` over directions, each of which
            has a random change of its own.
        correlations: for each kind of matrix and each of its matrices, and each side and embedding: the rank
            correlation of the cosine with ``damage``, with ``damage at equal size`` (among directions of near-equal
            energy, on real inputs where that is known), and with ``beyond``; interval, ``p_value``, ``q_value`` over
            the table. Those with ``damage_per_energy`` have no p: all damages share the unedited agent's luck, which
            divided by the energy goes with whatever goes with the energy.
        predictors: how well sizes go with damage, and which does better: ``sigma``, and on real inputs
            ``output_energy``; and where the sweep removed activation-aware directions too, their ``sigma`` and the
            plain one, each with the damage of its own directions, of the same matrices and numbers.
        weighted: as ``directions``, of the activation-aware directions that were removed; mostly none.
        baseline: the unedited agent.
        planned: how many plain directions the sweep has, measured or not.
        untrained: names of embeddings that no loss ever reached: they should predict nothing.
        options: the sweep's.
    """

    directions: pd.DataFrame
    shares: pd.DataFrame
    correlations: pd.DataFrame
    predictors: pd.DataFrame
    weighted: pd.DataFrame
    baseline: Evaluation
    planned: int
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
    directions, more = (_measured(some, evaluations, baseline, table, seed) for some in (plain, weighted))
    if directions.empty:
        raise DtLensError("The sweep has not finished a direction yet; run it on.")
    folded = bool(results.options["fold_layernorm"])
    svd = WeightSVD(model, fold_layernorm=folded)
    directions = _described(directions, svd, activations)
    directions, sights, untrained = _seen(directions, svd, seed)
    if len(more):
        aware = WeightSVD(model, fold_layernorm=folded, activations=_swept_with(results, activations))
        more, _, _ = _seen(_described(more, aware, None), aware, seed)
    return Atlas(
        directions,
        _shares(directions, baseline.mean, seed),
        _correlations(directions, sights, seed),
        _predictors(directions, more, seed),
        more,
        baseline,
        len(plain),
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


def _measured(
    edits: pd.DataFrame, evaluations: dict[int, Evaluation], baseline: Evaluation, table: pd.DataFrame, seed: int
) -> pd.DataFrame:
    """A row for each of ``edits`` that has episodes."""
    found = pd.DataFrame(
        [_removed(row, arm, evaluations, baseline, table, seed) for arm, row in edits.iterrows() if arm in evaluations]
    )
    if len(found):
        found["q_value"] = _q_values(found["p_value"])
    return found


def _q_values(p: pd.Series) -> pd.Series:
    """Over those that there are: a direction on which successive halving has not decided has none yet."""
    q = pd.Series(np.nan, index=p.index)
    q[p.notna()] = q_values(p[p.notna()])
    return q


def _removed(
    row: pd.Series, arm: Any, evaluations: dict[int, Evaluation], baseline: Evaluation, table: pd.DataFrame, seed: int
) -> dict[str, Any]:
    """What the removal of one direction did, and its controls."""
    edited = evaluations[arm]
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
    found |= dict.fromkeys(
        ("control_damage", "control_failure_rate", "beyond", "beyond_low", "beyond_high", "beyond_p_value"), np.nan
    )
    own = table[(table["of"] == arm).fillna(False)]
    # The closer match of the two kinds, where a sweep has both.
    louder = own["match"] == "output"
    controls = [evaluations[c] for c in own.index[louder if louder.any() else ~louder] if c in evaluations]
    seeds = _common([edited, baseline, *controls])
    if controls and len(seeds):
        returns = np.mean([_returns(control, seeds) for control in controls], axis=0)
        lost = returns - _returns(edited, seeds)
        low, high = bootstrap_interval(lost, seed=seed)
        found |= {
            "control_damage": float((_returns(baseline, seeds) - returns).mean()),
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
    from dt_lens.edits import SingularEdit

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


class _Sight(NamedTuple):
    """What a direction may look like: an embedding, met on one side."""

    column: str
    side: str
    embedding: str


def _seen(directions: pd.DataFrame, svd: WeightSVD, seed: int) -> tuple[pd.DataFrame, list[_Sight], list[str]]:
    """With a column of absolute cosines for each side and embedding."""
    scan = svd.scan(list(dict.fromkeys(directions["matrix"])), embeddings="*", seed=seed)
    starts = [svd[m].block_of(int(sv))[0] for m, sv in zip(directions["matrix"], directions["sv"], strict=True)]
    out, sights = directions.copy(), []
    for (side, embedding), rows in scan.groupby(["side", "embedding"], sort=False):
        sight = _Sight(f"{side} {embedding}", str(side), str(embedding))
        best = rows.set_index(["matrix", "sv"])["cosine"].abs()
        places = pd.MultiIndex.from_arrays([directions["matrix"], starts])
        out[sight.column] = best.reindex(places).to_numpy(dtype=np.float64)
        sights.append(sight)
    return out, sights, list(scan.attrs.get("untrained", []))


def _groups(directions: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """All directions, those of each kind of matrix, and of each matrix: (what, its kind, rows)."""
    yield "all", "all", directions
    for kind, rows in directions.groupby("kind", sort=False):
        yield str(kind), str(kind), rows
    for name, rows in directions.groupby("matrix", sort=False):
        yield str(name), str(rows["kind"].iloc[0]), rows


def _shares(directions: pd.DataFrame, mean: float, seed: int) -> pd.DataFrame:
    out = []
    for what, kind, rows in _groups(directions):
        n, hurt = len(rows), rows["damage"] > 0
        matters = (rows["q_value"] < ALPHA) & hurt
        controlled = rows["beyond"].notna()
        beyond = rows.loc[controlled, "beyond"].to_numpy(dtype=np.float64)
        several = len(beyond) >= LEAST
        interval = bootstrap_interval(beyond, seed=seed) if several else (np.nan, np.nan)
        worst = rows.iloc[int(rows["damage"].to_numpy().argmax())]
        out.append(
            {
                "what": what,
                "kind": kind,
                "directions": n,
                "hurts": int(matters.sum()),
                "share": float(matters.mean()),
                "helps": int(((rows["q_value"] < ALPHA) & ~hurt).sum()),
                "large": int((matters & (rows["damage"] > LARGE * abs(mean))).sum()),
                "controlled": len(beyond),
                "control_large": int((rows["control_damage"] > LARGE * abs(mean)).sum()) if len(beyond) else np.nan,
                "beyond": float(beyond.mean()) if several else np.nan,
                "beyond_low": interval[0],
                "beyond_high": interval[1],
                "beyond_p_value": sign_flip(beyond, seed=seed) if several else np.nan,
                "worst": f"{worst['matrix']} sv={worst['sv']}",
                "worst_damage": float(worst["damage"]),
            }
        )
    return pd.DataFrame(out)


def _correlations(directions: pd.DataFrame, sights: list[_Sight], seed: int) -> pd.DataFrame:
    out = []
    for what, kind, rows in _groups(directions):
        for sight in sights:
            if kind == "all" or len(rows) < LEAST or rows[sight.column].isna().all():
                continue  # cosines of different kinds of matrices are not one quantity
            for response in RESPONSES:
                lost = rows[response.removesuffix(AT_EQUAL)]
                if lost.isna().all():
                    continue
                if response.endswith(AT_EQUAL):
                    size = rows["output_energy" if "output_energy" in rows else "energy"]
                    found = at_equal_size(rows[sight.column], lost, size, rows["matrix"], seed=seed)
                else:
                    found = rank_correlation(rows[sight.column], lost, rows["matrix"], seed=seed)
                    if response == "damage_per_energy":
                        found = found._replace(p_value=float("nan"))
                place = {"what": what, "kind": kind, "side": sight.side, "embedding": sight.embedding}
                out.append(place | {"response": response} | found._asdict())
    table = pd.DataFrame(out)
    table["q_value"] = _q_values(table["p_value"]) if len(table) else []
    return table


def _predictors(directions: pd.DataFrame, weighted: pd.DataFrame, seed: int) -> pd.DataFrame:
    sizes = [name for name in ("sigma", "output_energy") if name in directions]
    both = pd.DataFrame()
    if len(weighted):
        place, numbers = ["matrix", "kind", "sv"], ["sigma", "damage"]
        both = directions[place + numbers].merge(weighted[place + numbers], on=place, suffixes=("", " aware"))
    out: list[dict[str, Any]] = []

    def add(what: str, kind: str, name: str, found: RankCorrelation) -> None:
        out.append({"what": what, "kind": kind, "predictor": name} | found._asdict())

    for what, kind, rows in _groups(directions):
        if len(rows) < LEAST:
            continue
        strata, damage = rows["matrix"], rows["damage"]
        for name in sizes:
            add(what, kind, name, rank_correlation(rows[name], damage, strata, seed=seed))
        if "output_energy" in rows:
            better = rank_correlation_difference(rows["output_energy"], rows["sigma"], damage, strata, seed=seed)
            add(what, kind, "output_energy minus sigma", better)
        if both.empty:
            continue
        same = both[both["matrix"].isin(rows["matrix"])]
        if len(same) >= LEAST:
            plain, aware = ((same[f"sigma{of}"], same[f"damage{of}"]) for of in ("", " aware"))
            add(what, kind, "plain sigma", rank_correlation(*plain, same["matrix"], seed=seed))
            add(what, kind, "activation-aware sigma", rank_correlation(*aware, same["matrix"], seed=seed))
            better = rank_correlation_difference(
                aware[0], plain[0], aware[1], same["matrix"], second_y=plain[1], seed=seed
            )
            add(what, kind, "activation-aware minus plain", better)
    return pd.DataFrame(out)
