"""docs/discrete.md from data to verdict: each of its commands at a small size, in the order in which it shows them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "discrete.md"
# What makes each command small; an option given twice counts as it is given last.
SMALL = {
    "record": "--episodes 60",
    "train": "--steps 30 --warmup 5 --d-model 16 --layers 1 --eval-every 30 --eval-episodes 2",
    "evaluate": "--episodes 4 --max-steps 20 --workers 1",
    "clusters": "--matrices blocks.0.attn.OV.0 --sv 0-2 --draws 200",
    "study": "--episodes 2 --edits 1 --matrices blocks.0.mlp.W_in --workers 1 --no-video",
    "court": "--episodes 2 --draws 200 --workers 1 --max-steps 15",
    "sweep": "--sv 0,1 --matrices blocks.0.mlp.W_in --episodes 2 --max-steps 15 --workers 1",
    "atlas": "",
}


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines() if line.startswith("dt-lens ")]


@pytest.mark.acceptance(minutes=3)
def test_every_command_of_the_page(
    dt_lens: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gymnasium as gym

    from dt_lens.study.court import causes

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(causes, "CONTROLS", 3)
    monkeypatch.chdir(tmp_path)
    found = commands()
    assert {words[0] for words in found} == set(SMALL)
    there = "Taxi-v4" if "Taxi-v4" in gym.registry else "Taxi-v3"
    for words in found:
        small = shlex.split(SMALL[words[0]])
        result = dt_lens(*(there if word == "Taxi-v4" else word for word in words), *small)
        assert result.returncode == 0, (words, result.stderr)
    assert (tmp_path / "runs/taxi/model.safetensors").exists()
    for page in ("runs/study-taxi/report.html", "runs/court-taxi/court.html", "runs/atlas-taxi/atlas.html"):
        assert (tmp_path / page).exists(), page
    court = pd.read_csv(tmp_path / "runs/court-taxi/court.csv").set_index("claim")
    assert court.loc[8, "verdict"] != "not applicable" and "directions that cluster" in court.loc[8, "sentence"]
