"""Every state of an environment whose dynamics are a table, alone and as an agent meets it, and what matters there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dt_lens.behaviour.agents.played import PlayedEpisode, play, run_windows
from dt_lens.behaviour.agents.running import Setting
from dt_lens.behaviour.agents.tabular import Tabular
from dt_lens.behaviour.situations import Situations
from dt_lens.edits.edit import suspended
from dt_lens.lens.forward_mode import measuring
from dt_lens.progress import ProgressCallback

__all__ = ["action_chances", "situations_of", "where_it_matters"]

EPISODES = 30  # of the agent, from which visited windows are drawn
WINDOWS = 200

Levels = Mapping[str, Sequence[Any]]


def situations_of(
    model: Any, setting: Setting, factors: Levels, seed: int, tell: ProgressCallback
) -> list[Situations] | None:
    """The states of a table alone, one step at the target return each, and windows that the unedited agent meets.

    Args:
        model: the agent.
        setting: its environment and target return.
        factors: for each factor, its level in every state.
        seed: of the draw of windows.
        tell: receives the progress.

    Returns:
        ``None`` if the environment's dynamics are not a table, or the factors are not of its states.
    """
    env = setting.made.make()
    try:
        table = Tabular.of(env)
    finally:
        env.close()
    n = setting.made.state_dim
    if table is None or n != len(table.initial) or any(len(levels) != n for levels in factors.values()):
        return None
    optimal, reachable = table.optimal_actions(), table.reachable
    matters = {name: where_it_matters(name, factors, optimal) for name in factors}
    alone = _alone(model, setting)
    states, windows = _visited(model, setting, seed, tell)
    seen = {name: where[states] for name, where in matters.items()}
    return [
        Situations("alone", alone, matters, reachable),
        Situations("visited", windows, seen, np.ones(len(states), dtype=bool)),
    ]


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
    with measuring(model):
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


def _visited(
    model: Any, setting: Setting, seed: int, tell: ProgressCallback
) -> tuple[Int64[np.ndarray, " n"], dict[str, Tensor]]:
    """Windows from the unedited agent's own episodes, drawn at random, and the state that each ends with."""
    with suspended(model):
        episodes = play(model, setting, range(seed, seed + EPISODES), lambda share: tell("running episodes", share))
    episodes.sort(key=lambda episode: -len(episode.states))
    windows = _windows(model, episodes)
    count = len(windows["timesteps"])
    chosen = np.sort(np.random.default_rng([seed, 8]).permutation(count)[:WINDOWS])
    c = setting.conditions
    last = windows["states"][:, -1].double().cpu().numpy()[chosen] * c.state_std + c.state_mean
    return last.argmax(1), {name: part[torch.as_tensor(chosen)] for name, part in windows.items()}


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
