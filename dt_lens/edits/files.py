"""Files of edits: a JSON list of their records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dt_lens.arguments import atomic_write, local_path
from dt_lens.errors import DtLensError, because

__all__ = ["read_records", "save_records"]


def save_records(file: str | Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write records of edits to ``file``.

    Raises:
        DtLensError: if it cannot be written.
    """
    path = local_path(file, "file")
    with atomic_write(path) as part:
        part.write_text(json.dumps(list(records), indent=1) + "\n", encoding="utf-8")
    return path


def read_records(file: str | Path) -> list[dict[str, Any]]:
    """The records in ``file``: a list of them, or a single one.

    Raises:
        DtLensError: if the file cannot be read, or holds anything else.
    """
    path = local_path(file, "file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DtLensError(
            f"{path} cannot be read as edits: {because(error)}; give a file that edit.save or save_edits wrote."
        ) from error
    records = [found] if isinstance(found, dict) else found
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise DtLensError(f"{path} holds no edits; give a file that edit.save or save_edits wrote.")
    return records
