"""Names for the coordinates of states and actions, taken from the environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dt_lens.decision_transformer.environment_factors import described_states
from dt_lens.decision_transformer.environment_wrappers import specify
from dt_lens.errors import DtLensError
from dt_lens.lens.environment_names import specification

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec

__all__ = ["environment_labels", "environment_parts"]

Labels = tuple[str, ...]


def environment_labels(
    environment: str,
    kwargs: Mapping[str, Any] | None = None,
    ignores: Sequence[str] | None = None,
    texts: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Labels | None, Labels | None]:
    """The labels of an environment's observations and actions; ``None`` for what it does not name.

    The name is only looked up: no module of a ``"module:Id"`` is imported.

    ``ignores`` and ``texts`` are as in ``RunFacts``: they decide which numbers a state has.

    MuJoCo environments name joints and actuators, Gymnasium's Atari environments name their actions, the actions of its
    toy-text environments have the names of its documentation, MiniGrid and others have an ``actions`` enumeration.
    States of Taxi, FrozenLake, CliffWalking and MiniGrid are named by what they consist of (``environment_factors``).
    Parts of a ``Dict`` or ``Tuple`` have their own names, such as ``"direction = 2"``. An environment that cannot be
    made here has no labels.
    """
    try:
        spec, own = specify(specification(environment), kwargs or {})
    except DtLensError:
        return None, None  # not kept: the user may import what registers it
    # Making an environment takes a while, so results are kept; arguments may be lists, so the key is their text.
    key = f"{environment} {sorted((kwargs or {}).items())!r} {ignores!r} {texts!r}"
    if key not in _KNOWN:
        _KNOWN[key] = _labels(spec, own, ignores, texts)
    return _KNOWN[key]


_KNOWN: dict[str, tuple[Labels | None, Labels | None]] = {}


def environment_parts(environment: str, kwargs: Mapping[str, Any]) -> list[str]:
    """The names of the parts of an environment's observations; none where it cannot be made here."""
    import gymnasium as gym

    from dt_lens.decision_transformer.state_vector import part_names

    try:
        spec, own = specify(specification(environment), kwargs)
        env: gym.Env[Any, Any] = gym.make(spec, disable_env_checker=True, **own)
    except (Exception, SystemExit):
        return []
    try:
        return part_names(env.observation_space)
    finally:
        env.close()


def _labels(
    spec: EnvSpec,
    kwargs: Mapping[str, Any],
    ignores: Sequence[str] | None,
    texts: Mapping[str, Sequence[str]] | None,
) -> tuple[Labels | None, Labels | None]:
    import gymnasium as gym

    try:
        env = gym.make(spec, disable_env_checker=True, **kwargs)
    except (Exception, SystemExit):
        # Labels are optional: the rollout that needs the environment reports why it cannot be made.
        return None, None
    try:
        named = _mujoco_observations(env) or _box_observations(env) or _described(env, ignores, texts)
        return named or _parts(env, ignores, texts), _actions(env)
    finally:
        env.close()


def _mujoco_observations(env: Any) -> Labels | None:
    bare = env.unwrapped
    model = getattr(bare, "model", None)
    structure = getattr(bare, "observation_structure", None)
    if model is None or structure is None or not hasattr(model, "joint"):
        return None
    positions, velocities = _joint_coordinates(model)
    skipped = int(structure.get("skipped_qpos", 0))
    labels: list[str] = []
    for part, size in structure.items():
        if part == "skipped_qpos":
            continue
        if part == "qpos":
            named = [f"{joint} position" for joint in positions[skipped:]]
        elif part == "qvel":
            named = [f"{joint} velocity" for joint in velocities]
        else:
            named = [f"{part} {i}" for i in range(int(size))]
        if len(named) != int(size):
            return None
        labels += named
    return tuple(labels) if env.observation_space.shape == (len(labels),) else None


