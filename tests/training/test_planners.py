"""Planners are optimal, by the environments' own steps and breadth-first search."""

from __future__ import annotations

from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from dt_lens.behaviour.agents.minigrid_plans import Plans, World
from dt_lens.errors import DtLensError
from dt_lens.training.minigrid_planner import GridPlanner
from dt_lens.training.planners import planner_for


def fewest_steps_in_taxi(env: Any, start: int) -> int:
    """The steps to a delivery, by breadth-first search over the environment's own steps without a penalty."""
    seen, todo = {start}, deque([(start, 0)])
    while todo:
        state, steps = todo.popleft()
        for action in range(6):
            env.s = state
            after, reward, ended, _, _ = env.step(action)
            if ended:
                return steps + 1
            if reward == -1 and after not in seen:
                seen.add(after)
                todo.append((after, steps + 1))
    raise AssertionError("no way")


def test_taxis_planner_delivers_in_the_fewest_steps_from_anywhere() -> None:
    env: Any = gym.make("Taxi-v4", disable_env_checker=True)
    planner = planner_for(env)
    assert planner is not None and planner.wait is None
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    starts = {planner.scatter(env, rng) for _ in range(40)}
    assert len(starts) > 30 and env.unwrapped.s in starts
    # Where a passenger waits at his destination, or has arrived, no episode can go on.
    passengers, destinations = zip(*(env.unwrapped.decode(state)[2:] for state in starts), strict=True)
    assert 4 in passengers and all(p != d for p, d in zip(passengers, destinations, strict=True))
    for start in starts:
        least = fewest_steps_in_taxi(env.unwrapped, start)
        env.reset(seed=0)
        env.unwrapped.s = start
        total, ended, steps = 0.0, False, 0
        while not ended:
            _, reward, ended, _, _ = env.step(planner.action(env))
            total, steps = total + float(reward), steps + 1
        assert steps == least and total == 21 - least


def test_slippery_lakes_planner_succeeds_as_often_as_can_be() -> None:
    from dt_lens.behaviour.agents.tabular import Tabular

    env: Any = gym.make("FrozenLake-v1", disable_env_checker=True)
    planner, table = planner_for(env), Tabular.of(env)
    assert planner is not None and table is not None
    policy = []
    for state in range(16):
        env.unwrapped.s = state
        policy.append(planner.action(env))
    at = np.arange(16)
    p, after, ends = (x[at, policy] for x in (table.probability, table.following, table.ends))
    moves = np.zeros((16, 16))
    np.add.at(moves, (at[:, None], after), p * ~ends)
    wins = np.linalg.solve(np.eye(16) - moves, (p * table.reward[at, policy]).sum(1))
    assert wins[0] == pytest.approx(14 / 17, abs=1e-9)  # without a time limit


class Restorable:
    """A MiniGrid that can be put back into an earlier state, to search by its own steps."""

    def __init__(self, env: Any) -> None:
        self.env = env.unwrapped
        self.env.gen_obs = lambda: None  # nothing here looks
        self.door = next((thing for thing in self.env.grid.grid if thing is not None and thing.type == "door"), None)

    def save(self) -> Any:
        env, door = self.env, self.door
        flags = None if door is None else (door.is_open, door.is_locked)
        return tuple(map(int, env.agent_pos)), int(env.agent_dir), env.carrying, tuple(env.grid.grid), flags

    def put(self, saved: Any) -> None:
        env = self.env
        env.agent_pos, env.agent_dir, env.carrying = saved[:3]
        env.grid.grid, env.step_count = list(saved[3]), 0
        if self.door is not None:
            self.door.is_open, self.door.is_locked = saved[4]

    def fewest_steps(self) -> int:
        first = self.save()
        seen, todo = {first}, deque([(first, 0)])
        while todo:
            state, steps = todo.popleft()
            for action in range(6):
                self.put(state)
                _, reward, ended, _, _ = self.env.step(action)
                if ended and reward > 0:
                    self.put(first)
                    return steps + 1
                after = self.save()
                if not ended and after not in seen:
                    seen.add(after)
                    todo.append((after, steps + 1))
        raise AssertionError("no way")


@pytest.mark.parametrize(
    ("name", "seed"),
    [("DoorKey-5x5", 0), ("DoorKey-6x6", 1), ("UnlockPickup", 4), ("Empty-6x6", 0), ("LavaGapS6", 3)],
)
def test_the_plan_in_a_minigrid_is_the_shortest(name: str, seed: int) -> None:
    pytest.importorskip("minigrid")
    env: Any = gym.make(f"MiniGrid-{name}-v0", disable_env_checker=True)
    env.reset(seed=seed)
    planner, world = planner_for(env), Restorable(env)
    assert isinstance(planner, GridPlanner)
    planner.begin(env)
    rng = np.random.default_rng(seed)
    for disturbed in (0, 9):
        for _ in range(disturbed):  # also from wherever noise leads
            before = world.save()
            if env.unwrapped.step(int(rng.choice([0, 1, 2, 3, 4])))[2]:
                world.put(before)
        least = world.fewest_steps()
        start = world.save()
        for step in range(least):
            # Planning anew at each step would hide a wrong idea of what actions do, but for the number.
            assert planner.steps_left(env) == least - step
            action = planner.action(env)
            assert action is not None
            _, reward, ended, _, _ = env.unwrapped.step(action)
            assert ended == (step == least - 1)
        assert reward > 0
        world.put(start)


def test_the_best_actions_are_the_first_of_all_shortest_plans() -> None:
    """By MiniGrid's own steps: an action is one of the best if one step fewer is left after it."""
    pytest.importorskip("minigrid")
    env: Any = gym.make("MiniGrid-DoorKey-5x5-v0", disable_env_checker=True)
    plans, several = Plans(), 0
    for seed in range(20):  # one that begins with a choice
        env.reset(seed=seed)
        first = plans.best(World.of(env))
        if first is not None and first.sum() > 1:
            break
    world = Restorable(env)
    while (best := plans.best(World.of(env))) is not None:
        start, least = world.save(), world.fewest_steps()
        for action in range(7):
            world.put(start)
            done = env.unwrapped.step(action)[2]
            assert best[action] == ((0 if done else world.fewest_steps()) == least - 1)
        world.put(start)
        several += best.sum() > 1
        if env.unwrapped.step(int(best.argmax()))[2]:
            break
    assert several  # of equally good actions all are named


def test_a_lost_box_has_no_plan_and_two_balls_are_refused() -> None:
    pytest.importorskip("minigrid")
    from minigrid.core.world_object import Ball

    env: Any = gym.make("MiniGrid-UnlockPickup-v0", disable_env_checker=True)
    env.reset(seed=0)
    planner, bare = planner_for(env), env.unwrapped
    assert planner is not None and planner.action(env) is not None
    at = next(i for i, thing in enumerate(bare.grid.grid) if thing is bare.obj)
    box, bare.grid.grid[at] = bare.grid.grid[at], None  # as the agent does when it toggles it
    assert planner.action(env) is None
    bare.grid.grid[at] = box
    bare.place_obj(Ball())
    with pytest.raises(DtLensError, match="1 doors and 2 objects besides the one to pick up; the planner knows"):
        planner.action(env)


def test_other_environments_have_no_planner() -> None:
    assert planner_for(gym.make("CartPole-v1")) is None
