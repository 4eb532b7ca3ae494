"""The command ``activations`` writes what the function gives."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from dt_lens import Activations, collect_activations, load
from dt_lens.cli.app import app


def test_the_file_is_what_the_function_gives(tmp_path: Path) -> None:
    out = tmp_path / "acts.safetensors"
    asked = [
        "activations",
        "hopper",
        "--episodes",
        "1",
        "--seed",
        "3",
        "--max-steps",
        "8",
        "--matrices",
        "*.W_in,*.OV.*",
    ]
    result = CliRunner().invoke(app, [*asked, "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = Activations.load(out)
    again = collect_activations(load("hopper"), episodes=1, seed=3, max_steps=8, matrices=["*.W_in", "*.OV.*"])
    assert found.digest == again.digest
    assert found.record == again.record
    assert found.record["steps"] == 8
    assert "effective rank" in result.output
    assert "2.mlp.W_in" in result.output
    assert found.digest in result.output
