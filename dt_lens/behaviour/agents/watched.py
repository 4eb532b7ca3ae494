"""What an agent's matrices read in its own episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dt_lens.behaviour.agents.identity import model_id
from dt_lens.behaviour.agents.rollouts import Policy
from dt_lens.behaviour.agents.running import Setting, run
from dt_lens.behaviour.agents.windows import WindowPolicy
from dt_lens.behaviour.watched import finished, watching
from dt_lens.lens.activations import Activations
from dt_lens.lens.watching import Watch
from dt_lens.progress import ProgressCallback

__all__ = ["activations_of_episodes"]

TOGETHER = 16  # episodes whose windows run side by side
EPISODES = 0.25  # the share of the time that the episodes take; the rest goes into running their windows


def activations_of_episodes(
    model: Any,
    setting: Setting,
    seeds: range,
    tell: ProgressCallback,
    *,
    matrices: Sequence[str] | str | None = None,
) -> Activations:
    """The moments of what every matrix reads in the episodes of ``seeds``; see ``collect_activations``."""
    with watching(model):
        watch = Watch(model, matrices, last_narrows=True)
        record = _watch_episodes(model, watch, setting, seeds, tell)
        identity = model_id(model)
    return finished(watch, **record, model_id=identity)


class _Episode(NamedTuple):
    """What the policy was fed in one episode, a row per step."""

    states: list[Tensor]
    returns_to_go: list[Tensor]
    timesteps: list[Tensor]
    actions: list[Tensor]  # each taken one step earlier


class _InputLog:
    """A policy that keeps what it is fed, by episode, in the order in which the episodes began."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self.width = policy, policy.width
        self.episodes: list[_Episode] = []
        self._rows: dict[int, _Episode] = {}

    def restart(self, row: int) -> None:
        self._rows[row] = _Episode([], [], [], [])
        self.episodes.append(self._rows[row])
        self._policy.restart(row)

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


def _watch_episodes(model: Any, watch: Watch, setting: Setting, seeds: range, tell: ProgressCallback) -> dict[str, Any]:
    """Run the episodes, then every window of them through the hooked model."""
    played = _play(model, setting, seeds, lambda share: tell("running episodes", EPISODES * share))
    steps, done = sum(len(episode.states) for episode in played), 0
    # Longest first, so that rows fall out at the end.
    played.sort(key=lambda episode: -len(episode.states))
    for begin in range(0, len(played), TOGETHER):
        some = played[begin : begin + TOGETHER]
        for running in _run_windows(model, watch, some):
            done += running
            tell("running windows", EPISODES + (1 - EPISODES) * done / steps)
    return {
        "environment": setting.environment,
        "environment_kwargs": setting.environment_kwargs,
        "target_return": setting.target_return,
        "time_limit": setting.made.time_limit,
        **({} if setting.conditions.deterministic else {"actions": "sampled"}),
        "seed": seeds.start,
        "episodes": len(seeds),
        "steps": steps,
    }


def _play(model: Any, setting: Setting, seeds: range, report: Callable[[float], None]) -> list[_Episode]:
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
        _Episode(*(part[: lengths[seed]] for part in episode))
        for seed, episode in zip(seeds, logs[0].episodes, strict=True)
    ]


def _run_windows(model: Any, watch: Watch, episodes: Sequence[_Episode]) -> Iterator[int]:
    """Run every window of some episodes, step by step, side by side; yields how many windows each step had."""
    context = model.facts.context

    def window(**batch: Tensor) -> Any:
        out, cache = model.run_with_cache(**batch, names_filter=watch.hooks.__contains__)
        real = batch["attention_mask"].bool().repeat_interleave(3, 1)[:, : 3 * context - 1]
        used = torch.zeros_like(real)
        used[:, -1] = True  # the last state's token
        watch.add({name: _cut(name, x, real.shape[1]) for name, x in cache.items()}, real, used)
        return out

    like = model.weights["predict.action.W"]
    policy = WindowPolicy(window, model.cfg, context, len(episodes), like, padding=model.facts.padding)
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


def _cut(name: str, x: Tensor, tokens: int) -> Tensor:
    """An activation without the token of the action to come, which acting leaves out and nothing reads."""
    return x[:, :, :tokens, :tokens] if name.endswith("hook_pattern") else x[:, :tokens]
