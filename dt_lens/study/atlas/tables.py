"""The atlas's tables: pure functions of what each direction's removal did and of what the directions look like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dt_lens.statistics.multiplicity import q_values
from dt_lens.statistics.outcomes import bootstrap_interval, sign_flip
from dt_lens.statistics.rank_correlation import (
    RankCorrelation,
    at_equal_size,
    rank_correlation,
    rank_correlation_difference,
    spearman_brown,
)

__all__ = [
    "ALPHA",
    "LARGE",
    "RANKED",
    "Sight",
    "correlations_of",
    "predictors_of",
    "q_where_known",
    "reliability_of",
    "shares_of",
]

LARGE = 0.1  # of the unedited agent's return: a loss that nobody overlooks
ALPHA = 0.05
LEAST = 5  # directions to correlate
RANKED = 19  # random changes beside a direction: it costs more than each of them with p = 0.05, if it is one of them
AT_EQUAL = " at equal size"
RESPONSES = ("damage", f"damage{AT_EQUAL}", "beyond", f"beyond{AT_EQUAL}", "damage_per_energy")


class Sight(NamedTuple):
    """What a direction may look like: an embedding, met on one side."""

    column: str
    side: str
    embedding: str


def q_where_known(p: pd.Series) -> pd.Series:
    """Over those that there are: a direction on which successive halving has not decided has none yet."""
    q = pd.Series(np.nan, index=p.index)
    q[p.notna()] = q_values(p[p.notna()])
    return q


def _groups(directions: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """All directions, those of each kind of matrix, and of each matrix: (what, its kind, rows)."""
    yield "all", "all", directions
    for kind, rows in directions.groupby("kind", sort=False):
        yield str(kind), str(kind), rows
    for name, rows in directions.groupby("matrix", sort=False):
        yield str(name), str(rows["kind"].iloc[0]), rows


def shares_of(directions: pd.DataFrame, unit: float, seed: int) -> pd.DataFrame:
    """How many directions matter, and how many of their controls: see ``Atlas.shares``.

    Args:
        directions: an atlas's.
        unit: the size of the unedited agent's return; where it is ``nan``, nothing is large.
        seed: of the bootstrap and the sign flips.
    """
    out = []
    for what, kind, rows in _groups(directions):
        n, hurt = len(rows), rows["damage"] > 0
        matters = (rows["q_value"] < ALPHA) & hurt
        own = rows[rows["beyond"].notna()]
        beyond = own["beyond"].to_numpy(dtype=np.float64)
        several = len(own) >= LEAST
        interval = bootstrap_interval(beyond, seed=seed) if several else (np.nan, np.nan)
        worst = rows.iloc[int(rows["damage"].to_numpy().argmax())]
        told, compared = np.isfinite(unit), np.isfinite(unit) and len(own) > 0
        # At the seeds of its controls a direction loses what they lose and what it loses beyond them.
        alike = own["control_damage"] + own["beyond"] > LARGE * unit
        out.append(
            {
                "what": what,
                "kind": kind,
                "directions": n,
                "hurts": int(matters.sum()),
                "share": float(matters.mean()),
                "helps": int(((rows["q_value"] < ALPHA) & ~hurt).sum()),
                "large": int((matters & (rows["damage"] > LARGE * unit)).sum()) if told else np.nan,
                "controlled": len(own),
                "controlled_large": int(alike.sum()) if compared else np.nan,
                "controls": int(own["controls"].sum()),
                "controls_large": int(own["controls_large"].sum()) if compared else np.nan,
                "beyond": float(beyond.mean()) if several else np.nan,
                "beyond_low": interval[0],
                "beyond_high": interval[1],
                "beyond_p_value": sign_flip(beyond, seed=seed) if several else np.nan,
                "worst": f"{worst['matrix']} sv={worst['sv']}",
                "worst_damage": float(worst["damage"]),
            }
        )
    return pd.DataFrame(out)


def correlations_of(directions: pd.DataFrame, sights: Sequence[Sight], seed: int) -> pd.DataFrame:
    """Every look against every response, by kind and by matrix: see ``Atlas.correlations``."""
    out = []
    for what, kind, rows in _groups(directions):
        if kind == "all":
            continue  # cosines of different kinds of matrices are not one quantity
        for sight in sights:
            for response in RESPONSES:
                looks, lost = rows[sight.column], rows[response.removesuffix(AT_EQUAL)]
                if (looks.notna() & lost.notna()).sum() < LEAST:
                    continue
                if response.endswith(AT_EQUAL):
                    found = at_equal_size(looks, lost, _size(rows), rows["matrix"], seed=seed)
                else:
                    found = rank_correlation(looks, lost, rows["matrix"], seed=seed)
                if found.n < LEAST:
                    continue  # pairs that are alone in their matrices
                if response == "damage_per_energy" or not np.isfinite(found.rho):
                    found = found._replace(p_value=float("nan"))
                place = {"what": what, "kind": kind, "side": sight.side, "embedding": sight.embedding}
                out.append(place | {"response": response} | found._asdict())
    table = pd.DataFrame(out)
    table["q_value"] = q_where_known(table["p_value"]) if len(table) else []
    return table


def _size(rows: pd.DataFrame) -> pd.Series:
    """What directions of equal size are alike in."""
    known = "output_energy" in rows and rows["output_energy"].notna().any()
    return rows["output_energy" if known else "energy"]


def reliability_of(directions: pd.DataFrame, seed: int) -> pd.DataFrame:
    """How well damage repeats, from odd and even episodes: see ``Atlas.reliability``."""
    out: list[dict[str, Any]] = []
    for what, kind, rows in _groups(directions):
        halves, strata = (rows["damage_odd"], rows["damage_even"]), rows["matrix"]
        for inside, found in (
            ("matrices", rank_correlation(*halves, strata, seed=seed)),
            ("equal size", at_equal_size(*halves, _size(rows), strata, seed=seed)),
        ):
            if found.n >= LEAST and np.isfinite(found.rho):
                whole, low, high = (spearman_brown(value) for value in found[:3])
                told = {"reliability": whole, "reliability_low": low, "reliability_high": high, "n": found.n}
                out.append({"what": what, "kind": kind, "inside": inside, "halves": found.rho} | told)
    names = ["what", "kind", "inside", "halves", "reliability", "reliability_low", "reliability_high", "n"]
    return pd.DataFrame(out, columns=names)


def predictors_of(directions: pd.DataFrame, weighted: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Sizes against damage, and which does better: see ``Atlas.predictors``."""
    sizes = [name for name in ("sigma", "output_energy") if name in directions]
    both = pd.DataFrame()
    if len(weighted):
        place, numbers = ["matrix", "kind", "sv"], ["sigma", "damage"]
        both = directions[place + numbers].merge(weighted[place + numbers], on=place, suffixes=("", " aware"))
    out: list[dict[str, Any]] = []

    def add(what: str, kind: str, name: str, found: RankCorrelation) -> None:
        if found.n >= LEAST:
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
    return pd.DataFrame(out, columns=["what", "kind", "predictor", *RankCorrelation._fields])
