"""A live run: the unedited model, the edited one and a control over the same units, with pictures and intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from dt_lens.behaviour.agents.arms import arm_of
from dt_lens.behaviour.agents.environment import Env, Environment
from dt_lens.behaviour.agents.lanes import LEAST_LANES
from dt_lens.behaviour.agents.rollouts import Outcome, Policy, Start
from dt_lens.behaviour.agents.running import acting_model, acts_without_hooks, portable_job, run_model
from dt_lens.behaviour.agents.task import AgentTask
from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.task import Task
from dt_lens.behaviour.tasks import task_of
from dt_lens.edits.several import in_force
from dt_lens.errors import DtLensError, as_written
from dt_lens.explorer.held_edits import Say, make_edits
from dt_lens.explorer.pictures import picture_of
from dt_lens.lens.forward_mode import measuring, one_thread

__all__ = ["play", "summary"]

PICTURES = 25  # a second
SUMMARIES = 1.0  # seconds between two intervals
MOST = 1000  # units of a run

Check = Callable[[], None]


def play(model: Any, wanted: Mapping[str, Any], fold_layernorm: bool, say: Say, check: Check) -> None:
    """Run units of ``model`` under each arm until they are done or ``check`` raises.

    Args:
        model: this process's own.
        wanted: ``edits``, ``control`` (a seed or ``None``), ``units``, ``seed``, ``target_return``, ``max_steps`` and
            ``pace`` (steps a second at most, or ``None``).
        fold_layernorm: of the edits.
        say: receives the events.
        check: raises when the run is to stop.

    Raises:
        DtLensError: for edits that cannot be made, or numbers out of range.
    """
    edits = make_edits(model, wanted["edits"], fold_layernorm)
    if not edits:
        raise DtLensError("There is no edit to run; add one on the page Edit.")
    steps = wanted.get("max_steps")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise DtLensError(
            f"The steps of an episode must be a whole number above 0, or empty; it is {as_written(steps)}."
        )
    arms: dict[str, list[Any]] = {"unedited": [], "edited": edits}
    if wanted.get("control") is not None:
        arms["control"] = [edit.control(int(wanted["control"])) for edit in edits]
    options: dict[str, Any] = (
        {name: wanted.get(name) for name in ("target_return", "max_steps")} if model.can_act else {}
    )
    task, units = task_of(model, units=wanted.get("units"), seed=wanted.get("seed") or 0, **options)
    units = units[:MOST]
    abouts = {}
    for name, these in arms.items():
        with in_force(these):
            abouts[name] = task.about(model)
    run = _Run(model, task, arms, abouts, say, check, wanted.get("pace"))
    run.begin(len(units))
    # As many as a batch has rows on every machine: then all arms of an episode begin at once, and can be watched.
    together = max(1, LEAST_LANES // len(arms))
    for first in range(0, len(units), together):
        run.round(units[first : first + together])
    run.tell(last=True)


@dataclass
class _Run:
    """What a run has found so far."""

    model: Any
    task: Task
    arms: Mapping[str, Sequence[Any]]
    abouts: Mapping[str, Mapping[str, Any]]
    say: Say
    check: Check
    pace: float | None
    found: dict[str, dict[int, tuple[Any, ...]]] = field(default_factory=dict)  # by arm and unit, the measures
    told: tuple[float, int] = (0.0, 0)

    def begin(self, count: int) -> None:
        self.found = {name: {} for name in self.arms}
        terms = self.task.terms
        self.say(
            "begun",
            arms=list(self.arms),
            units=count,
            unit=terms.unit,
            outcome=terms.outcome_name,
            scale=terms.in_scale,
            better=terms.better,
            place=terms.place,
            failing=terms.failure_rule if terms.failure is not None else "",
            limit=terms.limit if terms.lasts is not None else None,
        )

    def round(self, units: Sequence[int]) -> None:
        """Run a few units of every arm, and tell what they gave."""
        self.check()
        task = self.task
        drawn = isinstance(task, AgentTask) and type(task).run is AgentTask.run and acts_without_hooks(self.model)
        if drawn and self._watched(task, units):
            self.tell()
            return
        for name, edits in self.arms.items():
            for unit in units:
                self.check()
                with in_force(edits), measuring(self.model):
                    columns = self.task.run(self.model, [unit])
                self._add(name, unit, tuple(np.asarray(columns[m])[0] for m in self.task.terms.measures))
        self.tell()

    def _watched(self, task: Any, units: Sequence[int]) -> bool:
        """Run episodes of all arms side by side, with pictures; false where that cannot be done."""
        arms = []
        for edits in self.arms.values():
            with in_force(edits):
                arms.append(arm_of(self.model))
        if any(arm.own for arm in arms):
            return False
        starts = [Start(unit, number) for unit in units for number in range(len(arms))]
        watched = _WatchedEnvironment(**{f.name: getattr(task.setting.made, f.name) for f in fields(Environment)})
        job = portable_job(self.model, task.setting._replace(made=watched), LEAST_LANES, arms)
        if job is None:
            return False
        names = list(self.arms)
        watch = _Watch(self, starts, watched.made, task.setting.conditions)

        def ended(outcome: Outcome) -> None:
            watch.over[(outcome.seed, outcome.arm)] = outcome
            self._add(names[outcome.arm], outcome.seed, outcome.measures)

        with one_thread():
            run_model(acting_model(job), job, iter(starts), watch=watch.wrap, ended=ended)
        watch.last()
        return True

    def _add(self, arm: str, unit: int, measures: tuple[Any, ...]) -> None:
        self.found[arm][unit] = measures
        terms = self.task.terms
        place = list(terms.measures).index(terms.outcome)
        ended = bool(measures[list(terms.measures).index(terms.lasts[1])]) if terms.lasts is not None else False
        self.say("outcome", arm=arm, unit=int(unit), value=float(measures[place]), ended=ended)
        self.tell(again=SUMMARIES)

    def tell(self, again: float = 0.0, last: bool = False) -> None:
        """Send the comparisons, unless the last ones are younger than ``again`` seconds or nothing is new."""
        together = sorted(set.intersection(*(set(rows) for rows in self.found.values())))
        now = time.monotonic()
        if len(together) < 2 or now - self.told[0] < again or len(together) == self.told[1]:
            return
        self.told = (now, len(together))
        measured = {}
        for name, rows in self.found.items():
            columns = zip(*(rows[unit] for unit in together), strict=True)
            named = dict(zip(self.task.terms.measures, map(list, columns), strict=True))
            measured[name] = self.task.result(together, named, **self.abouts[name])
        self.say("summary", **summary(measured))


def summary(measured: Mapping[str, Evaluation]) -> dict[str, Any]:
    """The means of each arm and the paired comparisons: of every arm with the unedited one, and with the control."""
    base = measured["unedited"]
    pairs = [(name, "unedited") for name in measured if name != "unedited"]
    pairs += [("edited", "control")] if "control" in measured else []
    means = {}
    for name, one in measured.items():
        means[name] = {"mean": one.mean}
        if one.terms.failure is not None:
            means[name]["failed"] = float(one.failed.mean())
    compared = []
    for name, other in pairs:
        found = measured[name].compare(measured[other])
        low, high = found.difference_interval
        compared.append(
            {
                "arm": name,
                "with": other,
                "difference": found.difference,
                "low": _number(low),
                "high": _number(high),
                "p": _number(found.p_value),
                "note": found.interval_note,
            }
        )
    return {"n": len(base), "means": means, "compared": compared}


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class _WatchedEnvironment(Environment):
    """Keeps the environments that it makes, in their order, which is that of the first episodes."""

    made: list[Env] = field(default_factory=list)

    def make(self, **kwargs: Any) -> Env:
        self.made.append(super().make(**kwargs))
        return self.made[-1]


class _Watch:
    """Looks at a batch as it runs: which episode is drawn, how far it is, and whether the run should stop."""

    def __init__(self, run: _Run, starts: Sequence[Start], envs: Sequence[Env], conditions: Any) -> None:
        self.run, self.starts, self.envs, self.conditions = run, list(starts), envs, conditions
        self.rows: list[tuple[int, int]] = []  # of the batch: an environment, and the start that runs in it
        self.begun = 0
        self.over: dict[tuple[int, int], Outcome] = {}
        self.drawn = starts[0].seed
        self._next = 0.0
        self._last: dict[int, dict[str, Any]] = {}

    def wrap(self, policy: Policy) -> Policy:
        return _Watched(policy, self)

    def seen(self, returns_to_go: Any, timesteps: Any) -> None:
        """Called before every step of the batch."""
        self.run.check()
        if self.run.pace:
            time.sleep(1.0 / self.run.pace)
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + 1.0 / PICTURES
        self._choose()
        sent = []
        for row, (place, number) in enumerate(self.rows):
            if number < 0 or self.starts[number].seed != self.drawn:
                continue
            start = self.starts[number]
            if (start.seed, start.arm) in self.over:
                continue
            c = self.conditions
            total = c.target_return - float(returns_to_go[row, 0]) * c.return_scale
            picture = {
                "arm": start.arm,
                "step": int(timesteps[row]),
                "total": total,
                "picture": picture_of(self.envs[place]),
            }
            self._last[start.arm] = picture
            sent.append(picture)
        for arm, outcome in self._ended():
            sent.append({**self._last.get(arm, {"arm": arm, "picture": None}), **_final(outcome)})
        self.run.say("frame", seed=self.drawn, arms=sent)

    def last(self) -> None:
        """The end of the episode that was drawn."""
        sent = [{**self._last.get(arm, {"arm": arm, "picture": None}), **_final(one)} for arm, one in self._ended()]
        self.run.say("frame", seed=self.drawn, arms=sent)

    def _ended(self) -> Iterator[tuple[int, Outcome]]:
        return ((arm, outcome) for (seed, arm), outcome in self.over.items() if seed == self.drawn)

    def _choose(self) -> None:
        """Draw another episode once all arms of this one have ended."""
        running = [s.seed for s in self.starts if (s.seed, s.arm) not in self.over]
        if self.drawn not in running and running:
            self.drawn = running[0]
            self._last = {}


def _final(outcome: Outcome) -> dict[str, Any]:
    return {"step": outcome.length, "total": outcome.total, "over": True, "terminated": outcome.terminated}


class _Watched:
    """A policy that is looked at, and answers as it would."""

    def __init__(self, policy: Policy, watch: _Watch) -> None:
        self._policy, self._watch = policy, watch
        self.width = policy.width
        watch.rows = [(row, -1) for row in range(policy.width)]  # no episode yet

    def restart(self, row: int, arm: int = 0) -> None:
        watch = self._watch
        watch.rows[row] = (watch.rows[row][0], watch.begun)  # episodes begin in the order of the starts
        watch.begun += 1
        self._policy.restart(row, arm)

    def keep(self, rows: Sequence[int]) -> None:
        self._watch.rows = [self._watch.rows[row] for row in rows]
        self._policy.keep(rows)
        self.width = self._policy.width

    def act(
        self, states: torch.Tensor, returns_to_go: torch.Tensor, timesteps: torch.Tensor, previous: torch.Tensor
    ) -> torch.Tensor:
        self._watch.seen(returns_to_go, timesteps)
        return self._policy.act(states, returns_to_go, timesteps, previous)
