"""Tables of dynamics: read as Gymnasium steps them, and value iteration against an independent solution."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from dt_lens.behaviour.agents.tabular import Tabular
from dt_lens.errors import DtLensError


def taxi_id() -> str:
    return max(name for name in gym.registry if name.startswith("Taxi-v"))


@pytest.fixture(scope="module")
def taxi() -> Tabular:
    found = Tabular.of(gym.make(taxi_id()))
    assert found is not None
    return found


def test_the_table_is_what_the_environment_does() -> None:
    env = gym.make("FrozenLake-v1", is_slippery=False)
    table = Tabular.of(env)
    assert table is not None and table.initial[0] == 1
    rng = np.random.default_rng(0)
    for seed in range(20):
        state, _ = env.reset(seed=seed)
        ended = False
        while not ended:
            action = int(rng.integers(4))
            following, reward, ended, _, _ = env.step(action)
            (outcome,) = np.flatnonzero(table.probability[state, action])
            assert (
                table.following[state, action, outcome] == following and table.reward[state, action, outcome] == reward
            )
            assert table.ends[state, action, outcome] == ended
            state = following


def test_values_solve_bellmans_equation_of_the_best_policy() -> None:
    """Howard's policy iteration, each policy evaluated by a linear system, comes to the same values."""
    table = Tabular.of(gym.make("FrozenLake-v1", is_slippery=True))
    assert table is not None
    n, m = table.reward.shape[:2]
    moves = np.zeros((n, m, n))
    for s in range(n):
        for a in range(m):
            np.add.at(moves[s, a], table.following[s, a], table.probability[s, a] * ~table.ends[s, a])
    pay = (table.probability * table.reward).sum(2)
    policy = np.zeros(n, int)
    while True:
        rows = np.arange(n)
        values = np.linalg.solve(np.eye(n) - 0.99 * moves[rows, policy], pay[rows, policy])
        q = pay + 0.99 * moves @ values
        better = np.where(q.max(1) > q[rows, policy] + 1e-12, q.argmax(1), policy)
        if (better == policy).all():
            break
        policy = better
    np.testing.assert_allclose(table.action_values(), q, atol=1e-8)


def test_taxis_best_actions(taxi: Tabular) -> None:
    def state(row: int, column: int, passenger: int, destination: int) -> int:
        return ((row * 5 + column) * 5 + passenger) * 4 + destination

    best, reach = taxi.optimal_actions(), taxi.reachable
    assert list(np.flatnonzero(best[state(0, 0, 0, 1)])) == [4]  # at the passenger: pick up
    assert list(np.flatnonzero(best[state(0, 4, 4, 1)])) == [5]  # with the passenger at the destination: drop off
    # Without walls between, either way round is as short: several actions are optimal.
    assert best[state(2, 2, 4, 1)].sum() >= 2
    assert reach.sum() == 400 and not reach[state(3, 3, 1, 1)]  # a passenger who is there already is never met
    assert reach[state(3, 3, 4, 1)]
    assert taxi.action_values().max() == 20


def test_optimal_play_earns_the_known_mean(taxi: Tabular) -> None:
    """About 7.9: the known mean of optimal play, over all first states."""
    values = Tabular.action_values(taxi, 0.9999999)
    assert values.max(1) @ taxi.initial == pytest.approx(7.93, abs=0.02)


def test_no_table_and_a_table_that_is_none() -> None:
    assert Tabular.of(gym.make("CartPole-v1")) is None
    env: Any = gym.make("FrozenLake-v1")
    env.unwrapped.P = {0: {0: [(1.0, 0, 0.0, False)]}}
    with pytest.raises(DtLensError, match=r"dynamics of FrozenLakeEnv .* for each of its 16 states and 4 actions"):
        Tabular.of(env)
