"""The actions of one episode, so that it can be replayed and drawn."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from dt_lens.arguments import LAST_SEED, require_offers, whole_number
from dt_lens.behaviour.agents.environment import Environment
from dt_lens.behaviour.agents.running import Setting, known_setting, run
from dt_lens.lens.protocol import require_agent

if TYPE_CHECKING:
    from dt_lens.decision_transformer.model import HookedDecisionTransformer

__all__ = ["actions_of_episode", "record_actions"]


class _ActionLog(gym.Wrapper[Any, Any, Any, Any]):
    def __init__(self, env: gym.Env[Any, Any], log: list[NDArray[Any]]) -> None:
        super().__init__(env)
        self.log = log

    def step(self, action: Any) -> Any:
        self.log.append(np.array(action))
        return super().step(action)


@dataclass(frozen=True)
class _RecordedEnvironment(Environment):
    log: list[NDArray[Any]] = field(default_factory=list)

    def make(self, **kwargs: Any) -> gym.Env[Any, Any]:
        return _ActionLog(super().make(**kwargs), self.log)


def record_actions(
    model: HookedDecisionTransformer, evaluation: Any, seed: int, setting: Setting | None = None
) -> NDArray[Any]:
    """The actions of ``model`` as it is now in episode ``seed`` of ``evaluation``: ``[steps, act_dim]`` or ``[steps]``.

    The episode is run again, and repeats to the last bit what it was when ``evaluate`` ran it with these weights.

    Args:
        model: the agent.
        evaluation: the result that holds the episode.
        seed: the episode's.
        setting: the environment that it ran in; made again from the evaluation by default.
    """
    require_agent(model, "record_actions")
    require_offers(evaluation, "evaluation", "a result of evaluate", "environment_kwargs", "time_limit")
    seed = whole_number(seed, "seed", 0, LAST_SEED - 1)
    if setting is not None:
        return actions_of_episode(model, setting, seed)
    e = evaluation
    own = (model.facts.environment_for(name)[1] for name in (e.environment, None))
    # The user may have confirmed the model's.
    kwargs = next((known for known in own if known == e.environment_kwargs), e.environment_kwargs)
    setting = known_setting(model, e.environment, kwargs, e.target_return, e.time_limit, e.deterministic)
    return actions_of_episode(model, setting, seed)


def actions_of_episode(model: HookedDecisionTransformer, setting: Setting, seed: int) -> NDArray[Any]:
    """The actions of an episode in an environment that is known."""
    recording = _RecordedEnvironment(**{f.name: getattr(setting.made, f.name) for f in fields(Environment)})
    run(model, setting._replace(made=recording), range(seed, seed + 1), workers=1)
    return np.array(recording.log)
