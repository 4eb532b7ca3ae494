"""Where a factor of what an agent sees matters in a MiniGrid: one thing is changed, and a planner is asked again.

The rules are those of ``docs/court_registered.md`` (claim 8 where states cannot be listed).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from dt_lens.behaviour.agents.environment import Environment
from dt_lens.behaviour.agents.minigrid_plans import MOVABLE, Cell, Plans, Thing, World
from dt_lens.errors import DtLensError

__all__ = ["FACTORS", "changed", "matters_in_windows", "seen_cells", "seen_things", "where_it_matters"]

FACTORS = ("object", "colour", "state", "cell")
COLOURS = ("red", "green", "blue", "purple", "yellow", "grey")
TABLES = 200  # of changed grids, kept for an episode
View = Mapping[Cell, Thing | None]  # what was seen on each cell


def seen_cells(env: Any) -> set[Cell]:
    """The cells of a MiniGrid that the agent sees now."""
    bare = env.unwrapped
    wrappers = env
    while wrappers is not bare:
        if type(wrappers).__name__ == "FullyObsWrapper":
            return {(x, y) for x in range(bare.width) for y in range(bare.height)}
        wrappers = wrappers.env
    size = int(env.get_wrapper_attr("agent_view_size"))  # a wrapper may have another than the environment
    visible = bare.gen_obs_grid(size)[1]
    ahead, right, at = np.asarray(bare.dir_vec), np.asarray(bare.right_vec), np.asarray(bare.agent_pos)
    found = set()
    for x, y in zip(*np.nonzero(visible), strict=True):
        # The agent stands in the middle of the view's last row and looks towards smaller y.
        there = at + (size - 1 - y) * ahead + (x - size // 2) * right
        found.add((int(there[0]), int(there[1])))
    return found


def seen_things(world: World, views: Sequence[View]) -> tuple[dict[Cell, Thing], list[Cell]]:
    """The things that were seen as they now are, and the empty cells that were seen.

    Args:
        world: as it now is.
        views: what was seen at each step of a window.
    """
    cells = {cell for view in views for cell in view}
    things = {cell: thing for cell, thing in world.things.items() if any(view.get(cell) == thing for view in views)}
    ground = set(world.ground)
    empty = sorted(
        cell
        for cell in cells
        if cell in ground and cell not in world.things and cell not in world.floors and cell != world.at
    )
    return things, empty


def changed(world: World, factor: str, things: Mapping[Cell, Thing], empty: Collection[Cell]) -> Iterator[World]:
    """Every world in which one factor of one thing is another.

    Args:
        world: as it is.
        factor: ``"object"``, ``"colour"``, ``"state"`` or ``"cell"``.
        things: those that may change; what the agent carries may change too.
        empty: the cells to which a thing may be moved.
    """
    for cell, thing in things.items():
        if factor == "cell":
            if thing.kind != "door" and not world.ends:
                without = world.put(cell, None)
                yield from (without.put(other, thing) for other in empty)
            continue
        for other in _others(thing, factor, goals=not world.ends):
            yield world.put(cell, other)
    if world.carried is not None and factor != "cell":
        for other in _others(world.carried, factor, goals=False):
            yield world._replace(carried=other)


def _others(thing: Thing, factor: str, goals: bool) -> Iterator[Thing | None]:
    """What may stand in a thing's place if one factor of it is another; ``None`` for nothing."""
    if factor == "object":
        yield None
        if goals and thing.kind != "goal":
            yield Thing("goal", thing.colour)
        if thing.kind in MOVABLE:
            yield from (Thing(kind, thing.colour) for kind in MOVABLE if kind != thing.kind)
    elif factor == "colour":
        yield from (thing._replace(colour=colour) for colour in COLOURS if colour != thing.colour)
    elif factor == "state" and thing.kind == "door":
        yield from (thing._replace(state=state) for state in range(3) if state != thing.state)


def where_it_matters(
    plans: Plans, world: World, factor: str, things: Mapping[Cell, Thing], empty: Collection[Cell]
) -> bool:
    """Whether some change of a factor makes a world such that no action is optimal in both.

    In a world without a plan every action is as good as any other, so that it never makes a difference.
    """
    best = plans.best(world)
    if best is None:
        return False
    others = (plans.best(other) for other in changed(world, factor, things, empty))
    return any(other is not None and not (best & other).any() for other in others)


def matters_in_windows(
    made: Environment,
    factors: Collection[str],
    played: Mapping[int, tuple[Sequence[int], Sequence[np.ndarray[Any, Any]]]],
    windows: Sequence[tuple[int, int]],
    context: int,
    tell: Callable[[float], None],
) -> dict[str, Bool[np.ndarray, " n"]]:
    """In which windows each factor matters; the episodes are replayed for it.

    Args:
        made: the environment, a MiniGrid.
        factors: names of factors; those that have no meaning here are left out.
        played: for the seed of each episode its actions, and the state of each step, as numbers that are not scaled.
        windows: the seed and the step at which each window ends.
        context: the steps of a window.
        tell: receives the share done.

    Raises:
        DtLensError: if no planner knows the environment, or it does not repeat its episodes.
    """
    names = [name for name in FACTORS if name in factors]
    if not names:
        raise DtLensError(
            f"Factors of a MiniGrid's states are {', '.join(FACTORS)}, and the model's are {', '.join(factors)}."
        )
    found = {name: np.zeros(len(windows), dtype=bool) for name in names}
    ends: dict[int, dict[int, int]] = {}
    for number, (seed, step) in enumerate(windows):
        ends.setdefault(seed, {})[step] = number
    env, plans = made.make(), Plans(kept=TABLES)
    try:
        for done, (seed, wanted) in enumerate(sorted(ends.items())):
            plans.forget()
            for step, (world, views) in enumerate(_replayed(env, made, seed, *played[seed], context)):
                if step == 0 and plans.best(world) is None:
                    _require_task(world)
                if step in wanted:
                    things, empty = seen_things(world, views)
                    for name in names:
                        found[name][wanted[step]] = where_it_matters(plans, world, name, things, empty)
                if step >= max(wanted):
                    break
            tell((1 + done) / len(ends))
    finally:
        env.close()
    return found


def _replayed(
    env: Any,
    made: Environment,
    seed: int,
    actions: Sequence[int],
    states: Sequence[np.ndarray[Any, Any]],
    context: int,
) -> Iterator[tuple[World, list[View]]]:
    """The world at each step of an episode, and what was seen in the steps of the window that ends there."""
    views: list[View] = []
    observation, _ = env.reset(seed=seed)
    for step, state in enumerate(states):
        if not np.allclose(made.state(observation), state, atol=1e-3):
            raise DtLensError(
                f"{made.environment} does not repeat the episode of seed {seed}: step {step} shows another state; its "
                "reset must draw everything from the seed."
            )
        world = World.of(env)
        views = [*views, {cell: world.things.get(cell) for cell in seen_cells(env)}][-context:]
        yield world, views
        if step + 1 < len(states):
            observation = env.step(actions[step])[0]


def _require_task(world: World) -> None:
    """Raise ``DtLensError`` if the planner sees nothing to reach in a world where an episode begins."""
    wanted = [thing for thing in world.things.values() if thing.wanted or thing.kind == "goal"]
    if not wanted and not world.ends:
        raise DtLensError(
            f"No planner knows what success is in {world.name}: planners know MiniGrids with a goal to reach or an "
            "object to pick up (env.unwrapped.obj), Memory and Dynamic-Obstacles."
        )
