"""Collect what a model's matrices read while it works: an agent in its own episodes, a language model in text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dt_lens.arguments import whole_number
from dt_lens.behaviour.agents.rollouts import Policy
from dt_lens.behaviour.agents.windows import WindowPolicy
from dt_lens.edits.edit import suspended
from dt_lens.errors import DtLensError, because
from dt_lens.lens.activations import Activations
from dt_lens.lens.forward_mode import evaluating, one_thread
from dt_lens.lens.protocol import require_running
from dt_lens.lens.watching import Watch
from dt_lens.progress import ProgressCallback, reporting, silent

if TYPE_CHECKING:
    from dt_lens.behaviour.agents.running import Setting
    from dt_lens.lens.protocol import Lens

__all__ = ["collect_activations", "kept_activations"]

TOGETHER = 16  # episodes whose windows run side by side
EPISODES = 0.25  # the share of the time that the episodes take; the rest goes into running their windows
TEXT_WINDOWS = 256  # the most windows of a language model's held-out text
Batches = Iterable[Tensor | Mapping[str, Any]]


def collect_activations(
    model: Lens,
    *,
    episodes: int = 10,
    seed: int = 0,
    environment: str | None = None,
    environment_kwargs: Mapping[str, Any] | None = None,
    target_return: float | None = None,
    max_steps: int | None = None,
    batches: Batches | None = None,
    matrices: Sequence[str] | str | None = None,
    progress: bool | ProgressCallback = False,
) -> Activations:
    """Collect moments of what every matrix reads, and of the residual stream, while the model runs without its edits.

    An agent runs the episodes that ``evaluate`` runs with the same arguments, to the bit; every step's window, as
    the agent saw it, is then run through the hooked model. The tokens whose value can reach the action count: all of
    the window (padding only where the model sees it, and not the action's own token, which acting leaves out); in the
    last block, after its keys and values, only the last state's token. A token counts once for every window that it was
    in. A language model reads its held-out text in windows of 128 tokens. If ``batches`` are given, all their tokens
    count. Dropout is off. Only sums are kept. torch runs on one thread, so that the numbers repeat exactly.

    Args:
        model: a wrapped model.
        episodes, seed, environment, environment_kwargs, target_return, max_steps: of an agent, as for ``evaluate``.
        batches: run these instead: tokens ``[batch, token]`` for a language model, or a batch of keyword arguments for
            any model (``model.probe()`` is one), with ``attention_mask`` where there is padding.
        matrices: shell patterns of those to watch; all by default. Memory may allow only a few of a wide model's: one
            that reads ``d`` entries takes ``8 d^2`` bytes.
        progress: ``True`` for a bar on standard error, or a function of (what is being done, share done).

    Raises:
        DtLensError: for a model that cannot run, settings that ``evaluate`` would refuse, batches that do not fit, or
            activations that are not finite.
    """
    require_running(model, "collect_activations")
    text = not model.can_act
    of_agents = (environment, environment_kwargs, target_return, max_steps)
    if (text or batches is not None) and ((episodes, seed) != (10, 0) or any(v is not None for v in of_agents)):
        raise DtLensError(
            "Activations come from an agent's episodes or from batches of tokens; leave out episodes, seed and the "
            "environment here."
        )
    with reporting(progress) as tell, one_thread(), suspended(model), evaluating(model), torch.no_grad():
        if batches is not None:
            watch = Watch(model, matrices)
            record = _watch_batches(model, watch, batches, tell)
        elif text:
            watch = Watch(model, matrices)
            record = _watch_text(model, watch, tell)
        else:
            from dt_lens.behaviour.agents.running import seeds_of, setting_of

            agent: Any = model
            seeds = seeds_of(seed, episodes)
            if max_steps is not None:
                whole_number(max_steps, "max_steps", 1)
            setting = setting_of(
                agent, environment, environment_kwargs, target_return, max_steps, "collect_activations"
            )
            watch = Watch(model, matrices, last_narrows=True)
            record = _watch_episodes(agent, watch, setting, seeds, tell)
        record |= {"model_id": _identity(model), "tokens": watch.tokens}
        points, stream = watch.moments()
    return Activations(points, watch.reads, stream, record, watch.made_of)


def _identity(model: Any) -> str:
    from dt_lens.behaviour.agents.identity import model_id
    from dt_lens.behaviour.texts.reading import base_and_model_id

    return model_id(model) if model.can_act else base_and_model_id(model)[0]


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
        "time_limit": setting.task.time_limit,
        "seed": seeds.start,
        "episodes": len(seeds),
        "steps": steps,
    }


def _play(model: Any, setting: Setting, seeds: range, report: Callable[[float], None]) -> list[_Episode]:
    """What the agent was fed in each episode, run as ``evaluate`` runs it."""
    from dt_lens.behaviour.agents.running import run

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


def _watch_text(model: Any, watch: Watch, tell: ProgressCallback) -> dict[str, Any]:
    """Run a language model's held-out text, window by window."""
    from dt_lens.behaviour.texts.reading import CONTEXT, _held_out, _in_words
    from dt_lens.behaviour.texts.windows import cut, read_texts

    if model.tokenizer is None:
        raise DtLensError(
            "The model has no tokenizer to read texts with; wrap it with one, or give batches= of tokens."
        )
    texts = _held_out(model)
    read = read_texts(texts)
    windows = cut(read, model.tokenizer, min(int(model.cfg.n_ctx), CONTEXT), TEXT_WINDOWS)
    tokens = (torch.from_numpy(window)[None] for window in windows.tokens)
    _watch_batches(model, watch, tokens, tell, len(windows))
    return {"text": _in_words(texts, read), "text_id": windows.text_id, "windows": len(windows)}


def _watch_batches(
    model: Any, watch: Watch, batches: Batches, tell: ProgressCallback, total: int | None = None
) -> dict[str, Any]:
    batches = [batches] if isinstance(batches, Tensor | Mapping) else batches
    total = len(batches) if total is None and isinstance(batches, Sequence) else total
    number = 0
    for number, batch in enumerate(batches, 1):
        named = dict(batch) if isinstance(batch, Mapping) else {"tokens": batch}
        device = next(iter(model.weights.values())).device
        named = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in named.items()}
        try:
            _, cache = model.run_with_cache(**named, names_filter=watch.hooks.__contains__)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise DtLensError(f"The model cannot run on batch {number - 1}: {because(error)}.") from error
        watch.add(cache, _real(cache, named.get("attention_mask")))
        tell("running batches", number / total if total else 0.0)
    return {"batches": number}


