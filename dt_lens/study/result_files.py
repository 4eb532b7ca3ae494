"""Write a result as files: its table as CSV, its record as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dt_lens.arguments import atomic_write

__all__ = ["json_values", "write_csv_and_json"]


def json_values(value: Any) -> Any:
    """``value`` as plain JSON values; numbers that are not finite become ``None``.

    >>> json_values({"a": (np.float64(1.5), float("nan")), 2: "b"})
    {'a': [1.5, None], '2': 'b'}
    """
    if isinstance(value, Mapping):
        return {str(key): json_values(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv_and_json(folder: Path, name: str, table: pd.DataFrame, record: Mapping[str, Any]) -> None:
    """Write ``table`` to ``name.csv`` and ``record`` to ``name.json`` in ``folder``.

    Raises:
        DtLensError: if they cannot be written.
    """
    with atomic_write(folder / f"{name}.csv") as part:
        table.to_csv(part, index=False)
    with atomic_write(folder / f"{name}.json") as part:
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
