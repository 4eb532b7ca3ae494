"""The on-disk cache of results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dt_lens.errors import DtLensError
from dt_lens.svd import cache
from dt_lens.svd.cache import ResultCache


def test_a_file_in_the_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(
        DtLensError, match=r"file/.* cannot be written: Not a directory; choose another folder or make room\.$"
    ):
        ResultCache(file).get("key", lambda: {"x": torch.zeros(2)})
    assert file.read_text() == "in the way"


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DtLensError, match="No space left"):
        ResultCache(tmp_path / "kept").get("key", lambda: {"x": torch.zeros(2)})
    assert not list((tmp_path / "kept").iterdir())


def test_another_key_and_another_version_are_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []

    def read(key: str) -> float:
        def make() -> dict[str, torch.Tensor]:
            made.append(float(len(made)))
            return {"x": torch.tensor([made[-1]])}

        return float(ResultCache(tmp_path).get(key, make)["x"])

    assert [read("a"), read("b"), read("a"), read("b")] == [0, 1, 0, 1]
    monkeypatch.setattr(cache, "__version__", "0.0.0")
    assert [read("a"), read("a")] == [2, 2]


def test_a_file_with_one_flipped_bit_is_computed_again(tmp_path: Path) -> None:
    sigma = {"sigma": torch.tensor([3.05, 1.0], dtype=torch.float64), "read": torch.eye(2)}
    ResultCache(tmp_path).get("key", lambda: sigma)
    (file,) = tmp_path.iterdir()
    whole, made = file.read_bytes(), []
    for place in range(0, len(whole), 5):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        found = ResultCache(tmp_path).get("key", lambda: made.append(1) or sigma)
        assert all(torch.equal(found[name], tensor) for name, tensor in sigma.items()), place
    assert len(made) > 20
    file.write_bytes(whole)
    ResultCache(tmp_path).get("key", lambda: pytest.fail("a whole file was computed again"))
