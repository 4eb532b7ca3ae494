"""The command `clusters`: the table in plain words, files, and errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dt_lens import load, save_pretrained
from dt_lens.cli.options import split

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(make_dt: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved agent whose facts say what its twelve states consist of."""
    from dataclasses import replace

    model = make_dt(3, state_dim=12, n_layers=1)
    factors = {"row": [i // 4 for i in range(12)], "odd": ["no", "yes"] * 6}
    model.facts = replace(model.facts, factors={"state_in": factors})
    place = tmp_path_factory.mktemp("agents") / "agent"
    save_pretrained(model, place)
    return place


def test_it_says_how_many_how_sure_and_what_the_numbers_mean(dt_lens: Run, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "made" / "clusters.csv"
    found = dt_lens("clusters", folder, "--matrices", "*.W_in", "--sv", "0-2", "--draws", 99, "--out", file)
    assert found.returncode == 0, found.stderr
    said = " ".join(found.stdout.split())
    assert "The strongest of 3 rows" in said
    assert "of 3 rows (a row is a direction) sort labels by a factor at q <= 0.05" in said
    assert "An untrained model of the same shape: 0 of 3 (null: haar)." in said
    assert "ε² is the share of the variance of the labels' ranks" in said and "AUC is the chance" in said
    assert "Null: haar. A direction that means nothing points anywhere" in said
    assert "99 random directions were drawn, so no p-value is below 1.0e-02" in said
    assert "A row above all of them by one factor alone has a p-value of up to 2.0e-02." in said
    assert "too large for one row alone to have q <= 0.05" in said
    assert str(file) in found.stderr
    table = pd.read_csv(file)
    assert list(table["sv"]) == [0, 1, 2] and {"effect_row", "p_odd", "q_value"} <= set(table.columns)
    assert table["p_value"].min() >= 0.01


def test_strata_levels_and_a_file_of_factors(dt_lens: Run, folder: Path, tmp_path: Path) -> None:
    few = ("--matrices", "*.W_in", "--sv", "0", "--draws", 19)
    said = dt_lens("clusters", folder, "--strata", "row", *few).stdout
    assert "Labels were ranked within each combination of row." in said and " odd " in said
    said = dt_lens("clusters", folder, "--only", "row=2", *few).stdout
    assert "row=2" in said and "AUC" in said and "ε²" not in said
    file = tmp_path / "factors.csv"
    labels = list(load(folder, check=False).embeddings["state_in"].labels)
    pd.DataFrame({"label": labels, "third": [i % 3 for i in range(12)]}).to_csv(file, index=False)
    assert " third " in dt_lens("clusters", folder, "--factors", file, *few).stdout


def test_commas_in_parentheses_belong_to_a_level() -> None:
    assert split("cell=(3, 6), object,(a", "only") == ["cell=(3, 6)", "object", "(a"]
    assert split("*.W_in,*.W_out", "matrices") == ["*.W_in", "*.W_out"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--factors", "nowhere.csv"), "nowhere.csv"),
        (("--only", "rows"), "Did you mean 'row'"),
        (("--null", "shuffled"), "haar and spectrum"),
        (("--strata", "row,odd"), "No factor is left"),
        (("--out", "/dev/null/x.csv"), "cannot be written"),
    ],
)
def test_errors_are_one_sentence(dt_lens: Run, folder: Path, words: tuple[str, ...], said: str) -> None:
    found = dt_lens("clusters", folder, *words)
    assert found.returncode == 2 and said in found.stderr and "Traceback" not in found.stderr
