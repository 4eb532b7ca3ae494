"""The shortest plan in a MiniGrid: breadth-first search over everything that actions change.

A state of the search is the agent's cell and direction, where the one movable object is (usually the key) and whether
the one door is open. All states are searched at once, backwards from the goal, as arrays: a table of the steps that are
left, made once for an episode, answers every later question, wherever noise takes the agent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from jaxtyping import Int64

from dt_lens.errors import DtLensError

__all__ = ["GridPlanner", "shortest"]

LEFT, RIGHT, FORWARD, PICKUP, DROP, TOGGLE, DONE = range(7)
# Of equally short plans, the one that acts on things first, then moves, then turns: it is the easiest to imitate.
ORDER = (PICKUP, TOGGLE, DROP, FORWARD, LEFT, RIGHT)
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # by direction: right, down, left, up
OPEN, CLOSED, LOCKED = range(3)
FAR = np.iinfo(np.int32).max // 2
STILL = ("wall", "lava")  # never entered
ITEMS = ("key", "ball", "box")


class _Place(NamedTuple):
    """Where everything in a grid is; cells are numbers of ``cells``, or -1."""

    cells: tuple[tuple[int, int], ...]  # those that may be entered or hold something
    goals: tuple[int, ...]
    wanted: int  # the cell of the object to pick up
    item: int  # the cell of the movable object; the number of cells if it is carried
    door: int
    door_state: int
    opens: bool  # whether the movable object is the door's key
    bare: tuple[bool, ...]  # whether something may be put down on a cell


class GridPlanner:
    """Shortest plans for grids with a goal, or with an object to pick up, behind at most one door.

    It plans for Empty, FourRooms, DoorKey, UnlockPickup, the crossings, and others like them. The mission is not read:
    the goal is a cell ``goal`` or, without one, the object ``env.unwrapped.obj``.
    """

    wait: int | None = DONE

    def __init__(self) -> None:
        self._fixed: _Place | None = None  # of the plan at hand, without what changes in an episode
        self._moves = self._left = np.zeros(0, dtype=np.int64)

    def begin(self, env: gym.Env[Any, Any]) -> None:
        self._fixed = None

    def steps_left(self, env: gym.Env[Any, Any]) -> int | None:
        """The steps of the shortest plan from here; ``None`` if there is none."""
        here = self._look(env)
        return None if here is None or self._left[here] >= FAR else int(self._left[here])

    def action(self, env: gym.Env[Any, Any]) -> int | None:
        here = self._look(env)
        if here is None or self._left[here] >= FAR:
            return None
        after, left = self._moves[:, here], self._left[here]
        return next(action for action in ORDER if self._left[after[action]] == left - 1)

    def _look(self, env: gym.Env[Any, Any]) -> int | None:
        """The number of the state that the environment is in, with the plan at hand that has it."""
        bare: Any = env.unwrapped
        place = _read(bare)
        if place is None:
            return None
        fixed = place._replace(item=min(place.item, 0), door_state=OPEN)
        if fixed != self._fixed:
            self._moves = _moves(place)
            self._left, self._fixed = shortest(self._moves), fixed
        cell = place.cells.index((int(bare.agent_pos[0]), int(bare.agent_pos[1])))
        here = (cell, bare.agent_dir, place.item, place.door_state)
        return int(np.ravel_multi_index(here, _shape(place), mode="wrap"))

    def scatter(self, env: gym.Env[Any, Any], rng: np.random.Generator) -> Any:
        raise DtLensError("MiniGrid's episodes start where the environment starts them; record with scattered=0.")


def _read(bare: Any) -> _Place | None:
    """What stands where in a grid; ``None`` if there is nothing to reach any more.

    Raises:
        DtLensError: for a grid with more doors or movable objects than the planner knows.
    """
    grid, carried, wanted = bare.grid, bare.carrying, getattr(bare, "obj", None)
    things = {(x, y): grid.get(x, y) for x in range(grid.width) for y in range(grid.height)}
    cells = tuple(at for at, thing in things.items() if thing is None or thing.type not in STILL)
    number = {at: i for i, at in enumerate(cells)}
    goals = tuple(number[at] for at, thing in things.items() if thing is not None and thing.type == "goal")
    doors = [at for at, thing in things.items() if thing is not None and thing.type == "door"]
    items = [at for at, thing in things.items() if thing is not None and thing.type in ITEMS]
    aim = [at for at in items if not goals and things[at] is wanted]
    items = [at for at in items if at not in aim]
    if len(doors) > 1 or len(items) + (carried is not None) > 1:
        raise DtLensError(
            f"{getattr(bare.spec, 'id', bare)} has {len(doors)} doors and {len(items) + (carried is not None)} objects "
            "besides the one to pick up; the planner knows grids with at most one of each."
        )
    if not goals and not aim:
        return None
    item = carried if carried is not None else things[items[0]] if items else None
    door = things[doors[0]] if doors else None
    state = OPEN if door is None or door.is_open else LOCKED if door.is_locked else CLOSED
    return _Place(
        cells,
        goals,
        number[aim[0]] if aim else -1,
        len(cells) if carried is not None else number[items[0]] if items else -1,
        number[doors[0]] if doors else -1,
        state,
        item is not None and door is not None and item.type == "key" and item.color == door.color,
        tuple(things[at] is None or at in items for at in cells),
    )


def _shape(place: _Place) -> tuple[int, int, int, int]:
    """The agent's cells, its directions, the item's places (the last but one: carried; the last: none), door states."""
    n = len(place.cells)
    return n, 4, n + 2, 3


def _moves(place: _Place) -> Int64[np.ndarray, "6 state"]:
    """For each action the state that follows each state, by its number; the last number is the goal, which stays."""
    shape, n = _shape(place), len(place.cells)
    number, end = {at: i for i, at in enumerate(place.cells)}, int(np.prod(shape))
    front = np.array([[number.get((x + dx, y + dy), -1) for dx, dy in STEPS] for x, y in place.cells])
    cell, way, item, door = np.indices(shape)
    ahead, carried = front[cell, way], item == n
    at_door, at_item = (ahead == place.door) & (ahead >= 0), ahead == item
    at_wanted = (ahead == place.wanted) & (ahead >= 0)

    def follows(condition: Any, c: Any = cell, w: Any = way, i: Any = item, d: Any = door) -> Any:
        return np.where(condition, np.ravel_multi_index((c, w, i, d), shape), np.arange(end).reshape(shape))

    entered = np.maximum(ahead, 0)
    enters = (ahead >= 0) & ~at_item & ~at_wanted & ~(at_door & (door != OPEN))
    free = (ahead >= 0) & np.array(place.bare)[entered]
    turned = np.select([door == CLOSED, door == OPEN, carried & place.opens], [OPEN, CLOSED, OPEN], default=LOCKED)
    moves = np.stack(
        [
            follows(True, w=(way - 1) % 4),
            follows(True, w=(way + 1) % 4),
            np.where(enters & np.isin(ahead, place.goals), end, follows(enters, c=entered)),
            np.where(at_wanted & ~carried, end, follows(at_item, i=n)),
            follows(carried & free, i=entered),
            follows(at_door, d=turned),
        ]
    )
    found: np.ndarray[Any, Any] = np.append(moves.reshape(len(moves), end), np.full((len(moves), 1), end), axis=1)
    return found


def shortest(moves: Int64[np.ndarray, "action state"]) -> Int64[np.ndarray, " state"]:
    """The fewest steps from every state to the goal, which is the last one; ``FAR`` where there is no way.

    Args:
        moves: for each action, the number of the state that follows each state.
    """
    left = np.full(moves.shape[1], FAR)
    left[-1] = 0
    while True:
        closer = np.minimum(left, left[moves].min(0) + 1)
        if np.array_equal(closer, left):
            return np.asarray(closer)
        left = closer
