"""A Gymnasium environment for a decision transformer: made by id, checked against the model, scored."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeGuard

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from dt_lens.arguments import require_offers
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.environment_wrappers import specify
from dt_lens.decision_transformer.state_vector import StateVector
from dt_lens.errors import DtLensError, a_type, as_written, because
from dt_lens.lens.environment_names import specification

__all__ = ["Environment", "Named", "ScoreReference", "make_environment", "score_reference", "specification_of"]

Env = gym.Env[Any, Any]
Named = str | EnvSpec | Callable[..., Env]  # a Gymnasium id, a specification, or a function that makes one


@dataclasses.dataclass(frozen=True)
class Environment:
    """An environment's specification, so that any process can make it, with what acting in it takes.

    Observations that are not flat vectors are flattened, as ``StateVector`` says.
    """

    environment: str
    kwargs: Mapping[str, Any]  # of the constructor
    spec: EnvSpec  # with its wrappers; travels instead of the id: a worker has not imported what registers it
    states: StateVector  # not the observation space: MiniGrid's cannot be pickled
    action_space: spaces.Space[Any]
    state_dim: int
    act_dim: int
    time_limit: int  # steps after which an episode is cut
    # Called with the environment after each reset; what it returns is called when the episode ends, for ``measures``.
    measure: Callable[[Env], Callable[[], Mapping[str, float]]] | None = None
    measures: tuple[str, ...] = ()

    def make(self, **kwargs: Any) -> Env:
        """A new environment with the dynamics and the seeding of ``gym.make(id)``; ``kwargs`` such as ``render_mode``.

        The checker that ``gym.make`` wraps around it (it warns about environments under development) is left out.
        """
        return _make(self.spec, {**self.kwargs, **kwargs})

    def state(self, observation: Any) -> NDArray[np.float64]:
        """An observation as the model's flat state vector ``[state_dim]``, not yet normalised."""
        return self.states.flat(observation)

    def actions(self, predictions: NDArray[np.floating[Any]]) -> tuple[Sequence[Any], NDArray[np.float32]]:
        """Turn predictions ``[n, act_dim]`` into ``n`` actions for ``env.step``, and ``[n, act_dim]`` to feed back.

        Continuous predictions are clipped to the action box and not rescaled. Discrete predictions are logits: the
        largest is taken, and fed back one-hot; of a MultiDiscrete action the largest for each of its choices.
        """
        space = self.action_space
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            parts = np.split(predictions, np.cumsum(self._choices)[:-1], axis=1)
            chosen = np.stack([part.argmax(axis=1) for part in parts], axis=1) + np.ravel(space.start)
            if isinstance(space, spaces.Discrete):
                return chosen[:, 0].tolist(), self.one_hot(chosen)
            return list(chosen.reshape(-1, *space.shape).astype(space.dtype)), self.one_hot(chosen)
        assert isinstance(space, spaces.Box)
        clipped = np.clip(predictions.astype(space.dtype), space.low, space.high)
        return list(clipped), clipped.astype(np.float32)

    def one_hot(self, actions: NDArray[Any]) -> NDArray[np.float32]:
        """Discrete actions, as ``env.step`` takes them, as ``[n, act_dim]`` zeros and ones: one 1 for each choice."""
        first = np.ravel(getattr(self.action_space, "start", 0))
        kinds = np.asarray(actions).reshape(len(actions), -1).astype(np.int64) - first
        columns = zip(kinds.T, self._choices, strict=True)
        return np.concatenate([np.eye(n, dtype=np.float32)[kind] for kind, n in columns], axis=1)

    @property
    def _choices(self) -> list[int]:
        space = self.action_space
        return np.ravel(space.nvec).tolist() if isinstance(space, spaces.MultiDiscrete) else [self.act_dim]


def specification_of(environment: Named) -> EnvSpec:
    """The specification of an environment that is given by its id, by a specification, or by what makes it.

    Raises:
        DtLensError: for an id that is not registered, or anything else.
    """
    if isinstance(environment, EnvSpec):
        return environment
    if isinstance(environment, str):
        return specification(environment)
    if not callable(environment):
        raise DtLensError(
            f"environment is {as_written(environment)}; it must be a Gymnasium id, such as 'Hopper-v5', an EnvSpec, or "
            "a function that makes an environment."
        )
    name = getattr(environment, "__qualname__", type(environment).__name__)
    return EnvSpec(re.sub(r"[^\w:.-]+", "-", name).strip("-") or "environment", entry_point=environment)


