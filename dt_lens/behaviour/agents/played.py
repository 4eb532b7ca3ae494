"""What an agent's policy was fed in its own episodes, and the windows that this makes for the hooked model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dt_lens.behaviour.agents.rollouts import Policy
from dt_lens.behaviour.agents.running import Setting, run
from dt_lens.behaviour.agents.windows import WindowPolicy

__all__ = ["PlayedEpisode", "play", "run_windows"]


class PlayedEpisode(NamedTuple):
    """What the policy was fed in one episode, a row per step."""

    states: list[Tensor]
    returns_to_go: list[Tensor]
    timesteps: list[Tensor]
    actions: list[Tensor]  # each taken one step earlier


class _InputLog:
    """A policy that keeps what it is fed, by episode, in the order in which the episodes began."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self.width = policy, policy.width
        self.episodes: list[PlayedEpisode] = []
        self._rows: dict[int, PlayedEpisode] = {}

    def restart(self, row: int, arm: int = 0) -> None:
        self._rows[row] = PlayedEpisode([], [], [], [])
        self.episodes.append(self._rows[row])
        self._policy.restart(row, arm)

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = {new: self._rows[old] for new, old in enumerate(rows) if old in self._rows}
        self._policy.keep(rows)
        self.width = self._policy.width

    def act(self, states: Tensor, returns_to_go: Tensor, timesteps: Tensor, previous_actions: Tensor) -> Tensor:
        fed = states, returns_to_go, timesteps, previous_actions
        for row, episode in self._rows.items():
            for kept, given in zip(episode, fed, strict=True):
                kept.append(given[row].clone())
        return self._policy.act(*fed)


def play(model: Any, setting: Setting, seeds: range, report: Callable[[float], None]) -> list[PlayedEpisode]:
    """What the agent was fed in each episode, run as ``evaluate`` runs it."""
    logs: list[_InputLog] = []

    def watch(policy: Policy) -> Policy:
        logs.append(_InputLog(policy))
        return logs[0]

    outcomes = run(
        model,
        setting,
        seeds,
        report=lambda finished, running: report((finished + running) / len(seeds)),
        watch=watch,
    )
    lengths = {outcome.seed: outcome.length for outcome in outcomes}
    # The row of an episode that has ended is fed until the last episode ends.
    return [
        PlayedEpisode(*(part[: lengths[seed]] for part in episode))
        for seed, episode in zip(seeds, logs[0].episodes, strict=True)
    ]


def run_windows(model: Any, episodes: Sequence[PlayedEpisode], run: Callable[..., Any]) -> Iterator[int]:
    """Call ``run`` with every window of some episodes, step by step, side by side; yields how many each step had.

    Args:
        model: the agent, for its shape and facts.
        episodes: longest first.
        run: takes a batch as Hugging Face's keywords; gives what the model gives: its ``action_preds`` are read.
    """
    like = model.weights["predict.action.W"]
    policy = WindowPolicy(run, model.cfg, model.facts.context, len(episodes), like, padding=model.facts.padding)
    for row in range(len(episodes)):
        policy.restart(row)
    for step in count():
        running = sum(len(episode.states) > step for episode in episodes)
        if not running:
            return
        if running < policy.width:
            policy.keep(range(running))
        parts = zip(*(tuple(part[step] for part in episode) for episode in episodes[:running]), strict=True)
        states, returns_to_go, timesteps, actions = (torch.stack(part) for part in parts)
        policy.act(states, returns_to_go, timesteps, actions)
        yield running
