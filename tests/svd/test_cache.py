"""Results that are kept in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dt_lens.errors import DtLensError
from dt_lens.svd.cache import KeptResults


def test_a_file_in_the_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(
        DtLensError, match=r"file/.* cannot be written: Not a directory; choose another folder or make room\.$"
    ):
        KeptResults(file).get("key", lambda: {"x": torch.zeros(2)})
    assert file.read_text() == "in the way"


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DtLensError, match="No space left"):
        KeptResults(tmp_path / "kept").get("key", lambda: {"x": torch.zeros(2)})
    assert not list((tmp_path / "kept").iterdir())
