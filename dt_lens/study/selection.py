"""Choose the singular directions to edit, by rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from dt_lens.errors import DtLensError

if TYPE_CHECKING:
    from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["best_matches", "choose_directions", "rows_of_directions"]

POOR = 0.5  # a contrast's p is above this: its match is below the median of the best match under the null
SIMILAR = 2.0  # a contrast's sigma lies within this factor of its strong partner's if any direction's does


def best_matches(table: pd.DataFrame) -> pd.DataFrame:
    """The best match of every direction on every side: its row of largest ``z``, without untrained heads."""
    trained = table[~table["embedding"].isin(table.attrs.get("untrained", []))]
    best = trained.sort_values("z", ascending=False, kind="stable").drop_duplicates(["matrix", "side", "sv"])
    return best.reset_index(drop=True)


def choose_directions(table: pd.DataFrame, svd: WeightSVD, count: int = 3) -> pd.DataFrame:
    """Choose ``count`` strong directions from a scan table, for each a weak one as its contrast, and the first ones.

    Strong: the largest ``z`` of each kind of matrix (``W_in``, ``W_out``, ``OV``, ...), then the second largest, and so
    on, at most one direction per matrix: the study is not all of one matrix or kind, and kinds can be compared. Weak:
    in the same matrix and on the same side, a poor match with the embedding that the strong one matches: its |cosine|
    lies below the median of the best match under the null (p > 0.5). Among directions with a similar sigma, if there is
    one (so that edit and contrast change the weights by a similar amount), it is the one whose best match with any
    embedding is the poorest. A strong direction whose matrix has no poor match stays without a contrast. Directions in
    a block with others, and those that rounding may turn into none of the matrix's, are left out.

    First: direction 0 of the first matrix of each kind, as the seed of this project edited them, on the side with the
    larger ``z``; not again if it is a strong or a weak one. It may be in a block with others.

    Returns:
        rows of the table with a column ``role``: ``"strong"``, ``"weak"`` or ``"first"``; strong ones with their
        contrasts in order, then the first ones. ``attrs["without_contrast"]`` lists the matrices of strong directions
        that have none.

    Raises:
        DtLensError: if the table holds too few directions to choose from.
    """
    best = best_matches(table)
    every = best
    alone = [
        svd[matrix].indistinct(int(sv), side) == 1
        for matrix, side, sv in zip(best["matrix"], best["side"], best["sv"], strict=True)
    ]
    best = best[np.asarray(alone, dtype=bool)]
    rows: list[tuple[str, pd.Series]] = []
    leaders = _in_turn(best.drop_duplicates("matrix"), svd)
    without: list[str] = []
    for _, strong in leaders.head(count).iterrows():
        weak = _contrast(table, best, strong)
        rows.append(("strong", strong))
        if weak is None:
            without.append(str(strong["matrix"]))
        else:
            rows.append(("weak", weak))
    if not rows:
        raise DtLensError("The scan holds too few directions to choose edits from; scan more matrices.")
    taken = {(row["matrix"], row["side"], row["sv"]) for _, row in rows}
    for _, first in _first_directions(table, every, svd).iterrows():
        if (first["matrix"], first["side"], first["sv"]) not in taken:
            rows.append(("first", first))
    chosen = pd.DataFrame([row for _, row in rows]).reset_index(drop=True)
    chosen.insert(0, "role", [role for role, _ in rows])
    chosen.attrs["without_contrast"] = without
    return chosen


def rows_of_directions(table: pd.DataFrame, places: Sequence[tuple[str, str, int]]) -> pd.DataFrame:
    """The best match of each direction at ``(matrix, side, sv)``, in that order, with the role ``"given"``.

    Raises:
        DtLensError: for a direction that the scan does not hold.
    """
    best = best_matches(table)
    known = {place: number for number, place in enumerate(zip(best["matrix"], best["side"], best["sv"], strict=True))}
    rows = []
    for place in places:
        if place not in known:
            raise DtLensError(
                f"The scan holds no direction {place[2]} of {place[0]} ({place[1]} side); name the matrix in matrices, "
                "and a side that faces the residual stream."
            )
        rows.append(best.iloc[known[place]])
    chosen = pd.DataFrame(rows).reset_index(drop=True)
    chosen.insert(0, "role", "given")
    chosen.attrs["without_contrast"] = []
    return chosen


def _in_turn(leaders: pd.DataFrame, svd: WeightSVD) -> pd.DataFrame:
    """One matrix of each kind, then the next of each; within a turn the order of ``z``."""
    kind = leaders["matrix"].map({name: svd[name].matrix.kind for name in leaders["matrix"]})
    turn = leaders.groupby(kind, sort=False).cumcount()
    return leaders.assign(turn=turn).sort_values("turn", kind="stable").drop(columns="turn")


def _contrast(table: pd.DataFrame, best: pd.DataFrame, strong: pd.Series) -> pd.Series | None:
    """The row of a poor match in the matrix of ``strong``, with the embedding that it matches; ``None`` if none is."""
    here = (table["matrix"] == strong["matrix"]) & (table["side"] == strong["side"])
    rows = table[here & (table["embedding"] == strong["embedding"]) & (table["p_value"] > POOR)].set_index("sv")
    peers = best[(best["matrix"] == strong["matrix"]) & (best["side"] == strong["side"])]
    peers = peers[(peers["sv"] != strong["sv"]) & peers["sv"].isin(rows.index)]
    if peers.empty:
        return None
    distance = np.abs(np.log(peers["sigma"].to_numpy() / float(strong["sigma"])))
    similar = peers[distance <= np.log(SIMILAR)]
    poorest = (similar if len(similar) else peers.iloc[[int(distance.argmin())]]).sort_values("z", kind="stable")
    sv = poorest.iloc[0]["sv"]
    row: pd.Series = rows.loc[sv].copy()
    row["sv"] = sv
    return row[list(table.columns)]


def _first_directions(table: pd.DataFrame, best: pd.DataFrame, svd: WeightSVD) -> pd.DataFrame:
    """The best match of direction 0 of the first matrix of each kind, in the order of the scan."""
    names = list(dict.fromkeys(table["matrix"]))
    firsts = list({svd[name].matrix.kind: name for name in reversed(names)}.values())
    order = {name: place for place, name in enumerate(names)}
    first = best[best["matrix"].isin(firsts) & (best["sv"] == 0)].drop_duplicates("matrix")
    return first.sort_values("matrix", key=lambda column: column.map(order), kind="stable")
