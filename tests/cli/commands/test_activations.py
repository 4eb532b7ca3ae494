"""The command ``activations`` writes what the function gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dt_lens import Activations, collect_activations, load


def test_the_file_is_what_the_function_gives(dt_lens: Callable[..., Any], cartpole: Path, tmp_path: Path) -> None:
    out = tmp_path / "acts.safetensors"
    options = ["--episodes", 1, "--seed", 3, "--max-steps", 5, "--matrices", "*.W_in,*.OV.*"]
    result = dt_lens("activations", cartpole, *options, "--out", out)
    assert result.returncode == 0, result.stderr
    found = Activations.load(out)
    model = load(cartpole, check=False)
    again = collect_activations(model, episodes=1, seed=3, max_steps=5, matrices=["*.W_in", "*.OV.*"])
    assert found.digest == again.digest
    assert found.record == again.record
    assert found.record["steps"] == 5
    assert "effective rank" in result.stdout
    assert "0.mlp.W_in" in result.stdout
    assert found.digest in result.stdout
