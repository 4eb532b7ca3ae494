"""The pictures of results are those that their script draws from the tables as they stand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_pictures", PICTURES / "results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_verdict_is_read_from_the_pages(script: ModuleType) -> None:
    found = script.verdicts()
    assert len(found) == 10
    said = [verdict for claims in found.values() for verdict in claims.values() if verdict[0]]
    assert len(said) == 52
    assert found["hopper"][1] == ("no", "supported") and found["taxi"][8] == ("undecided", "")


@pytest.mark.parametrize("name", ["court", "atlas_row", "clusters"])
def test_the_picture_is_up_to_date(script: ModuleType, name: str) -> None:
    """After a change of a table: ``python docs/pictures/results.py``."""
    assert getattr(script, name)() == (PICTURES / f"{name}.svg").read_text(encoding="utf-8")


def test_pictures_are_small() -> None:
    assert all(picture.stat().st_size < 150_000 for picture in PICTURES.glob("*.svg"))
