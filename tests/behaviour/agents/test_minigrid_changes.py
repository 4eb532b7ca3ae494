"""Where a factor matters in a MiniGrid, in worlds small enough to know it by hand, and as MiniGrid itself has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from dt_lens.behaviour.agents.minigrid_changes import FACTORS, changed, seen_cells, seen_things, where_it_matters
from dt_lens.behaviour.agents.minigrid_plans import MOVABLE, Cell, Plans, Thing, World

LEFT, RIGHT, FORWARD, PICKUP, DROP, TOGGLE = range(6)
KEY, DOOR = Thing("key", "yellow"), Thing("door", "yellow", 2)
THINGS = {
    "k": KEY, "D": DOOR, "O": DOOR._replace(state=0), "G": Thing("goal", "green"), "b": Thing("ball", "blue"),
    "B": Thing("box", "red", wanted=True),
}  # fmt: skip


def world(*rows: str, carried: Thing | None = None, fixed: tuple[str, ...] = ()) -> World:
    """A world drawn with one letter a cell: ``#`` is wall, and an arrow the agent."""
    cells = {(x, y): letter for y, row in enumerate(rows) for x, letter in enumerate(row)}
    at = next(cell for cell, letter in cells.items() if letter in ">v<^")
    ground = tuple(cell for cell, letter in cells.items() if letter != "#")
    things = {cell: THINGS[letter] for cell, letter in cells.items() if letter in THINGS}
    return World(ground, things, frozenset(), at, ">v<^".index(cells[at]), carried, fixed=fixed)


def best(of: World) -> set[int]:
    found = Plans().best(of)
    return set() if found is None else set(np.flatnonzero(found).tolist())


def matters(of: World, things: Mapping[Cell, Thing] | None = None, empty: list[Cell] | None = None) -> list[str]:
    """The factors that matter, where all things are seen and all empty cells, or those that are given."""
    things = of.things if things is None else things
    free = [cell for cell in of.ground if cell not in of.things and cell != of.at]
    plans = Plans(kept=50)
    return [name for name in FACTORS if where_it_matters(plans, of, name, things, free if empty is None else empty)]


def test_a_key_behind_and_a_locked_door_ahead() -> None:
    behind = world("#########", "#k>..D.G#", "#########")
    assert best(behind) == {LEFT, RIGHT}
    assert matters(behind) == ["object", "state", "cell"]
    # With the key alone in sight the door stays locked: a goal in the key's place is reached by the same turns.
    key = {(1, 1): KEY}
    assert matters(behind, key) == ["cell"] and matters(behind, key, empty=[]) == []
    # Open, the door is no reason to turn round; the key is no reason either.
    opened = world("#########", "#k..>.OG#", "#########")
    assert best(opened) == {FORWARD} and matters(opened, key, empty=[]) == []
    assert matters(opened, {(6, 1): THINGS["O"]}) == ["state"]  # locked, it would send the agent back


def test_a_key_on_the_way_to_its_door() -> None:
    ahead = world("#########", "#>.k.D.G#", "#########")
    assert best(ahead) == {FORWARD}
    assert matters(ahead, empty=[(4, 1)]) == []
    assert matters(ahead, empty=[(2, 1)]) == ["cell"]  # within reach it is picked up


def test_at_the_door_with_the_key() -> None:
    here = world("#####", "#>DG#", "#####", carried=KEY)
    assert best(here) == {TOGGLE}
    # A wrong key, or none, opens nothing: no plan, so that nothing can be said to be better.
    assert [best(other) for other in changed(here, "colour", {(2, 1): DOOR}, [])] == [set()] * 10
    assert matters(here) == ["object", "state"]
    assert matters(here, {}) == []


def test_colour_matters_where_a_key_could_open_a_shorter_way() -> None:
    around = ("########", "#>D....#", "#.#.##.#", "#...#G.#", "########")
    assert best(world(*around, carried=KEY)) == {TOGGLE}
    assert "colour" in matters(world(*around, carried=KEY), {})
    wrong = world(*around, carried=KEY._replace(colour="red"))
    assert best(wrong) == {RIGHT} and matters(wrong, {}) == ["object", "colour"][1:]


