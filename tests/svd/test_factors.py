"""Where factors come from: tables that fit the labels or are refused in one sentence, and the text of tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from dt_lens import DtLensError, Embedding, EmbeddingRegistry
from dt_lens.svd.factors import factors_of, read_factors
from dt_lens.svd.token_factors import token_factors

LABELS = ["a", "b", "c", "d"]


def registry(kind: str = "state", labels: list[str] = LABELS) -> EmbeddingRegistry:
    made = EmbeddingRegistry(3, "nobody")
    made["known"] = Embedding(torch.eye(3)[torch.arange(len(labels)) % 3], labels, kind=kind)
    return made


def of_table(table: pd.DataFrame, **options: Any) -> Any:
    return factors_of(None, registry(), table, **options)["known"]


def test_levels_go_to_their_labels() -> None:
    six = registry(labels=list("abcdef"))
    given = {"label": list("fedcba"), "kind": ["x", "y", None, "x", "y", "z"], "n": [1, 2, 1, 2, 1, 2]}
    found = factors_of(None, six, pd.DataFrame(given))["known"]
    assert found.tested == {"kind": ["z", "y", "x", None, "y", "x"], "n": [2, 1, 2, 1, 2, 1]}
    missing = pd.DataFrame({"n": [1.0, np.nan, 2.0, 1.0, 2.0, np.nan]}, index=list("abcdef"))
    assert factors_of(None, six, missing)["known"].tested == {"n": [1.0, None, 2.0, 1.0, 2.0, None]}
    # Labels that occur twice are matched by their place.
    twice = EmbeddingRegistry(3, "nobody")
    twice["known"] = Embedding(torch.eye(4, 3), ["a", "a", "b", "c"])
    placed = pd.DataFrame({"n": [1, 2, 1, 2]}, index=["a", "a", "b", "c"])
    assert factors_of(None, twice, placed)["known"].tested == {"n": [1, 2, 1, 2]}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"label": ["a", "b", "c", "e"], "n": [1, 2, 1, 2]}, "no label 'e'"),
        ({"label": ["a", "b", "c"], "n": [1, 2, 1]}, "lacks 1 of the 4 labels of known, such as 'd'"),
        ({"label": [*LABELS, "a"], "n": [1, 2, 1, 2, 1]}, "two rows for the label 'a'"),
        ({"label": LABELS}, "is empty"),
        ({"label": LABELS, "n": [1, 1, 1, 1]}, "'n' has one level, 1, and no other"),
        ({"label": LABELS, "n": [1, 1, None, None]}, "one level, 1.0, and 2 without; give those another"),
        ({"label": LABELS, "n": [None] * 4}, "applies to no label"),
        ({"label": LABELS, "n": [1, 2, 3, 4]}, "a level of its own for each label"),
        ({"label": LABELS, "n": [1, 1, 1, 2]}, "Only one label has the level 2"),
    ],
)
def test_a_table_that_does_not_fit_is_one_sentence(table: dict[str, Any], said: str) -> None:
    with pytest.raises(DtLensError, match=said):
        of_table(pd.DataFrame(table))


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "factors.csv"
    file.write_text("label,kind\na,x\nNA,\n1,y\n")
    table = read_factors(file)
    assert table["label"].tolist() == ["a", "NA", "1"] and table["kind"].tolist() == ["x", None, "y"]
    file.write_text("name,kind\na,x\n")
    with pytest.raises(DtLensError, match="no column 'label'"):
        read_factors(file)
    for wrong in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(DtLensError, match="cannot be read"):
            read_factors(wrong)


def test_strata_leave_out_what_they_determine() -> None:
    table = pd.DataFrame({"label": LABELS, "n": [1, 1, 2, 2], "m": [1, 2, 1, 2], "copy": [1, 1, 2, 2]})
    found = of_table(table, strata="n")
    assert (list(found.tested), list(found.strata)) == (["m"], ["n"])
    assert "one level in each stratum of n" in found.left_out["copy"]
    with pytest.raises(DtLensError, match="one level in each stratum"):
        of_table(table, strata="n", only="copy")


def test_an_embedding_that_lacks_a_stratum_is_left_out() -> None:
    """Its labels would be ranked all together, and the table would say that they were not."""

    factors = {"known": {"n": [1, 1, 2, 2], "m": [1, 2, 1, 2]}, "other": {"m": [1, 2, 1, 2]}}
    model = SimpleNamespace(facts=SimpleNamespace(factors=factors))
    two = registry()
    two["other"] = Embedding(torch.eye(4, 3), LABELS)
    found = factors_of(model, two, strata="n")
    assert (list(found["known"].tested), list(found["known"].strata)) == (["m"], ["n"])
    assert (found["other"].tested, found["other"].strata) == ({}, {})
    assert "The labels of other have no factor 'n', which is held fixed" in found["other"].left_out["m"]
    with pytest.raises(DtLensError, match="No factor is left to test: The labels of other have no factor"):
        factors_of(model, two, embeddings=["other", "known"], strata="n", only="n")


def test_a_factor_whose_name_holds_an_equals_sign() -> None:
    table = pd.DataFrame({"label": LABELS, "size=big": [1, 1, 2, 2], "m": [1, 2, 1, 2], "size": ["x", "y", "y", "x"]})
    assert list(of_table(table).tested) == ["size=big", "m", "size"]
    held = of_table(table, strata="size=big", only="m")
    assert held.strata == {"size=big": [1, 1, 2, 2]}
    found = of_table(table, only=["size=big", "size=big=2", "size=x"]).tested
    assert found == {
        "size=big": [1, 1, 2, 2],
        "size=big=2": [False, False, True, True],
        "size=x": [True, False, False, True],
    }
    with pytest.raises(DtLensError, match="no level 'large'; it has x, y"):
        of_table(table, only="size=large")


@pytest.mark.parametrize("level", [[1], {"a": 1}, np.ones(2), torch.ones(1)])
def test_a_level_is_a_plain_value(level: Any) -> None:
    cells = pd.Series([1, 2, 1, level], index=LABELS, dtype=object)
    with pytest.raises(DtLensError, match=r"The factor 'n' has the level .* must be text, a number"):
        factors_of(None, registry(), pd.DataFrame({"n": cells}))


def test_tokens_of_every_spelling() -> None:
    labels = ["Ġthe", "The", "ing", "Ġ12", "7", ".", "Ġ(", "ĠX1", "Ã©", "Ċ", "##", "<|end|>"]
    found = token_factors(labels)
    named = {
        name: [label for label, is_so in zip(labels, levels, strict=True) if is_so] for name, levels in found.items()
    }
    assert named == {
        "digits": ["Ġ12", "7"],
        "capitalised": ["The", "ĠX1"],
        "leading_space": ["Ġthe", "Ġ12", "Ġ(", "ĠX1"],
        "punctuation": [".", "Ġ(", "##"],
        "part_of_word": ["The", "ing", "Ã©"],
    }
    assert found["capitalised"][8] is False and found["capitalised"][3] is None  # é is lower case; a digit has no case
    assert token_factors(["walk", "##ing", "1"])["part_of_word"] == (False, True, None)
    assert token_factors(["▁the", "re"])["leading_space"] == (True, False)
    # Of tokens it needs no table, and what does not vary is left out.
    found_of = factors_of(None, registry("token", ["a", "B", "C", "d"]))["known"]
    assert list(found_of.tested) == ["capitalised"]
    assert set(found_of.left_out) == {"digits", "leading_space", "punctuation", "part_of_word"}