def make_environment(
    environment: Named,
    kwargs: Mapping[str, Any],
    cfg: HookedDecisionTransformerConfig,
    max_steps: int | None = None,
    *,
    ignores: Sequence[str] | None = None,
    texts: Mapping[str, Sequence[str]] | None = None,
    image: Sequence[int] | None = None,
    pixels: float = 1.0,
) -> Environment:
    """``environment``, made once to check that the model ``cfg`` describes fits it.

    ``kwargs`` are keywords of ``gymnasium.make``; its ``max_episode_steps`` and ``wrappers`` change the specification.

    ``ignores`` and ``texts`` are the model's facts of those names: what it does not read of an observation, and the
    texts that it reads. ``image`` is the shape (channels, height, width) that its state encoder reads, if it has one
    for images, and ``pixels`` what whole numbers in it are divided by.

    ``environment`` is only looked up: for a name that a user gives, call ``import_module_of`` first.

    An episode is cut at the environment's own time limit or after ``max_steps``, whichever comes first. Without either
    it is cut at the end of the model's timestep table, and that is a warning.

    Raises:
        DtLensError: for an id that is not registered, a keyword of a file's that the
            environment is not registered with, an environment that cannot be made, or a state or action space that the
            model does not fit.
    """
    require_offers(cfg, "cfg", "the configuration of a decision transformer", "state_dim", "act_dim")
    if not isinstance(kwargs, Mapping):
        raise DtLensError(f"kwargs is {a_type(kwargs)}; it must be a dictionary of arguments by name.")
    spec, kwargs = specify(specification_of(environment), kwargs)
    named = isinstance(environment, str) and environment.rpartition(":")[2] == spec.id
    environment = str(environment) if named else spec.id
    env = _make(spec, kwargs)
    try:
        states = StateVector.of(env.observation_space, ignores, texts, environment, image, pixels)
        state_dim = states.size
        act_dim, discrete = _action_size(environment, env.action_space)
        action_space = env.action_space
        own_limit = getattr(env.unwrapped, "max_steps", None)  # MiniGrid counts its steps itself
    finally:
        env.close()
    if state_dim != cfg.state_dim:
        raise DtLensError(
            f"{environment} gives states of {state_dim} numbers and this model reads {cfg.state_dim}; "
            "evaluate it in the environment it was trained in."
        )
    if discrete != cfg.discrete_actions:
        kind, other = ("discrete", "continuous") if discrete else ("continuous", "discrete")
        # Hugging Face's and kzl's files do not say what their predictions are.
        logits = discrete and not cfg.action_tanh
        hint = "; if they are logits, pass discrete_actions=True to load or wrap" if logits else ""
        raise DtLensError(f"{environment} takes {kind} actions and this model predicts {other} ones{hint}.")
    if act_dim != cfg.act_dim:
        what = "kinds of action" if discrete else "numbers per action"
        raise DtLensError(f"{environment} takes {act_dim} {what} and this model predicts {cfg.act_dim}.")
    limits = [int(limit) for limit in (spec.max_episode_steps, own_limit, max_steps) if _is_limit(limit)]
    if not limits:
        warnings.warn(
            f"{environment} has no time limit that dt-lens can see: its episodes are cut after {cfg.max_ep_len} steps, "
            "the rows of the model's timestep table; max_steps= sets another limit.",
            stacklevel=2,
        )
    limit = min(limits, default=cfg.max_ep_len)
    return Environment(environment, dict(kwargs), spec, states, action_space, state_dim, act_dim, limit)


def _is_limit(steps: Any) -> TypeGuard[Integral]:
    """NumPy's integers too; an environment may say ``None``, or anything."""
    return isinstance(steps, Integral) and not isinstance(steps, bool) and int(steps) > 0


def _make(spec: EnvSpec, kwargs: Mapping[str, Any]) -> Env:
    try:
        return gym.make(spec, disable_env_checker=True, **kwargs)
    except (Exception, SystemExit) as error:  # whatever its constructor raises
        raise DtLensError(f"The environment {spec.id!r} cannot be made: {because(error)}.") from error


def _action_size(environment: str, space: spaces.Space[Any]) -> tuple[int, bool]:
    if isinstance(space, spaces.Discrete):
        return int(space.n), True
    if isinstance(space, spaces.MultiDiscrete):
        return int(np.sum(space.nvec)), True
    if isinstance(space, spaces.Box) and len(space.shape) == 1:
        return int(space.shape[0]), False
    raise DtLensError(
        f"{environment}'s actions are {space}; only flat continuous (Box), Discrete and MultiDiscrete ones can be "
        "predicted."
    )


@dataclasses.dataclass(frozen=True)
class ScoreReference:
    """The returns whose D4RL-normalised scores are 0 (a random policy) and 100 (an expert).

    Fu et al., "D4RL: Datasets for Deep Data-Driven Reinforcement Learning" (2020). They were measured on the versions
    of 2020 (Hopper-v2 and so on); on later versions the score is a convention, not a share of what is possible.
    """

    name: str
    random: float
    expert: float

    def score(self, returns: NDArray[np.float64]) -> NDArray[np.float64]:
        """``100 * (return - random) / (expert - random)``, elementwise."""
        return 100.0 * (np.asarray(returns, dtype=np.float64) - self.random) / (self.expert - self.random)


_REFERENCES = {
    "Hopper": ScoreReference("hopper", -20.272305, 3234.3),
    "HalfCheetah": ScoreReference("halfcheetah", -280.178953, 12135.0),
    "Walker2d": ScoreReference("walker2d", 1.629008, 4592.3),
    "Ant": ScoreReference("ant", -325.6, 3879.7),
    "AdroitHandPen": ScoreReference("pen", 96.262799, 3076.8331017826877),
    "AdroitHandHammer": ScoreReference("hammer", -274.856578, 12794.134825156867),
    "AdroitHandDoor": ScoreReference("door", -56.512833, 2880.5693087298737),
    "AdroitHandRelocate": ScoreReference("relocate", -6.425911, 4233.877797728884),
}


def score_reference(environment: str) -> ScoreReference | None:
    """The D4RL reference returns of a Gymnasium id, ``None`` where D4RL defines none.

    >>> score_reference("Hopper-v5").expert
    3234.3
    >>> score_reference("CartPole-v1") is None
    True
    """
    if not isinstance(environment, str):
        raise DtLensError(f"environment is {environment!r}; it must be a Gymnasium id, as text.")
    return _REFERENCES.get(environment.rpartition(":")[2].rpartition("-v")[0])
