"""What the states of discrete worlds consist of, such as a row and a column: the factors of their labels.

Taxi's own ``decode`` gives row, column, passenger and destination of a state; FrozenLake's and CliffWalking's states
are the cells of a grid. A MiniGrid view has a number for each object, colour and state of a door in each of its cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dt_lens.decision_transformer.environment_wrappers import specify
from dt_lens.errors import DtLensError
from dt_lens.lens.environment_names import specification

__all__ = ["described_states", "environment_factors"]

Labels = tuple[str, ...]
Levels = tuple[str | int | None, ...]
PACKAGES = ("gymnasium.envs.toy_text.", "minigrid.")
FACING = ("right", "down", "left", "up")  # MiniGrid's directions


def environment_factors(
    environment: str,
    kwargs: Mapping[str, Any] | None = None,
    ignores: Sequence[str] | None = None,
    texts: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Levels] | None:
    """By factor, the level of each of the ``state_dim`` numbers of a state; ``None`` where the states have no factors.

    Arguments as for ``environment_labels``. The name is only looked up, and an environment that cannot be made here has
    no factors.
    """
    import gymnasium as gym

    try:
        spec, own = specify(specification(environment), kwargs or {})
        env: gym.Env[Any, Any] = gym.make(spec, disable_env_checker=True, **own)
    except (Exception, SystemExit):
        return None
    try:
        found = described_states(env, ignores, texts)
        return None if found is None else found[1] or None
    finally:
        env.close()


def described_states(
    env: Any, ignores: Sequence[str] | None = None, texts: Mapping[str, Sequence[str]] | None = None
) -> tuple[Labels, dict[str, Levels]] | None:
    """The label of each number of a state, and its level of each factor; ``None`` for other environments."""
    from gymnasium.spaces import Discrete

    bare = env.unwrapped
    # A class of the user's own may have the name of one of these.
    kinds = {kind.__name__ for kind in type(bare).__mro__ if f"{kind.__module__}.".startswith(PACKAGES)}
    if "MiniGridEnv" in kinds:
        return _view(env, ignores, texts)
    if env.observation_space != bare.observation_space or not isinstance(env.observation_space, Discrete):
        return None  # a wrapper, or a class that is derived from one of these, changes what the states are
    if "TaxiEnv" in kinds:
        return _taxi(bare)
    if "FrozenLakeEnv" in kinds:
        tiles = {b"S": "start", b"F": "frozen", b"H": "hole", b"G": "goal"}
        described = _grid(int(bare.nrow), int(bare.ncol))
        described[1]["tile"] = tuple(tiles.get(bytes(tile)) for tile in np.ravel(bare.desc))
        return described
    if "CliffWalkingEnv" in kinds:
        return _grid(*map(int, bare.shape))
    return None


def _taxi(bare: Any) -> tuple[Labels, dict[str, Levels]]:
    states = [tuple(map(int, bare.decode(state))) for state in range(int(bare.observation_space.n))]
    # The map has a letter where a passenger may wait or want to go.
    stands = [bytes(bare.desc[1 + row, 1 + 2 * column]).decode() for row, column in bare.locs]
    places = (*stands, "in taxi")
    rows, columns, passengers, destinations = zip(*states, strict=True)
    factors: dict[str, Levels] = {
        "row": rows,
        "column": columns,
        "passenger": tuple(places[i] for i in passengers),
        "destination": tuple(stands[i] for i in destinations),
    }
    return _joined(factors), factors


def _grid(rows: int, columns: int) -> tuple[Labels, dict[str, Levels]]:
    at = [divmod(state, columns) for state in range(rows * columns)]
    factors: dict[str, Levels] = {"row": tuple(row for row, _ in at), "column": tuple(column for _, column in at)}
    return _joined(factors), factors


def _joined(factors: Mapping[str, Levels]) -> Labels:
    levels = zip(*factors.values(), strict=True)
    return tuple(", ".join(f"{name} {level}" for name, level in zip(factors, row, strict=True)) for row in levels)


def _view(
    env: Any, ignores: Sequence[str] | None, texts: Mapping[str, Sequence[str]] | None
) -> tuple[Labels, dict[str, Levels]] | None:
    """A MiniGrid view as numbers: MiniGrid's own three a cell (object, colour, state), or one-hot."""
    from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX

    from dt_lens.decision_transformer.state_vector import StateVector

    if any(type(wrapper).__name__.startswith(("RGBImg", "Symbolic")) for wrapper in _wrappers(env)):
        return None  # pixels, or another code
    try:
        parts = StateVector.of(env.observation_space, ignores, texts).parts
    except DtLensError:  # a text that the facts do not declare: running the agent says so
        return None
    channels = [
        (kind, name)
        for kind, names in (("object", OBJECT_TO_IDX), ("colour", COLOR_TO_IDX), ("state", STATE_TO_IDX))
        for name in sorted(names, key=names.__getitem__)
    ]
    labels: list[str] = []
    rows: list[dict[str, str]] = []
    for part in parts:
        shape: tuple[int, ...] = getattr(part.space, "shape", None) or ()
        if part.name.rpartition(".")[2] in ("", "image") and len(shape) == 3 and shape[2] in (3, len(channels)):
            for x, y, channel in np.ndindex(shape):
                kind, name = channels[channel] if shape[2] > 3 else ("", ("object", "colour", "state")[channel])
                labels.append(f"{name} at cell ({x}, {y})")
                rows.append({kind: name, "cell": f"({x}, {y})"} if kind else {})
        else:
            named = [f"facing {name}" for name in FACING] if (part.name, part.size) == ("direction", 4) else part.labels
            labels += named
            rows += [{}] * part.size
    if not any("cell" in label for label in labels):
        return None  # flattened by a wrapper, in an order of its own
    levels: dict[str, Levels] = {
        factor: tuple(row.get(factor) for row in rows) for factor in ("object", "colour", "state", "cell")
    }
    return tuple(labels), levels if any(rows) else {}


def _wrappers(env: Any) -> Iterator[Any]:
    while env is not env.unwrapped:
        yield env
        env = env.env
