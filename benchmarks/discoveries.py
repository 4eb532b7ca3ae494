"""The discoveries of one model's scan under every null, side by side: ``docs/discoveries.csv``.

    python benchmarks/discoveries.py hopper docs/discoveries.csv            # all nulls, or those named after the file
    python benchmarks/discoveries.py hopper docs/discoveries.csv bands

Statistic: rows of ``scan()`` with q < 0.05 (Benjamini-Hochberg over the whole table), at the defaults: all matrices,
natural pairings, seed 0, activations of ten episodes (of a language model its held-out text).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

import dt_lens
from dt_lens import WeightSVD
from dt_lens.statistics.nulls import NULLS
from dt_lens.svd.null_sources import OF_THE_STREAM

ALPHA = 0.05


def main(name: str, out: str, *nulls: str) -> None:
    """Scan ``name`` under these nulls (all by default) and write a row for each to the CSV file ``out``."""
    model = dt_lens.load(name)
    svd, inputs = WeightSVD(model), dt_lens.collect_activations(model, seed=0)
    columns = ["null", "comparisons", "discoveries", "action_out_write", "untrained_heads", "smallest_p"]
    kept = pd.read_csv(out) if Path(out).is_file() else pd.DataFrame(columns=columns)
    for null in nulls or NULLS:
        table = svd.scan(null=null, seed=0, activations=inputs if null in OF_THE_STREAM else None)
        found = table[table["q_value"] < ALPHA]
        action_out = found[(found["embedding"] == "action_out") & (found["side"] == "write")]
        untrained = found["embedding"].isin(table.attrs["untrained"])
        row = (null, len(table), len(found), len(action_out), int(untrained.sum()), table["p_value"].min())
        print(*row, flush=True)
        print(found.sort_values("p_value").head(25).to_string(), flush=True)
        kept = pd.concat([kept[kept["null"] != null], pd.DataFrame([row], columns=columns)], ignore_index=True)
        kept.to_csv(out, index=False, float_format="%.6g")


if __name__ == "__main__":
    main(*sys.argv[1:])
