"""Environments that wait for the next run: the same bits, and only where nothing could differ."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
from gymnasium.envs.toy_text import taxi as gymnasiums

import dt_lens
from dt_lens.behaviour.agents import idle
from dt_lens.behaviour.agents.environment import Environment, make_environment
from dt_lens.behaviour.agents.running import known_setting, run
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig


@pytest.fixture(autouse=True)
def _nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "_idle", {})


def _made(environment: str, kwargs: dict[str, Any], sizes: tuple[int, int], discrete: bool = True) -> Environment:
    return make_environment(environment, kwargs, HookedDecisionTransformerConfig(*sizes, discrete_actions=discrete))


def test_a_taxi_waits_and_another_kind_of_it_does_not_take_it() -> None:
    taxi = _made("Taxi-v4", {}, (500, 6))
    env = idle.take(taxi)
    idle.keep(taxi, [env])
    rainy = _made("Taxi-v4", {"is_rainy": True}, (500, 6))
    measured = replace(taxi, measure=lambda env: dict)
    for other in (rainy, replace(rainy, kwargs={"is_rainy": object()}), measured):
        assert idle._key(other) != idle._key(taxi)
    assert idle.take(rainy) is not env
    assert idle.take(taxi) is env
    assert idle.take(taxi) is not env


def test_other_environments_are_closed() -> None:
    cart = _made("CartPole-v1", {}, (4, 2))
    idle.keep(cart, [idle.take(cart)])
    assert not any(idle._idle.values())


def test_episodes_have_the_same_bits_in_environments_that_waited() -> None:
    model = dt_lens.load("taxi", check=False)
    setting = known_setting(model, "Taxi-v4", {}, 8.0, 12, deterministic=False)
    fresh = run(model, setting, range(8), workers=1)
    run(model, setting, range(50, 58), workers=1)
    assert len(idle._idle) == 1
    assert sorted(run(model, setting, range(8), workers=1)) == sorted(fresh)


def test_what_another_entry_point_returns_is_closed() -> None:
    """It may return something else the next time, though its class is Gymnasium's own."""
    for entry_point in (lambda **kwargs: gymnasiums.TaxiEnv(**kwargs), "a.users.module:make_taxi"):
        taxi = _made("Taxi-v4", {}, (500, 6))
        env = idle.take(taxi)
        idle.keep(replace(taxi, spec=replace(taxi.spec, entry_point=entry_point)), [env])
        assert not any(idle._idle.values())


@pytest.mark.parametrize("name", ["__init__", "step", "reset", "_pickup"])
def test_a_patched_taxi_neither_waits_nor_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taxi = _made("Taxi-v4", {}, (500, 6))
    env, other = taxi.make(), taxi.make()
    idle.keep(taxi, [env])
    before = getattr(gymnasiums.TaxiEnv, name)
    with monkeypatch.context() as patched:
        patched.setattr(gymnasiums.TaxiEnv, name, functools.wraps(before)(lambda *a, **k: before(*a, **k)))
        idle.keep(taxi, [other])
        assert idle.take(taxi) is not env
    with monkeypatch.context() as patched:
        patched.setattr(gymnasiums, "TaxiEnv", type("TaxiEnv", (gymnasiums.TaxiEnv,), {}))
        assert idle.take(taxi) is not env
    assert list(idle._idle.values()) == [[env]]
