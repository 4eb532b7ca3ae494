"""What an agent's matrices read in its own episodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dt_lens.behaviour.agents.identity import model_id
from dt_lens.behaviour.agents.played import PlayedEpisode, play, run_windows
from dt_lens.behaviour.agents.running import Setting
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


def _watch_episodes(model: Any, watch: Watch, setting: Setting, seeds: range, tell: ProgressCallback) -> dict[str, Any]:
    """Run the episodes, then every window of them through the hooked model."""
    played = play(model, setting, seeds, lambda share: tell("running episodes", EPISODES * share))
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


def _run_windows(model: Any, watch: Watch, episodes: Sequence[PlayedEpisode]) -> Iterator[int]:
    context = model.facts.context

    def window(**batch: Tensor) -> Any:
        out, cache = model.run_with_cache(**batch, names_filter=watch.hooks.__contains__)
        real = batch["attention_mask"].bool().repeat_interleave(3, 1)[:, : 3 * context - 1]
        used = torch.zeros_like(real)
        used[:, -1] = True  # the last state's token
        watch.add({name: _cut(name, x, real.shape[1]) for name, x in cache.items()}, real, used)
        return out

    return run_windows(model, episodes, window)


def _cut(name: str, x: Tensor, tokens: int) -> Tensor:
    """An activation without the token of the action to come, which acting leaves out and nothing reads."""
    return x[:, :, :tokens, :tokens] if name.endswith("hook_pattern") else x[:, :tokens]
