"""A training run applies the learning rate of each step, and counts the losses of a row of its curve."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dt_lens.training.run import TrainingRun
from dt_lens.training.settings import AgentSettings


class Falling(TrainingRun):
    """One weight whose gradient is always 1, so that each step moves it by the learning rate."""

    def __init__(self, settings: AgentSettings, out: Path) -> None:
        model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(model.weight)
        super().__init__(settings, {}, out, model, torch.optim.SGD(model.parameters(), lr=1.0))
        self.written = 0

    @property
    def weight(self) -> float:
        return float(self.model.weight.detach())

    def loss(self) -> Tensor:
        return self.model.weight.sum().float()  # type: ignore[no-any-return]

    def measure(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def progress(self) -> float:
        return self.weight

    def write(self) -> None:
        self.written += 1


def test_each_step_moves_by_its_own_learning_rate(tmp_path: Path) -> None:
    settings = AgentSettings(steps=8, lr=1.0, warmup=4, clip=9.0)
    seen = [0.0]
    run = Falling(settings, tmp_path)
    run.finish(0, 100, seen.append)
    moved = [before - after for before, after in itertools.pairwise(seen)]
    assert moved[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0], abs=1e-12)
    assert moved == pytest.approx([settings.rate(step) for step in range(8)], abs=1e-12)
    assert run.curve[-1]["lr"] == settings.rate(7) and run.curve[-1]["weight"] == seen[-1]
    assert run.written == 1


def test_a_row_of_the_curve_has_the_mean_loss_since_the_last_one(tmp_path: Path) -> None:
    seen = [0.0]
    run = Falling(AgentSettings(steps=8, lr=1.0, warmup=4, clip=9.0), tmp_path)
    run.finish(3, 100, seen.append)
    assert [row["step"] for row in run.curve] == [3, 6, 8]
    means = [sum(seen[a:b]) / (b - a) for a, b in ((0, 3), (3, 6), (6, 8))]
    assert [row["loss"] for row in run.curve] == pytest.approx(means, rel=1e-6)


def test_a_report_after_a_row_has_the_loss_of_the_row(tmp_path: Path) -> None:
    settings = AgentSettings(steps=4, lr=1.0, clip=9.0, warmup=1)
    run, seen = Falling(settings, tmp_path), list[float]()
    run.finish(2, 100, lambda _: seen.append(run.mean_loss))
    losses = [-sum(settings.rate(step) for step in range(until)) for until in range(4)]
    assert seen == pytest.approx([0.0, sum(losses[:2]) / 2, losses[2], sum(losses[2:]) / 2], rel=1e-6, abs=0)
    assert seen[1] < -0.4
    resumed = Falling(settings, tmp_path)
    resumed.resume()
    assert resumed.mean_loss == seen[-1]
