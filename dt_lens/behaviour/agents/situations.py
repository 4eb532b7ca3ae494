"""What an agent is faced with in a discrete world, and which factors matter there.

Where the dynamics are a table: every state alone, and windows that the agent meets. In a MiniGrid, whose states cannot
be listed: windows that the agent meets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from dt_lens.behaviour.agents.minigrid_changes import matters_in_windows
from dt_lens.behaviour.agents.minigrid_plans import is_minigrid
from dt_lens.behaviour.agents.played import PlayedEpisode, play, run_windows
from dt_lens.behaviour.agents.running import Setting
from dt_lens.behaviour.agents.tabular import Tabular
from dt_lens.behaviour.situations import Situations
from dt_lens.edits.edit import suspended
from dt_lens.lens.forward_mode import flushing_denormals, measuring
from dt_lens.progress import ProgressCallback

__all__ = ["action_chances", "situations_of", "where_it_matters"]

EPISODES = 30  # of the agent, from which visited windows are drawn
WINDOWS = 200

Levels = Mapping[str, Sequence[Any]]


def situations_of(
    model: Any, setting: Setting, factors: Levels, seed: int, tell: ProgressCallback
) -> list[Situations] | None:
    """What the agent is faced with, and where each factor matters.

    Args:
        model: the agent.
        setting: its environment and target return.
        factors: for each factor, its level in every state or, in a MiniGrid, of every number of a state.
        seed: of the draw of windows.
        tell: receives the progress.

    Returns:
        ``None`` if the environment's dynamics are not a table and it is not a MiniGrid, or the factors are not of what
        the agent reads.

    Raises:
        DtLensError: for a MiniGrid that no planner knows.
    """
    env = setting.made.make()
    try:
        table, grid = Tabular.of(env), is_minigrid(env)
    finally:
        env.close()
    n = setting.made.state_dim
    if any(len(levels) != n for levels in factors.values()):
        return None
    if table is not None and n == len(table.initial):
        return _in_a_table(model, setting, table, factors, seed, tell)
    return [_in_a_grid(model, setting, factors, seed, tell)] if grid else None


def _in_a_table(
    model: Any, setting: Setting, table: Tabular, factors: Levels, seed: int, tell: ProgressCallback
) -> list[Situations]:
    """The states of a table alone, one step at the target return each, and visited windows."""
    optimal, reachable = table.optimal_actions(), table.reachable
    matters = {name: where_it_matters(name, factors, optimal) for name in factors}
    visited = _visited(model, setting, seed, tell)
    states = np.array([visited.states[episode][step].argmax() for episode, step in visited.ends])
    seen = {name: where[states] for name, where in matters.items()}
    return [
        Situations("alone", _alone(model, setting), matters, reachable),
        Situations("visited", visited.inputs, seen, np.ones(len(states), dtype=bool)),
    ]


def _in_a_grid(model: Any, setting: Setting, factors: Levels, seed: int, tell: ProgressCallback) -> Situations:
    """Visited windows of a MiniGrid; a planner says where a factor matters."""
    visited, first = _visited(model, setting, seed, tell), int(getattr(setting.made.action_space, "start", 0))
    played = {
        episode: ((visited.actions[episode] + first).tolist(), list(visited.states[episode]))
        for episode in {episode for episode, _ in visited.ends}
    }
    matters = matters_in_windows(
        setting.made, list(factors), played, visited.ends, model.facts.context, lambda share: tell("planning", share)
    )
    return Situations("visited", visited.inputs, matters, np.ones(len(visited.ends), dtype=bool))


def where_it_matters(factor: str, factors: Levels, optimal: Bool[np.ndarray, "n m"]) -> Bool[np.ndarray, " n"]:
    """In which states the best action depends on a factor.

    That is where there is another state, with another level of the factor and the same of all others, such that no
    action is optimal in both. A state without a level of the factor depends on nothing.

    Args:
        factor: one of ``factors``.
        factors: for each factor, its level in every state; ``None`` for a state that has none.
        optimal: which actions are optimal in each state.

    >>> where_it_matters("x", {"x": [0, 1, 0, 1], "y": [0, 0, 1, 1]}, np.eye(4, 3, dtype=bool) | [[0, 0, 1]])
    array([False, False, False, False])
    >>> where_it_matters("x", {"x": [0, 1, 0, 1], "y": [0, 0, 1, 1]}, np.eye(2, dtype=bool)[[0, 1, 0, 0]])
    array([ True,  True, False, False])
    """
    others = [levels for name, levels in factors.items() if name != factor]
    alike: dict[tuple[Any, ...], list[int]] = {}
    for state, level in enumerate(factors[factor]):
        if level is not None:
            alike.setdefault(tuple(levels[state] for levels in others), []).append(state)
    found = np.zeros(len(optimal), dtype=bool)
    for states in alike.values():
        best = optimal[states].astype(np.int64)
        found[states] = (best @ best.T == 0).any(1)
    return found


def action_chances(model: Any, situations: Situations) -> Float[Tensor, "n act_dim"]:
    """The probability of each discrete action in each situation: the softmax of the last step's logits."""
    with measuring(model), flushing_denormals():
        logits = model(**situations.inputs).action_preds[:, -1]
        found: Tensor = logits.double().softmax(-1).cpu()
    return found


