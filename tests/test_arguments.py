"""What is passed in is what was asked for, or is refused in a sentence: numbers, names, paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from dt_lens import DtLensError, WeightSVD, save_pretrained
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
        ("strongest", {"samples": -1}, "samples is -1"),
        ("strongest", {"samples": 0}, "samples is 0"),
        ("subspaces", {"k": None}, "k is None"),
        ("subspaces", {"k": True}, "k is True"),
        ("subspaces", {"k": [2, "a"]}, "k is 'a'"),
        ("subspaces", {"k": []}, "k holds no number"),
        ("cosines", {"k": 1.5}, "k is 1.5"),
        ("cosines", {"k": -1}, "k is -1"),
        ("top", {"k": "a"}, "k is 'a'"),
        ("top", {"labels": -1}, "labels is -1"),
        ("top", {"embedding": 5}, "There is no embedding 5"),
        ("tokens", {"k": 1.5}, "k is 1.5"),
    ],
)
def test_arguments_that_are_none(make_dt: Make, method: str, arguments: dict[str, Any], message: str) -> None:
    one = {"matrix": NAME, "embedding": "state_in"} if method in ("cosines", "top") else {"matrices": NAME}
    with pytest.raises(DtLensError, match=message):
        getattr(WeightSVD(make_dt()), method)(**{**one, **arguments})


def test_names_that_are_no_text(make_dt: Make) -> None:
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
def test_paths_that_are_none(make_dt: Make, path: Any) -> None:
    """Every door through which a file or folder comes in; ``None`` where it means none is passed over."""
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
def test_p_values_that_are_none(p: Any) -> None:
    with pytest.raises(DtLensError, match="p_values must be a row of numbers between 0 and 1"):
        q_values(p)


def test_no_p_values_are_no_q_values() -> None:
    assert q_values([]).tolist() == []
