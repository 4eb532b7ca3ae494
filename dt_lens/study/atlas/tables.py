"""The atlas's tables: pure functions of what each direction's removal did and of what the direction matches."""

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
    "MatchColumn",
    "correlations_of",
    "predictors_of",
    "q_where_known",
    "reliability_of",
    "shares_of",
]

LARGE = 0.1  # of the unedited model's mean: a loss of this share is large, unless the task says what is
ALPHA = 0.05
LEAST = 5  # directions that a correlation needs
RANKED = 19  # controls of a direction; it costs more than each of them with p = 0.05 if it is one more random change
AT_EQUAL = " at equal size"
RESPONSES = ("damage", f"damage{AT_EQUAL}", "beyond", f"beyond{AT_EQUAL}", "damage_per_energy")


class MatchColumn(NamedTuple):
    """A column of absolute cosines: those of one side's directions with an embedding's best label."""

    column: str
    side: str
    embedding: str


def q_where_known(p: pd.Series) -> pd.Series:
    """q over the p-values that are known: successive halving gives none to directions it has not decided on."""
    q = pd.Series(np.nan, index=p.index)
    q[p.notna()] = q_values(p[p.notna()])
    return q


def _groups(directions: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """All directions, those of each kind of matrix, and those of each matrix: (what, its kind, rows)."""
    yield "all", "all", directions
    for kind, rows in directions.groupby("kind", sort=False):
        yield str(kind), str(kind), rows
    for name, rows in directions.groupby("matrix", sort=False):
        yield str(name), str(rows["kind"].iloc[0]), rows


def shares_of(directions: pd.DataFrame, large: float, seed: int) -> pd.DataFrame:
    """Count the directions that matter, and their controls that do: ``Atlas.shares``.

    Args:
        directions: ``Atlas.directions``.
        large: what counts as a large loss; if it is ``nan``, no loss is large.
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
        known, compared = np.isfinite(large), np.isfinite(large) and len(own) > 0
        # Over the units of its controls a direction loses what they lose plus what it loses beyond them.
        alike = own["control_damage"] + own["beyond"] > large
        out.append(
            {
                "what": what,
                "kind": kind,
                "directions": n,
                "hurts": int(matters.sum()),
                "share": float(matters.mean()),
                "helps": int(((rows["q_value"] < ALPHA) & ~hurt).sum()),
                "large": int((matters & (rows["damage"] > large)).sum()) if known else np.nan,
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


def correlations_of(directions: pd.DataFrame, columns: Sequence[MatchColumn], seed: int) -> pd.DataFrame:
    """Correlate every column of cosines with every response, by kind and by matrix: ``Atlas.correlations``."""
    out = []
    for what, kind, rows in _groups(directions):
        if kind == "all":
            continue  # cosines of different kinds of matrices are different quantities
        for match in columns:
            for response in RESPONSES:
                cosine, lost = rows[match.column], rows[response.removesuffix(AT_EQUAL)]
                if (cosine.notna() & lost.notna()).sum() < LEAST:
                    continue
                if response.endswith(AT_EQUAL):
                    found = at_equal_size(cosine, lost, _size(rows), rows["matrix"], seed=seed)
                else:
                    found = rank_correlation(cosine, lost, rows["matrix"], seed=seed)
                if found.n < LEAST:
                    continue  # some directions have no other of their matrix
                if response == "damage_per_energy" or not np.isfinite(found.rho):
                    found = found._replace(p_value=float("nan"))
                place = {"what": what, "kind": kind, "side": match.side, "embedding": match.embedding}
                out.append(place | {"response": response} | found._asdict())
    table = pd.DataFrame(out)
    table["q_value"] = q_where_known(table["p_value"]) if len(table) else []
    return table


def _size(rows: pd.DataFrame) -> pd.Series:
    """What "equal size" is about: energy on real inputs if known, else the Frobenius norm."""
    known = "output_energy" in rows and rows["output_energy"].notna().any()
    return rows["output_energy" if known else "energy"]


def reliability_of(directions: pd.DataFrame, seed: int) -> pd.DataFrame:
    """How well damage, and damage beyond the control, repeats in odd and even units: ``Atlas.reliability``."""
    out: list[dict[str, Any]] = []
    for what, kind, rows in _groups(directions):
        for of in ("damage", "beyond"):
            halves, strata = (rows[f"{of}_odd"], rows[f"{of}_even"]), rows["matrix"]
            for inside, found in (
                ("matrices", rank_correlation(*halves, strata, seed=seed)),
                ("equal size", at_equal_size(*halves, _size(rows), strata, seed=seed)),
            ):
                if found.n >= LEAST and np.isfinite(found.rho):
                    whole, low, high = (spearman_brown(value) for value in found[:3])
                    row = {"what": what, "kind": kind, "of": of, "inside": inside, "halves": found.rho, "n": found.n}
                    out.append(row | {"reliability": whole, "reliability_low": low, "reliability_high": high})
    names = ["what", "kind", "of", "inside", "halves", "reliability", "reliability_low", "reliability_high", "n"]
    return pd.DataFrame(out, columns=names)


def predictors_of(directions: pd.DataFrame, weighted: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Correlate sizes with damage, and compare the sizes: ``Atlas.predictors``."""
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
