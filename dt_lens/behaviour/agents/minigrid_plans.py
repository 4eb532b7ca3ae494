"""What stands where in a MiniGrid, and the shortest plans: breadth-first search over everything that actions change.

A state of the search is the agent's cell and direction, where the one movable object is (usually the key) and whether
the one door is open. All states are searched at once, backwards from the goal, as arrays: a table of the steps that are
left answers every later question about this grid, wherever the agent, the object and the door come to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Int64

from dt_lens.errors import DtLensError

__all__ = ["ACTIONS", "DONE", "MOVABLE", "ORDER", "Cell", "Plans", "Thing", "World", "is_minigrid", "shortest"]

ACTIONS = 7  # of MiniGrid; some worlds have the first three only
LEFT, RIGHT, FORWARD, PICKUP, DROP, TOGGLE, DONE = range(ACTIONS)
# Of equally short plans, the one that acts on things first, then moves, then turns: it is the easiest to imitate.
ORDER = (PICKUP, TOGGLE, DROP, FORWARD, LEFT, RIGHT)
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # by direction: right, down, left, up
OPEN, CLOSED, LOCKED = range(3)
FAR = np.iinfo(np.int32).max // 2
STILL = ("wall", "lava")  # never entered
MOVABLE = ("key", "ball", "box")

Cell = tuple[int, int]  # (x, y)


class Thing(NamedTuple):
    """A door, key, ball, box or goal.

    Attributes:
        kind: MiniGrid's name.
        colour: likewise.
        state: of a door: 0 open, 1 closed, 2 locked; of anything else 0.
        wanted: whether it is the object that is to be picked up.
    """

    kind: str
    colour: str
    state: int = OPEN
    wanted: bool = False


class World(NamedTuple):
    """A MiniGrid as it is at one moment.

    Attributes:
        ground: the cells that are not wall or lava.
        things: what stands on them; floors are left out.
        floors: the cells that have a floor of their own, on which nothing can be put down.
        at: the agent's cell.
        way: its direction, a row of ``STEPS``.
        carried: what it carries.
        ends: of the memory task: an object's cell and the cell beside it, at both ends of the hallway. The episode ends
            in either cell, with success where the object is of the kind of the one other thing.
        fixed: the kinds of things that can neither be carried nor passed here.
        name: the environment's, for messages.
    """

    ground: tuple[Cell, ...]
    things: Mapping[Cell, Thing]
    floors: frozenset[Cell]
    at: Cell
    way: int
    carried: Thing | None
    ends: tuple[tuple[Cell, Cell], ...] = ()
    fixed: tuple[str, ...] = ()
    name: str = "the grid"

    @classmethod
    def of(cls, env: Any) -> Self:
        """The world of a MiniGrid environment. The mission is not read.

        The balls of Dynamic-Obstacles are taken to stay where they are.
        """
        bare = env.unwrapped
        grid, wanted, kinds = bare.grid, getattr(bare, "obj", None), {kind.__name__ for kind in type(bare).__mro__}
        held = {(x, y): grid.get(x, y) for x in range(grid.width) for y in range(grid.height)}
        ground = tuple(at for at, thing in held.items() if thing is None or thing.type not in STILL)
        if any(thing is not None and thing.type == "goal" for thing in held.values()):
            wanted = None
        things = {
            at: _thing(held[at], wanted) for at in ground if held[at] is not None and held[at].type not in ("floor",)
        }
        ends: tuple[tuple[Cell, Cell], ...] = ()
        fixed: tuple[str, ...] = ()
        if "MemoryEnv" in kinds:
            beside = [(int(x), int(y)) for x, y in (bare.success_pos, bare.failure_pos)]
            ends = tuple(((x, v), (x, y)) for x, y in beside for v in (y - 1, y + 1) if (x, v) in things)
            fixed = MOVABLE
        elif "DynamicObstaclesEnv" in kinds:
            fixed = MOVABLE
        return cls(
            ground,
            things,
            frozenset(at for at in ground if held[at] is not None and held[at].type == "floor"),
            (int(bare.agent_pos[0]), int(bare.agent_pos[1])),
            int(bare.agent_dir),
            None if bare.carrying is None else _thing(bare.carrying, wanted),
            ends,
            fixed,
            str(getattr(bare.spec, "id", bare)),
        )

    def put(self, at: Cell, thing: Thing | None) -> Self:
        """The same world with something else, or nothing, on one cell."""
        things = {cell: other for cell, other in self.things.items() if cell != at}
        return self._replace(things=things if thing is None else {**things, at: thing})


def _thing(thing: Any, wanted: Any) -> Thing:
    state = OPEN
    if thing.type == "door":
        state = OPEN if thing.is_open else LOCKED if thing.is_locked else CLOSED
    return Thing(thing.type, thing.color, state, wanted is not None and thing is wanted)


def is_minigrid(env: Any) -> bool:
    """Whether an environment is a MiniGrid. The package is an extra, so its class is known by its name and package."""
    return any(
        (kind.__name__, kind.__module__.partition(".")[0]) == ("MiniGridEnv", "minigrid")
        for kind in type(env.unwrapped).__mro__
    )


class _Place(NamedTuple):
    """Where everything in a grid is; cells are numbers of ``cells``, or -1."""

    cells: tuple[Cell, ...]  # those that may be entered or hold something
    goals: tuple[int, ...]
    wanted: int  # the cell of the object to pick up
    item: int  # the cell of the movable object; the number of cells if it is carried
    door: int
    door_state: int
    opens: bool  # whether the movable object is the door's key
    bare: tuple[bool, ...]  # whether something may be put down on a cell


class Plans:
    """Shortest plans in grids with a goal, or with an object to pick up, behind at most one door.

    It plans for Empty, FourRooms, DoorKey, UnlockPickup, the crossings, and others like them, and for Memory and
    Dynamic-Obstacles.

    Args:
        kept: how many grids it keeps the table of.
    """

    def __init__(self, kept: int = 1) -> None:
        self._kept = kept
        self._tables: dict[_Place, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}

    def forget(self) -> None:
        self._tables.clear()

    def steps_left(self, world: World) -> int | None:
        """The steps of the shortest plan from here; ``None`` if there is none.

        Raises:
            DtLensError: for a grid with more doors or movable objects than one.
        """
        looked = self._look(world)
        return None if looked is None else looked[0]

    def best(self, world: World) -> Bool[np.ndarray, " action"] | None:
        """Which of MiniGrid's seven actions begin a shortest plan; ``None`` if there is none.

        Raises:
            DtLensError: as for ``steps_left``.
        """
        looked = self._look(world)
        if looked is None:
            return None
        left, after = looked
        return np.append(after == left - 1, False)  # doing nothing begins no shortest plan

    def _look(self, world: World) -> tuple[int, Int64[np.ndarray, " action"]] | None:
        """The steps left from here, and after each action; ``None`` if there is no plan."""
        place = _place(world)
        if place is None:
            return None
        grid = place._replace(item=min(place.item, 0), door_state=OPEN)
        if grid not in self._tables:
            if len(self._tables) >= self._kept:
                self._tables.clear()
            moves = _moves(place)
            self._tables[grid] = moves, shortest(moves)
        moves, left = self._tables[grid]
        where = (place.cells.index(world.at), world.way, place.item, place.door_state)
        here = int(np.ravel_multi_index(where, _shape(place), mode="wrap"))
        return None if left[here] >= FAR else (int(left[here]), left[moves[:, here]])


def _place(world: World) -> _Place | None:
    """What stands where in a world; ``None`` if there is nothing to reach any more.

    Raises:
        DtLensError: for a grid with more doors or movable objects than the planner knows.
    """
    things = world.things
    closed = {at for at, thing in things.items() if thing.kind in world.fixed}
    goals = {at for at, thing in things.items() if thing.kind == "goal"}
    if world.ends:
        objects = [at for at, _ in world.ends]
        first = [thing.kind for at, thing in things.items() if at not in objects and thing.kind in MOVABLE]
        for at, beside in world.ends:
            matches = at in things and things[at].kind in first
            (goals if matches else closed).add(beside)
    doors = [at for at, thing in things.items() if thing.kind == "door"]
    movable = [at for at, thing in things.items() if thing.kind in MOVABLE and at not in closed]
    aim = [at for at in movable if things[at].wanted]
    items = [at for at in movable if at not in aim]
    if not goals and not aim:
        return None
    carried = world.carried
    if len(doors) > 1 or len(items) + (carried is not None) > 1 or len(aim) > 1:
        raise DtLensError(
            f"{world.name} has {len(doors)} doors and {len(items) + (carried is not None)} objects "
            "besides the one to pick up; the planner knows grids with at most one of each."
        )
    cells = tuple(at for at in world.ground if at not in closed)
    number = {at: i for i, at in enumerate(cells)}
    item = carried if carried is not None else things[items[0]] if items else None
    door = things[doors[0]] if doors else None
    return _Place(
        cells,
        tuple(sorted(number[at] for at in goals)),
        number[aim[0]] if aim else -1,
        len(cells) if carried is not None else number[items[0]] if items else -1,
        number[doors[0]] if doors else -1,
        OPEN if door is None else door.state,
        item is not None and door is not None and item.kind == "key" and item.colour == door.colour,
        tuple((at not in things or at in items) and at not in world.floors for at in cells),
    )


def _shape(place: _Place) -> tuple[int, int, int, int]:
    """The agent's cells, its directions, the item's places (the last but one: carried; the last: none), door states."""
    n = len(place.cells)
    return n, 4, n + 2, 3


def _moves(place: _Place) -> Int64[np.ndarray, "6 state"]:
    """For each action the state that follows each state, by its number; the last number is the goal, which stays.

    That a box is lost when it is toggled is left out: ``docs/court_registered.md``, amendment 8 of claim 8's
    of 30 November 2026.
    """
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
