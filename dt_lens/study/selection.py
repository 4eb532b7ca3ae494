"""Choose the singular directions to edit, by rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from dt_lens.errors import DtLensError

if TYPE_CHECKING:
    from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["best_matches", "choose_directions"]

SIMILAR = 2.0  # a contrast's sigma lies within this factor of its strong partner's if any direction's does


def best_matches(table: pd.DataFrame) -> pd.DataFrame:
    """The best match of every direction on every side: its row of largest ``z``, without untrained heads."""
    trained = table[~table["embedding"].isin(table.attrs.get("untrained", []))]
    best = trained.sort_values("z", ascending=False, kind="stable").drop_duplicates(["matrix", "side", "sv"])
    return best.reset_index(drop=True)


def choose_directions(table: pd.DataFrame, svd: WeightSVD, count: int = 3) -> pd.DataFrame:
    """Choose ``count`` strong directions from a scan table, and for each a weak one as its contrast.

    Strong: the largest ``z`` of each kind of matrix (``W_in``, ``W_out``, ``OV``, ...), then the second largest, and so
    on, at most one direction per matrix: the study is not all of one matrix or kind, and kinds can be compared. Weak:
    in the same matrix and on the same side, among directions with a similar sigma (so that edit and contrast change the
    weights by a similar amount), the one whose best match is the poorest. Directions in a block with others, and those
    that rounding may turn into none of the matrix's, are left out.

    Returns:
        rows of the table with a column ``role``, ``"strong"`` or ``"weak"``, pairs in order.

    Raises:
        DtLensError: if the table holds too few directions to choose from.
    """
    best = best_matches(table)
    alone = [
        svd[matrix].indistinct(int(sv), side) == 1
        for matrix, side, sv in zip(best["matrix"], best["side"], best["sv"], strict=True)
    ]
    best = best[np.asarray(alone, dtype=bool)]
    rows: list[pd.Series] = []
    leaders = best.drop_duplicates("matrix")
    kind = leaders["matrix"].map({name: svd[name].matrix.kind for name in leaders["matrix"]})
    turn = leaders.groupby(kind, sort=False).cumcount()
    leaders = leaders.assign(turn=turn).sort_values("turn", kind="stable")  # within a turn the order stays that of z
    for _, strong in leaders.drop(columns="turn").head(count).iterrows():
        others = best[
            (best["matrix"] == strong["matrix"]) & (best["side"] == strong["side"]) & (best["sv"] != strong["sv"])
        ]
        if others.empty:
            continue
        distance = np.abs(np.log(others["sigma"].to_numpy() / float(strong["sigma"])))
        similar = others[distance <= np.log(SIMILAR)]
        weak = (
            (similar if len(similar) else others.iloc[[int(distance.argmin())]]).sort_values("z", kind="stable").iloc[0]
        )
        rows += [strong, weak]
    if not rows:
        raise DtLensError("The scan holds too few directions to choose edits from; scan more matrices.")
    chosen = pd.DataFrame(rows).reset_index(drop=True)
    chosen.insert(0, "role", ["strong", "weak"] * (len(rows) // 2))
    return chosen
