"""How a study's result is written: a table, a record of plain JSON values, and whatever page there is beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dt_lens.arguments import atomic_write

__all__ = ["plain", "write_tables"]


def plain(value: Any) -> Any:
    """``value`` in plain JSON values; numbers that are not finite become ``None``.

    >>> plain({"a": (np.float64(1.5), float("nan")), 2: "b"})
    {'a': [1.5, None], '2': 'b'}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tables(folder: Path, name: str, table: pd.DataFrame, record: Mapping[str, Any]) -> None:
    """Write ``table`` to ``name.csv`` and ``record`` to ``name.json`` in ``folder``.

    Raises:
        DtLensError: when they cannot be written.
    """
    with atomic_write(folder / f"{name}.csv") as part:
        table.to_csv(part, index=False)
    with atomic_write(folder / f"{name}.json") as part:
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
