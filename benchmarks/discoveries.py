"""The discoveries of one model's scan under every null, side by side: ``docs/discoveries.csv``.

    python benchmarks/discoveries.py hopper docs/discoveries.csv

Statistic: rows of ``scan()`` with q < 0.05 (Benjamini-Hochberg over the whole table), at the defaults: all matrices,
natural pairings, seed 0, activations of ten episodes (of a language model its held-out text).
"""

from __future__ import annotations

import sys

import pandas as pd

import dt_lens
from dt_lens import WeightSVD
from dt_lens.statistics.nulls import NULLS
from dt_lens.svd.null_sources import OF_THE_STREAM

ALPHA = 0.05


def main(name: str, out: str) -> None:
    """Scan ``name`` under every null and write a row for each to the CSV file ``out``."""
    model = dt_lens.load(name)
    svd, inputs = WeightSVD(model), dt_lens.collect_activations(model, seed=0)
    rows = []
    for null in NULLS:
        table = svd.scan(null=null, seed=0, activations=inputs if null in OF_THE_STREAM else None)
        found = table[table["q_value"] < ALPHA]
        action_out = found[(found["embedding"] == "action_out") & (found["side"] == "write")]
        untrained = found["embedding"].isin(table.attrs["untrained"])
        rows.append((null, len(table), len(found), len(action_out), int(untrained.sum()), table["p_value"].min()))
        print(*rows[-1], flush=True)
        print(found.sort_values("p_value").head(25).to_string(), flush=True)
    columns = ["null", "comparisons", "discoveries", "action_out_write", "untrained_heads", "smallest_p"]
    pd.DataFrame(rows, columns=columns).to_csv(out, index=False, float_format="%.6g")


if __name__ == "__main__":
    main(*sys.argv[1:])
