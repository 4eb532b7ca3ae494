"""The command `scan`: every null, spans of directions, and what is printed about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from dt_lens import DtLensError
from dt_lens.cli.app import app
from dt_lens.lens.activations import Activations, Moments
from dt_lens.lens.matrices import catalogue


def scan(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["scan", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_the_null_is_named_with_what_it_assumes(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "scan.csv"
    said = scan(saved, "--null", "shuffled", "--draws", 2, "--matrices", "*.W_out", "--top", 2, "--out", file)
    assert "Null: shuffled. A direction that means nothing comes from a matrix of the same entries" in said
    assert "2 models were drawn, so no p-value is below" in said
    assert pd.read_csv(file)["p_value"].min() >= 1 / (1 + 2 * 16)
    assert "Null: haar. A direction that means nothing points anywhere" in scan(saved, "--top", 1)


def test_covariance_takes_a_file_of_activations(saved: Path, tmp_path: Path) -> None:
    import dt_lens

    model = dt_lens.load(saved)
    generator = torch.Generator().manual_seed(0)

    def moments() -> Moments:
        x = torch.randn(200, 16, generator=generator, dtype=torch.float64)
        return Moments(200, x.mean(0), x.T @ x / 200)

    reads = {name: name for name, matrix in catalogue(model).items() if matrix.left_norm}
    stream = {f"blocks.0.hook_resid_{place}": moments() for place in ("pre", "mid")}
    acts = Activations({name: moments() for name in reads}, reads, stream)
    acts.save(tmp_path / "acts.safetensors")
    said = scan(saved, "--null", "covariance", "--activations", tmp_path / "acts.safetensors", "--top", 1)
    assert "Null: covariance. A direction that means nothing is a draw from a Gaussian" in said
    with pytest.raises(DtLensError, match="none"):
        scan(saved, "--null", "covariance", "--activations", tmp_path / "none")


def test_covariance_of_a_language_model_takes_any_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    from dt_lens.behaviour.texts.task import TextTask

    monkeypatch.setattr(TextTask, "counts", {**TextTask.counts, "activations": 2})
    few = ("--matrices", "blocks.0.mlp.W_out", "--embeddings", "position_in", "--rank", 2, "--draws", 20)
    assert "Null: covariance." in scan("tiny-gpt2", "--null", "covariance", "--seed", 1, *few)


def test_subspaces(saved: Path, tmp_path: Path) -> None:
    said = scan(saved, "--subspaces", "--matrices", "*.W_in", "--top", 3, "--out", tmp_path / "spans.csv")
    assert "Null: haar. A subspace that means nothing" in said
    table = pd.read_csv(tmp_path / "spans.csv")
    assert {"overlap", "haar_overlap", "largest", "haar_largest"} <= set(table.columns)
    assert np.isfinite(table["p_value"]).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--null", "shuffld"), "shuffled"),
        (("--null", "shuffled", "--subspaces"), "leave --null out"),
        (("--activations", "acts.safetensors"), "leave them out"),
        (("--subspaces", "--draws", "5"), "--draws is for single directions"),
        (("--subspaces", "--activations", "none"), "--activations is for single directions"),
        (("--matrices", ""), "--matrices is '', which names nothing"),
        (("--embeddings", " , "), "--embeddings is ' , ', which names nothing"),
    ],
)
def test_options_that_exclude_each_other(saved: Path, options: tuple[str, ...], words: str) -> None:
    with pytest.raises(DtLensError, match=words):
        scan(saved, *options)
