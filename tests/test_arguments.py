"""Arguments are checked and refused in a sentence (numbers, names, paths); files are written whole or not at all."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from dt_lens import DtLensError, WeightSVD, save_pretrained
from dt_lens.arguments import atomic_write
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.lens.checkpoints import read_checkpoint
from dt_lens.statistics.multiplicity import q_values

Make = Callable[..., Any]
NAME = "blocks.0.mlp.W_in"


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("scan", {"seed": -1}, "seed is -1; it must be a whole number of at least 0"),
        ("strongest", {"seed": -1}, "seed is -1"),
        ("subspaces", {"seed": -1}, "seed is -1"),
        ("scan", {"seed": 1.5}, "seed is 1.5"),
        ("scan", {"seed": None}, "seed is None"),
        ("pools", {"null": "untrained", "seed": -1, "draws": 2}, "seed is -1"),
        ("scan", {"draws": -5}, "draws is -5; it must be a whole number of at least 1"),
        ("scan", {"draws": 0}, "draws is 0"),
        ("scan", {"null": "untrained", "draws": 1.5}, "draws is 1.5"),
        ("strongest", {"null": "shuffled", "draws": 0}, "draws is 0"),
        ("scan", {"null": ["haar"]}, "Unknown null"),
        ("scan", {"matrices": 5}, "matrices is 5"),
        ("scan", {"matrices": [None]}, r"matrices is \[None\]"),
        ("scan", {"embeddings": 3}, "embeddings is 3"),
        ("scan", {"matrices": []}, "matrices is empty"),
        ("strongest", {"matrices": ()}, "matrices is empty"),
        ("scan", {"embeddings": []}, "embeddings is empty"),
        ("strongest", {"samples": -1}, "samples is -1"),
        ("strongest", {"samples": 0}, "samples is 0"),
        ("subspaces", {"k": None}, "k is None"),
        ("subspaces", {"k": True}, "k is True"),
        ("subspaces", {"k": [2, "a"]}, "k is 'a'"),
        ("subspaces", {"k": []}, "k is empty; give one or several whole numbers"),
        ("cosines", {"k": 1.5}, "k is 1.5"),
        ("cosines", {"k": -1}, "k is -1"),
        ("top", {"k": "a"}, "k is 'a'"),
        ("top", {"labels": -1}, "labels is -1"),
        ("top", {"embedding": 5}, "There is no embedding 5"),
        ("tokens", {"k": 1.5}, "k is 1.5"),
    ],
)
def test_invalid_arguments_are_refused(make_dt: Make, method: str, arguments: dict[str, Any], message: str) -> None:
    one = {"matrix": NAME, "embedding": "state_in"} if method in ("cosines", "top") else {"matrices": NAME}
    with pytest.raises(DtLensError, match=message):
        getattr(WeightSVD(make_dt()), method)(**{**one, **arguments})


def test_names_that_are_not_text_are_refused(make_dt: Make) -> None:
    model = make_dt()
    for name in (None, 5, [NAME], slice(1)):
        with pytest.raises(DtLensError, match="A matrix is named by text"):
            WeightSVD(model)[name]  # type: ignore[index]
    for name in (5, None, ["state_in"]):
        with pytest.raises(DtLensError, match="There is no embedding"):
            model.embeddings[name]


def test_numbers_of_any_kind(make_dt: Make) -> None:
    svd = WeightSVD(make_dt(), np.int64(4))
    for k in (np.int64(3), np.array([3]), (3,), torch.tensor([3])):
        pd.testing.assert_frame_equal(svd.subspaces(NAME, k=k), svd.subspaces(NAME, k=3))
    assert len(svd.cosines(NAME, "state_in", k=np.int32(2))) == 2
    pd.testing.assert_frame_equal(svd.scan(NAME, seed=np.int64(1)), svd.scan(NAME, seed=1))


@pytest.mark.parametrize("path", [3, None, b"here", ["here"], "a\0b"])
def test_invalid_paths_are_refused(make_dt: Make, path: Any) -> None:
    """Every public argument that takes a file or folder; ``None`` is left out where it means that there is none."""
    model = make_dt()
    doors: dict[str, Callable[[Any], Any]] = {
        "source": SweepResults,
        "folder": lambda given: save_pretrained(model, given),
        "path": read_checkpoint,
    }
    if path is not None:
        doors["resume"] = lambda given: WeightSVD(model, resume=given)
    for name, door in doors.items():
        with pytest.raises(DtLensError, match=f"^{name} is .*; it must be the path of a file or folder") as caught:
            door(path)
        assert "\0" not in str(caught.value)


@pytest.mark.parametrize("p", [[0.1, np.nan], [1.1], [-0.1], 0.5, [[0.1]], ["a"], None, "x", [1j]])
def test_invalid_p_values_are_refused(p: Any) -> None:
    with pytest.raises(DtLensError, match="p_values must be a row of numbers between 0 and 1"):
        q_values(p)


def test_no_p_values_are_no_q_values() -> None:
    assert q_values([]).tolist() == []


def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "deeper" / "table.csv.gz"
    for text in ("old", "new"):
        with atomic_write(file) as part:
            assert part.parent == file.parent and part.name.endswith("table.csv.gz")  # pandas goes by the suffix
            part.write_text(text[:1])
            part.write_text(text)
            assert not file.exists() or file.read_text() == "old"
    assert file.read_text() == "new" and list(file.parent.iterdir()) == [file]


class Odd(Exception):
    """A library's own error for a full disk."""


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left"), DtLensError),
        (Odd("No space left"), DtLensError),
        (ValueError("No space left"), ValueError),
        (KeyboardInterrupt("No space left"), KeyboardInterrupt),
    ],
)
def test_a_failure_leaves_the_old_file_whole(tmp_path: Path, error: BaseException, raised: type[BaseException]) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(raised, match="No space left") as caught, atomic_write(file, Odd) as part:
        part.write_text("ne")
        raise error
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    if raised is DtLensError:
        assert str(caught.value) == f"{file} cannot be written: No space left; choose another folder or make room."


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DtLensError, match=r"file cannot be written: File too large; "), atomic_write(file) as part:
            part.write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    read_only = Path("/sys")
    if os.geteuid() != 0:
        (tmp_path / "folder").chmod(0o500)
        read_only = tmp_path / "folder"
    for file, why in (
        (tmp_path / "file" / "x", "Not a directory"),
        (tmp_path / "file" / "deeper" / "x", "Not a directory"),
        (tmp_path / "folder", "Is a directory"),
        (Path("/dev/null/x"), "Not a directory"),
        (read_only / "x", ".*"),  # the reason depends on who asks
    ):
        with pytest.raises(DtLensError, match=rf"^{file} cannot be written: {why}; "), atomic_write(file) as part:
            part.write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"} and not any((tmp_path / "folder").iterdir())


def test_who_may_read_a_file_does_not_depend_on_its_writer(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "private") as part:
        part.chmod(0o600)  # as safetensors leaves it
    assert (tmp_path / "private").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    with atomic_write(tmp_path / "link") as part:
        part.write_text("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_text() == "x"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """Such as ``--out /dev/stdout``."""
    pipe, read = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    with atomic_write(pipe) as part:
        part.write_text("x")
    reader.join(10)
    assert read == ["x"] and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
