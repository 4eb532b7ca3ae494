"""A table such as a scan gives."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest


@pytest.fixture
def scan_table() -> pd.DataFrame:
    rows = []
    random = np.random.default_rng(0)
    for matrix, sides in (("blocks.10.mlp.W_in", ["read"]), ("blocks.2.attn.QK.1", ["query", "key"])):
        for side in sides:
            for embedding in ("state_in", "action_out"):
                for sv in range(3):
                    cosine = float(random.uniform(-0.3, 0.3))
                    rows.append(
                        {"matrix": matrix, "side": side, "sv": sv, "sigma": 3.0 - sv, "embedding": embedding,
                         "label": "rootz", "cosine": cosine, "z": abs(cosine) * 10, "q_value": 0.5, "extra": None}
                    )  # fmt: skip
    table = pd.DataFrame(rows)
    table.loc[1, ["cosine", "q_value"]] = [-0.9, 0.01]  # blocks.10.mlp.W_in, state_in, sv 1
    return table
