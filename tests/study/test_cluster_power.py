"""The power of the test of clusters agrees with what whole tests find."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from dt_lens import DtLensError, Embedding, EmbeddingRegistry, clusters
from dt_lens.lens.matrices import Structure
from dt_lens.study.cluster_power import (
    COLUMNS,
    cluster_power,
    main,
    power_figure,
    separating_direction,
    states_of_factors,
    write_cluster_power,
)
from dt_lens.svd.drawn_models import Drawn


def test_power_rises_with_the_effect_and_falls_with_rows(tmp_path: Path) -> None:
    table = cluster_power((24, 48), (5, 40), [0.0, 0.6, 1.0], trials=60, labels=100)
    assert list(table.columns) == COLUMNS
    for _, curve in table.groupby(["d_model", "rows"]):
        assert (np.diff(curve["effect"]) > 0).all() and curve["found"].is_monotonic_increasing
        assert curve["found"].iloc[0] < 0.1
    end = table[table["cosine"] == 1.0].set_index(["d_model", "rows"])["found"]
    assert end[48, 5] > 0.95
    middle = table[table["cosine"] == 0.6].set_index(["d_model", "rows"])["found"]
    assert (middle.xs(5, level=1) >= middle.xs(40, level=1)).all()
    files = {file.name: file for file in write_cluster_power(tmp_path / "made", table)}
    assert set(files) == {"cluster_power.csv", "cluster_power.html", "cluster_power.md"}
    pd.testing.assert_frame_equal(pd.read_csv(files["cluster_power.csv"]), table, rtol=1e-3)
    assert "| 24 | 5 | 0." in files["cluster_power.md"].read_text()
    assert len(power_figure(table).data) == 8
    with pytest.raises(DtLensError, match="effect"):
        power_figure(table.drop(columns="effect"))


def test_a_whole_test_finds_what_the_curve_says() -> None:
    """One direction along what separates the passengers best: the curve has it found nearly always."""
    labels, levels = states_of_factors(48, 100)
    E = labels / np.linalg.norm(labels, axis=1, keepdims=True)
    u, found = separating_direction(E, levels["passenger"]), 0
    table = pd.DataFrame(levels, index=[f"state {i}" for i in range(100)])
    for seed in range(8):
        rng = np.random.default_rng(seed)
        frame = np.linalg.qr(np.column_stack([u, rng.standard_normal((48, 4))]))[0]
        registry = EmbeddingRegistry(48, "nothing")
        registry["state_in"] = Embedding(torch.from_numpy(labels), kind="state")
        W = torch.from_numpy(frame * np.arange(9.0, 4.0, -1.0) @ np.linalg.qr(rng.standard_normal((5, 5)))[0])
        model = Drawn({"blocks.0.mlp.W_in": W}, Structure(1, 1, 48, (1.0,), (None,), (None,)), registry)
        row = clusters(model, table, beside=False, seed=seed).iloc[0]
        found += row["factor"] == "passenger" and row["q_value"] <= 0.05
    assert found >= 7


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([], 2)])
def test_bad_arguments_make_no_folder(
    words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == code and not list(tmp_path.iterdir())