def test_the_colour_of_what_is_wanted_is_not_asked_for() -> None:
    room = world("#####", "#>.B#", "#...#", "#####")
    assert best(room) == {FORWARD}
    assert matters(room, empty=[(3, 2)]) == []
    assert matters(room, empty=[(1, 2)]) == ["cell"]
    near = world("####", "#>B#", "####")
    assert best(near) == {PICKUP} and matters(near, empty=[]) == ["object"]  # a goal is entered


def test_all_shortest_plans_count() -> None:
    """Where either turn is right, a world that asks for one of them is no other."""
    behind = world("#####", "#G>.#", "#...#", "#...#", "#####")
    assert best(behind) == {LEFT, RIGHT}
    assert best(behind.put((1, 1), None).put((2, 3), THINGS["G"])) == {RIGHT}
    assert matters(behind, empty=[(2, 3)]) == [] and matters(behind, empty=[(3, 1)]) == ["cell"]


def test_a_ball_that_stands_still() -> None:
    blocked = world("#####", "#>b.#", "#..G#", "#####", fixed=MOVABLE)
    assert best(blocked) == {RIGHT}
    assert matters(blocked, {(2, 1): THINGS["b"]}, empty=[]) == ["object"]  # a goal in its place, entered at once
    assert matters(blocked, {(2, 1): THINGS["b"]}, empty=[(1, 2)]) == ["object", "cell"]


def test_what_was_seen_as_it_now_is() -> None:
    now = world("#####", "#>.D#", "#####")
    door: dict[Cell, Thing | None] = {(3, 1): DOOR._replace(state=1), (1, 1): None}
    assert seen_things(now, [door]) == ({}, [])
    assert seen_things(now, [door, {(3, 1): DOOR, (2, 1): None, (9, 9): None}]) == ({(3, 1): DOOR}, [(2, 1)])


@pytest.fixture
def memory() -> Any:
    pytest.importorskip("minigrid")
    env: Any = gym.make("MiniGrid-MemoryS7-v0", disable_env_checker=True)
    env.reset(seed=3)
    env.unwrapped.agent_pos, env.unwrapped.agent_dir = np.array((1, 3)), 0
    return env


def test_memory_turns_at_the_fork_by_what_was_seen_first(memory: Any) -> None:
    bare = memory.unwrapped
    first = World.of(memory)
    assert best(first) == {FORWARD} and matters(first) == []
    while tuple(bare.agent_pos) != (5, 3):
        memory.step(FORWARD)
    fork = World.of(memory)
    up = bare.success_pos[1] < 3
    assert best(fork) == {LEFT if up else RIGHT}
    assert len(fork.things) == 3 and matters(fork) == ["object"]
    start = {cell: thing for cell, thing in fork.things.items() if cell[0] == 1}
    assert matters(fork, start) == ["object"]
    # One end's object at a time: both ends are right then, or neither.
    assert matters(fork, {cell: thing for cell, thing in fork.things.items() if cell[0] != 1}) == []
    memory.step(best(fork).pop())
    assert memory.step(FORWARD)[1] > 0


def test_what_is_seen_is_what_minigrid_shows() -> None:
    minigrid = pytest.importorskip("minigrid.wrappers")
    env: Any = gym.make("MiniGrid-DoorKey-8x8-v0", disable_env_checker=True)
    rng = np.random.default_rng(0)
    for seed in range(6):
        env.reset(seed=seed)
        for _ in range(4):
            env.step(int(rng.integers(3)))
        bare, seen = env.unwrapped, seen_cells(env)
        for x in range(8):
            for y in range(8):
                if bare.grid.get(x, y) is not None and (x, y) != tuple(bare.agent_pos):
                    assert ((x, y) in seen) == bare.agent_sees(x, y)
        narrow = seen_cells(minigrid.ViewSizeWrapper(env, agent_view_size=3))
        ahead = np.asarray(bare.agent_pos) + np.asarray(bare.dir_vec)
        assert narrow <= seen and len(narrow) <= 9 and tuple(map(int, ahead)) in narrow
        assert len(seen_cells(minigrid.FullyObsWrapper(env))) == 64