def _real(cache: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
    """Which tokens of a batch are not padding, ``[batch, token]``."""
    shape = cache["blocks.0.hook_resid_pre"].shape[:2]
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=cache["blocks.0.hook_resid_pre"].device)
    per_step = -(-shape[1] // mask.shape[1])  # an agent's step is three tokens, of which the last action's may lack
    return mask.bool().repeat_interleave(per_step, 1)[:, : shape[1]]


def kept_activations(
    model: Any, file: Path, setting: Setting, seed: int = 0, tell: ProgressCallback = silent
) -> Activations:
    """This agent's activations in this setting: read from ``file`` if they are there, else collected and saved there.

    A file must name its model, environment and target return. Older files lack their environment's options, their time
    limit and their seed; what a file lacks is not compared.

    Raises:
        DtLensError: as ``collect_activations`` does, or when the file cannot be written.
    """
    from dt_lens.behaviour.agents.identity import model_id

    wanted = {"model_id": model_id(model), "target_return": setting.target_return, "environment": setting.environment}
    wanted_if_said = {
        "environment_kwargs": dict(setting.environment_kwargs),
        "time_limit": setting.task.time_limit,
        "seed": seed,
    }
    if file.is_file():
        with suppress(DtLensError):  # a damaged file: collect again
            kept = Activations.load(file)
            said = {name: value for name, value in wanted_if_said.items() if name in kept.record}
            if all(kept.record.get(name) == value for name, value in (wanted | said).items()):
                return kept
    tell("collecting activations", 0.0)
    found = collect_activations(
        model,
        seed=seed,
        environment=setting.environment,
        environment_kwargs=setting.environment_kwargs,
        target_return=setting.target_return,
        max_steps=setting.task.time_limit,
    )
    found.save(file)
    return found
