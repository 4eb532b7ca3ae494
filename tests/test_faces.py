"""What ``dir`` and tab completion show of a room is what its ``__init__.pyi`` lists, and nothing else."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import dt_lens

ROOT = Path(dt_lens.__file__).parent
ROOMS = {".".join(("dt_lens", *stub.parent.relative_to(ROOT).parts)): stub for stub in ROOT.rglob("__init__.pyi")}


def listed(stub: Path) -> set[str]:
    """The names that a stub exports."""
    return {alias.asname or alias.name for node in ast.parse(stub.read_text()).body for alias in node.names}  # type: ignore[attr-defined]


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_dir_is_the_public_names(room: str) -> None:
    module, names = importlib.import_module(room), listed(ROOMS[room])
    importlib.import_module("dt_lens.svd.plots")  # a file that was imported does not show either
    assert {name for name in dir(module) if not name.startswith("__")} == {n for n in names if not n.startswith("__")}
    assert set(module.__all__) == names


def test_dir_of_the_package_is_what_the_docs_begin_with() -> None:
    assert {"load", "wrap", "certify", "evaluate", "WeightSVD", "SingularEdit", "DtLensError"} <= set(dir(dt_lens))
    assert not {"errors", "progress", "arguments", "lazy_loader", "sys"} & set(dir(dt_lens))


def test_every_folder_has_a_face_that_lists_it() -> None:
    folders = {path.parent for path in ROOT.rglob("__init__.py")}
    assert {path.parent for path in ROOMS.values()} == {f for f in folders if f.name != "commands"}