def _alone(model: Any, setting: Setting) -> dict[str, Tensor]:
    """A first step in every state: what the policy would be fed, at the target return."""
    c, n = setting.conditions, setting.made.state_dim
    states = (np.eye(n) - c.state_mean) / c.state_std
    target = torch.tensor([c.target_return / c.return_scale])
    nothing = torch.zeros(setting.made.act_dim)
    episodes = [PlayedEpisode([torch.as_tensor(state)], [target], [torch.tensor(0)], [nothing]) for state in states]
    return _windows(model, episodes)


class _Visited(NamedTuple):
    """Windows from the unedited agent's own episodes.

    Attributes:
        inputs: keyword arguments of the model, a row per window.
        ends: the seed of each window's episode, and the step at which it ends.
        states: by seed, the state of each step, not scaled.
        actions: by seed, the number of the action at each step but the last.
    """

    inputs: dict[str, Tensor]
    ends: list[tuple[int, int]]
    states: dict[int, Float64[np.ndarray, "step state"]]
    actions: dict[int, np.ndarray[Any, Any]]


def _visited(model: Any, setting: Setting, seed: int, tell: ProgressCallback) -> _Visited:
    """Windows drawn at random from the unedited agent's own episodes."""
    seeds = range(seed, seed + EPISODES)
    with suspended(model):
        episodes = play(model, setting, seeds, lambda share: tell("running episodes", share))
    # As run_windows takes them: longest first, step by step.
    played = sorted(zip(seeds, episodes, strict=True), key=lambda one: -len(one[1].states))
    windows = _windows(model, [episode for _, episode in played])
    longest = len(played[0][1].states)
    ends = [(at, step) for step in range(longest) for at, episode in played if len(episode.states) > step]
    chosen = np.sort(np.random.default_rng([seed, 8]).permutation(len(ends))[:WINDOWS])
    c = setting.conditions
    return _Visited(
        {name: part[torch.as_tensor(chosen)] for name, part in windows.items()},
        [ends[number] for number in chosen],
        {at: torch.stack(episode.states).double().cpu().numpy() * c.state_std + c.state_mean for at, episode in played},
        # A step is fed the action before it.
        {at: torch.stack(episode.actions)[1:].argmax(1).cpu().numpy() for at, episode in played},
    )


def _windows(model: Any, episodes: Sequence[PlayedEpisode]) -> dict[str, Tensor]:
    """Every window of some episodes, as the policy feeds them to the model; all of them in one batch."""
    kept: dict[str, list[Tensor]] = {}
    width = model.cfg.act_dim

    def keep(**batch: Tensor) -> Any:
        for name, part in batch.items():
            kept.setdefault(name, []).append(part.clone())
        rows, steps = batch["timesteps"].shape
        return SimpleNamespace(action_preds=batch["states"].new_zeros(rows, steps, width))

    for _ in run_windows(model, episodes, keep):
        pass
    found = {name: torch.cat(parts) for name, parts in kept.items()}
    if model.cfg.position not in ("none", "constant") or bool(found["attention_mask"].all()):
        return found  # learned positions count from the start of the window
    # Steps that are masked in every window are left out: the model gives the same without them, and sooner.
    first = int(found["attention_mask"].any(0).int().argmax())
    return {name: part[:, first:] for name, part in found.items()}