def _joint_coordinates(model: Any) -> tuple[list[str], list[str]]:
    """The names of the entries of qpos and qvel; free and ball joints have several."""
    parts = {
        0: (("x", "y", "z", "qw", "qx", "qy", "qz"), ("x", "y", "z", "rx", "ry", "rz")),
        1: (("qw", "qx", "qy", "qz"), ("rx", "ry", "rz")),
    }
    positions, velocities = [], []
    for i in range(model.njnt):
        name = model.joint(i).name or f"joint{i}"
        qpos, qvel = parts.get(int(model.jnt_type[i]), (("",), ("",)))
        positions += [f"{name} {axis}".strip() for axis in qpos]
        velocities += [f"{name} {axis}".strip() for axis in qvel]
    return positions, velocities


def _box_observations(env: Any) -> Labels | None:
    classic = {
        "CartPole": ("cart position", "cart velocity", "pole angle", "pole angular velocity"),
        "Pendulum": ("cos(angle)", "sin(angle)", "angular velocity"),
        "MountainCar": ("position", "velocity"),
    }
    shape = env.observation_space.shape
    for name, labels in classic.items():
        if env.spec is not None and env.spec.id.startswith(name) and shape == (len(labels),):
            return labels
    return None


def _described(env: Any, ignores: Sequence[str] | None, texts: Mapping[str, Sequence[str]] | None) -> Labels | None:
    found = described_states(env, ignores, texts)
    return None if found is None else found[0]


# Blackjack's observation is a Tuple of three whole numbers.
TUPLES = {"Blackjack": ("your sum", "dealer's card", "usable ace")}


# Where the class does not name its actions.
ACTIONS = {
    "Blackjack": ["stick", "hit"],
    "CartPole": ["push left", "push right"],
    "CliffWalking": ["up", "right", "down", "left"],
    "FrozenLake": ["left", "down", "right", "up"],
    "Taxi": ["south", "north", "east", "west", "pickup", "dropoff"],
}


def _parts(env: Any, ignores: Sequence[str] | None, texts: Mapping[str, Sequence[str]] | None) -> Labels | None:
    """The names of the parts of an observation that has some."""
    from dt_lens.decision_transformer.state_vector import StateVector

    try:
        labels = StateVector.of(env.observation_space, ignores, texts).labels
    except DtLensError:  # a text that the facts do not declare: running the agent says so
        return None
    if labels is None:
        return None
    for start, names in TUPLES.items():
        if env.spec is not None and env.spec.id.startswith(start):
            swaps = [(f"observation {place} =", name) for place, name in enumerate(names)]
            labels = tuple(_renamed(label, swaps) for label in labels)
    return labels


def _renamed(label: str, swaps: list[tuple[str, str]]) -> str:
    return next((name + label.removeprefix(old) for old, name in swaps if label.startswith(old)), label)


def _actions(env: Any) -> Labels | None:
    import gymnasium as gym

    bare = env.unwrapped
    space = env.action_space
    if isinstance(space, gym.spaces.Discrete):
        names: list[str] = []
        if hasattr(bare, "get_action_meanings"):
            names = [str(name).lower() for name in bare.get_action_meanings()]
        elif hasattr(bare, "actions") and hasattr(bare.actions, "__members__"):
            names = list(bare.actions.__members__)
        elif env.spec is not None:
            names = next((known for start, known in ACTIONS.items() if env.spec.id.startswith(start)), [])
        return tuple(names[: int(space.n)]) if len(names) >= int(space.n) else None
    if isinstance(space, gym.spaces.MultiDiscrete):  # several choices at once
        from dt_lens.decision_transformer.state_vector import StateVector

        return tuple(label.replace("observation", "action", 1) for label in StateVector.of(space).labels or ())
    model = getattr(bare, "model", None)
    if model is not None and hasattr(model, "actuator") and space.shape == (model.nu,):
        return tuple(_actuator(model, i) for i in range(model.nu))
    return None


def _actuator(model: Any, i: int) -> str:
    # Gymnasium's models do not name their actuators; the joint that one drives says what it is.
    named = model.actuator(i).name
    return named or f"{model.joint(int(model.actuator_trnid[i, 0])).name} torque"
