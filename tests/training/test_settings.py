"""Settings are checked when they are made, and give every step its learning rate."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dt_lens.errors import DtLensError
from dt_lens.training.settings import AgentSettings, Schedule, TextSettings

KINDS: list[type[Any]] = [AgentSettings, TextSettings]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps is 0; it must be a whole number of at least 1."),
        ({"batch_size": 2.5}, "batch_size is 2.5; it must be a whole number of at least 1."),
        ({"warmup": -1}, "warmup is -1; it must be a whole number of at least 0."),
        ({"d_model": 16, "n_heads": 3}, "d_model is 16; it must be a multiple of n_heads, 3."),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1."),
        ({"lr": 0.0}, "lr is 0.0; it must be positive."),
        ({"lr": math.nan}, "lr is nan; it must be positive."),
        ({"clip": -1.0}, "clip is -1.0; it must be positive."),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; it must be at least 0."),
    ],
)
def test_a_value_out_of_range_is_one_sentence(kind: type[Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(DtLensError) as refused:
        kind(**change)
    assert str(refused.value) == words


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (AgentSettings, {"early": 1.5}, "early is 1.5; it must be at least 0 and below 1."),
        (AgentSettings, {"shortened": -0.1}, "shortened is -0.1; it must be at least 0 and below 1."),
        (AgentSettings, {"targets": (1.0, math.nan)}, "targets is (1.0, nan); it must be several finite numbers."),
        (TextSettings, {"vocabulary": 256}, "vocabulary is 256; it must be a whole number of at least 257."),
        (TextSettings, {"context": 1}, "context is 1; it must be a whole number of at least 2."),
        (TextSettings, {"held_out": 1.0}, "held_out is 1.0; it must be above 0 and below 1."),
        (TextSettings, {"held_out": 0.0}, "held_out is 0.0; it must be above 0 and below 1."),
    ],
)
def test_each_kind_checks_its_own_settings(kind: type[Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(DtLensError) as refused:
        kind(**change)
    assert str(refused.value) == words


@pytest.mark.parametrize("kind", KINDS)
def test_the_learning_rate_warms_up_and_comes_down(kind: type[Any]) -> None:
    settings: Schedule = kind(steps=100, lr=1.0, warmup=10)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[:10] == [(step + 1) / 10 for step in range(10)]
    assert rates[10:] == pytest.approx(
        [0.01 + 0.99 * (1 + math.cos(math.pi * i / 90)) / 2 for i in range(90)], rel=1e-12
    )
    assert rates[9] == rates[10] == 1.0 and rates[55] == pytest.approx(0.505)


def test_without_a_warm_up_the_first_step_has_the_full_rate() -> None:
    assert AgentSettings(steps=4, lr=0.5, warmup=0).rate(0) == 0.5
