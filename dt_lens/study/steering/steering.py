"""``steer``: find a singular direction whose dose moves a readout; the rules are in ``docs/steering.md``.

The direction is chosen on one set of units and reported on another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dt_lens.arguments import finite_numbers, local_path, require_writable, whole_number
from dt_lens.behaviour.collect_activations import kept_activations
from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.printing import places, span
from dt_lens.behaviour.readout import Readout
from dt_lens.behaviour.readouts import readout_of
from dt_lens.behaviour.task import Task
from dt_lens.edits.edit import Edit
from dt_lens.errors import DtLensError
from dt_lens.lens.activations import Activations
from dt_lens.lens.matrices import SideName
from dt_lens.progress import ProgressCallback, reporting
from dt_lens.statistics.outcomes import Interval, bootstrap_interval, interval_note, sign_flip, wilson
from dt_lens.study.steering.doses import (
    DOES,
    Candidate,
    candidates_of,
    dosed,
    first_side,
    gain_scale,
    output_energy_scale,
    put_side,
    slopes,
)
from dt_lens.study.steering.page import write_steering
from dt_lens.study.steering.result import SteeringResult, Verdict
from dt_lens.study.trials import Trials
from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["DOSES", "Candidate", "steer"]

DOSES = (0.0, 0.5, 1.5, 2.0)
RANDOM = 19  # random directions on either side: p = 0.05 if none of them reaches as far
# What "no more than random" adds, by whether the direction beats random ones (on its read side, on the other).
EXCHANGED = {
    (False, True): " in what it {first}, and more in where it puts that",
    (True, False): " in where it puts what it {first}, and more in what that is",
}
GAIN = " (these of the same downstream gain instead)"
ALPHA = 0.05


def steer(
    model: Any,
    out: str | Path,
    what: Any = None,
    *,
    name: str = "the model",
    task: Task | None = None,
    units: int | None = None,
    choosing: int | None = None,
    candidates: int = 8,
    doses: Sequence[float] = DOSES,
    seed: int = 0,
    workers: int | None = None,
    command: str = "",
    progress: bool | ProgressCallback = False,
    **options: Any,
) -> SteeringResult:
    """Find the direction whose dose best moves a readout; report it on units that took no part in the choice.

    The readout of an agent is its return, along its curve of target returns; of a language model the log probability
    of ``answers`` after ``prompts``; of any other model the outcome of its ``task``. An agent must not fail more, the
    loss of a language model on other text must not rise. Every finished evaluation is kept below ``out``; called again
    after an interruption, the search resumes.

    Args:
        model: a wrapped model that can run; an agent needs at least two target returns.
        out: the folder for the evaluations, ``steering.html``, ``steering.csv`` and ``steering.json``.
        what: an agent's environment, the other text of a language model, or a ``Task``; as for ``evaluate``.
        name: what the page calls the model.
        task: a ``Task``, in place of ``what``.
        units: per dose, for the report: 40 episodes, or half of the prompts, by default. ``episodes`` is another name.
        choosing: units per dose while choosing, per target, and per random direction: 8 episodes, or half of the
            prompts.
        candidates: how many directions are tried.
        doses: what sigma is multiplied by; 1 is the unedited model, which is always included.
        seed: of the first unit while choosing, where units have seeds, and of the first random direction; the report
            begins 1,000 later.
        workers: worker processes, where the task can use any.
        command: the command line that repeats this, for the page.
        progress: ``True`` for a bar on standard error, or a function of (what is being done, share done).
        options: ``targets`` of an agent's curve, in the environment's units, the model's own by default; ``prompts``
            and ``answers`` of a language model (see ``PromptTask.of``); and what else ``evaluate`` takes to say what is
            run, such as ``max_steps``, ``failure`` or ``context``.

    Raises:
        DtLensError: if an argument is out of range, or does not fit the model.
        KeyboardInterrupt: on Ctrl-C; finished evaluations are kept.
    """
    for said, value, least in (("candidates", candidates, 1), ("seed", seed, 0)):
        whole_number(value, said, least)
    grid = sorted(set(finite_numbers(doses, "doses")) - {1.0})
    if len(grid) < 2:
        raise DtLensError(f"doses is {list(doses)!r}; give at least two finite numbers besides 1.")
    if options.get("episodes") is not None:
        units = options.pop("episodes")
    # Refuses what does not fit the model before anything runs.
    readout = readout_of(model, what, task=task, units=units, choosing=choosing, seed=seed, **options)
    require_writable(*(local_path(out, "out") / f"steering.{kind}" for kind in ("html", "csv", "json")))
    search = _Search(model, local_path(out, "out"), readout, grid, seed, workers)
    with reporting(progress) as tell:
        result = search.run(candidates, tell)
    facts = {"model": name, "model_id": readout.task.identity(model)[1], "command": command}
    result = replace(result, numbers={**facts, **result.numbers})
    write_steering(result, out)
    return result


class _Arm(NamedTuple):
    """One dose: the readout's units, and what must not get worse, larger for worse."""

    found: Evaluation
    harm: NDArray[np.float64]


@dataclass
class _Search:
    """A search for a steering direction, and what it runs with."""

    model: Any
    out: Path
    readout: Readout
    doses: list[float]
    seed: int
    workers: int | None

    def run(self, count: int, tell: ProgressCallback) -> SteeringResult:
        readout, terms = self.readout, self.readout.task.terms
        numbers: dict[str, Any] = {
            **{name: value for name, value in terms.setting.items() if isinstance(value, str)},
            "doses": self.doses, "units": len(readout.report), "choosing_units": len(readout.choose),
            "seed": self.seed, "outcome": terms.outcome_name, "harm": readout.harm, "least": readout.least,
            "rise_limit": readout.rise, "lasting_unit": terms.units,
        }  # fmt: skip
        if terms.failure is not None and readout.guard is None:
            numbers |= {"failure_rule": terms.failure_rule, "failure_guessed": bool(terms.failure_note)}
        point: float | None = None
        if readout.points:
            at, curve, means = self._curve(tell)
            extent = max(means.values()) - min(means.values())
            p = _differ(np.array([found.outcomes for found in at.values()]), self.seed)
            numbers |= {"range": extent, "range_p_value": p}
            if p >= ALPHA:
                sentence = (
                    f"The {readout.point} makes no clear difference to the {terms.outcome_name} ({extent:+,.1f} "
                    f"between the best and the worst, p = {p:.2g}), so there is no curve to move along."
                )
                empty = pd.DataFrame(), pd.DataFrame(), pd.DataFrame()
                return SteeringResult("not applicable", sentence, None, curve, *empty, numbers)
            middle = (max(means.values()) + min(means.values())) / 2
            point = min(means, key=lambda place: abs(means[place] - middle))
            numbers[f"operating_{readout.point}"] = point
            plain, bounds = at[point], (min(means.values()), max(means.values()))
        else:
            tell("running the unedited model", 0.0)
            plain, extent, bounds = self._evaluate(None, None, readout.choose), 1.0, (-math.inf, math.inf)
            curve = pd.DataFrame([_row(_Arm(plain, self._harm(None, plain)), self.readout)])
            if math.isnan(readout.least):
                self.readout = replace(readout, least=0.1 * abs(plain.mean))
                numbers["least"] = self.readout.least
        tried = self._choose(_Arm(plain, self._harm(None, plain)), bounds, point, count, tell)
        # The steepest of those that are not set aside; if all are, the one with the smallest rise.
        order = tried.assign(steep=-tried["slope"].abs()).sort_values(
            ["set_aside", "steep"] if not tried["set_aside"].all() else [rise_column(self.readout), "steep"],
            kind="stable",
        )
        chosen = order.to_dict("records")[0]
        direction = Candidate(*(chosen[name] for name in Candidate._fields))
        sign = 1.0 if chosen["slope"] >= 0 else -1.0
        numbers |= {"slope_when_chosen": float(chosen["slope"]), "set_aside_when_chosen": bool(chosen["set_aside"])}
        table, arms, found = self._report(direction, point, extent, sign, tell)
        randoms, more = self._randoms(direction, point, extent, arms, tell)
        found |= more
        verdict, sentence = _verdict(direction, found, extent, self.readout)
        if readout.guard is None and terms.failure_note:
            sentence += f" Failed {terms.units} ({terms.failure_rule}): {terms.failure_note}."
        if readout.guard is None and terms.failure is None:
            sentence += (
                f" Failing has no meaning in this task, so that nothing was watched beside the {terms.outcome_name}."
            )
        return SteeringResult(verdict, sentence, direction, curve, tried, table, randoms, {**numbers, **found})

    def _curve(self, tell: ProgressCallback) -> tuple[dict[float, Evaluation], pd.DataFrame, dict[float, float]]:
        """The unedited model at every point."""
        readout, at = self.readout, dict[float, Evaluation]()
        tell("running the curve", 0.0)
        for number, place in enumerate(readout.points):
            at[place] = self._evaluate(None, place, readout.choose)
            tell("running the curve", 0.1 * (number + 1) / len(readout.points))
        rows = [
            {readout.point: place, **_row(_Arm(found, self._harm(None, found)), readout)} for place, found in at.items()
        ]
        return at, pd.DataFrame(rows), {place: found.mean for place, found in at.items()}

    def _evaluate(self, edit: Edit | None, point: float | None, units: range) -> Evaluation:
        task = self.readout.task if point is None else self.readout.points[point]
        return Trials(self.model, task, self.out / "arms", self.workers).run(units, edit)

    def _harm(self, edit: Edit | None, arm: Evaluation) -> NDArray[np.float64]:
        """What must not get worse, for each unit of ``arm`` or of the guard; larger is worse."""
        guard = self.readout.guard
        if guard is None:
            return arm.failed.astype(np.float64)
        found = Trials(self.model, guard, self.out / "arms", self.workers).run(self.readout.guarded, edit)
        return np.asarray(-found.terms.sign * found.outcomes)

    def _arm(self, edit: Edit, point: float | None, units: range) -> _Arm:
        found = self._evaluate(edit, point, units)
        return _Arm(found, self._harm(edit, found))

    def _choose(
        self, plain: _Arm, bounds: tuple[float, float], point: float | None, count: int, tell: ProgressCallback
    ) -> pd.DataFrame:
        readout, rows = self.readout, []
        found = candidates_of(self.model, count, readout.matching, readout.kinds)
        floor, ceiling = bounds
        slack = readout.least * (ceiling - floor) if readout.points else 0.0
        for number, candidate in enumerate(found):
            arms = {1.0: plain}
            for place, dose in enumerate(self.doses):
                tell(
                    f"choosing  {candidate.name}",
                    0.1 + 0.5 * (number + place / len(self.doses)) / len(found),
                )
                arms[dose] = self._arm(dosed(self.model, candidate, dose), point, readout.choose)
            rise = max(float(arms[dose].harm.mean() - plain.harm.mean()) for dose in self.doses)
            off = bool(readout.points) and any(
                not floor - slack <= arm.found.mean <= ceiling + slack for arm in arms.values()
            )
            rows.append(
                {
                    **candidate._asdict(),
                    "slope": float(slopes({dose: arm.found for dose, arm in arms.items()}).mean()),
                    "lowest": min(arm.found.mean for arm in arms.values()),
                    "highest": max(arm.found.mean for arm in arms.values()),
                    rise_column(readout): rise,
                    "set_aside": rise > readout.rise or off,
                }
            )
        return pd.DataFrame(rows)

    def _report(
        self, direction: Candidate, point: float | None, extent: float, sign: float, tell: ProgressCallback
    ) -> tuple[pd.DataFrame, dict[float, _Arm], dict[str, Any]]:
        readout = self.readout
        unedited = self._evaluate(None, point, readout.report)
        plain = _Arm(unedited, self._harm(None, unedited))
        arms = {1.0: plain}
        for done, dose in enumerate(self.doses):
            tell("reporting on fresh units", 0.5 + 0.2 * (done + 1) / (len(self.doses) + 1))
            arms[dose] = self._arm(dosed(self.model, direction, dose), point, readout.report)
        table = pd.DataFrame([{"dose": dose, **_row(arms[dose], readout)} for dose in sorted(arms)])
        slope = slopes({dose: arm.found for dose, arm in arms.items()})
        reach = slope * (max(arms) - min(arms)) / extent * sign
        if readout.guard is None:
            rise = np.mean([arms[dose].harm for dose in self.doses], axis=0) - plain.harm
        else:  # at the worst dose: what rises at one end and falls at the other would cancel
            rise = max((arms[dose].harm for dose in self.doses), key=np.mean) - plain.harm
        found: dict[str, Any] = {"p_value": sign_flip(reach)}
        for name, values in (("reach", reach), ("rise", rise)):
            found[name] = float(values.mean())
            found[f"{name}_interval"] = list(bootstrap_interval(values))
            found[f"{name}_note"] = interval_note(values, "differences")
        return table, arms, found

    def _randoms(
        self,
        direction: Candidate,
        point: float | None,
        extent: float,
        arms: Mapping[float, _Arm],
        tell: ProgressCallback,
    ) -> tuple[pd.DataFrame, dict[str, Any]]:
        """How far random directions reach in place of the chosen one, on either side, from the two outermost doses."""
        readout, ends = self.readout, (min(self.doses), max(self.doses))
        svd, inputs, few = WeightSVD(self.model), self._inputs(point, tell), readout.report[: readout.few]
        # A guard has units of its own, all of which every arm runs.
        own = slice(0, len(few)) if readout.guard is None else slice(None)

        def row(side: str, seed: int | None, scale: float, *pair: _Arm) -> dict[str, Any]:
            low, high = (float(arm.found.outcomes[: len(few)].mean()) for arm in pair)
            rise = max(float(arm.harm[own].mean() - arms[1.0].harm[own].mean()) for arm in pair)
            place = {"side": side, "seed": seed, "scale": scale, "lowest": low, "highest": high}
            return place | {"reach": (high - low) / extent, rise_column(readout): rise}

        def run(side: SideName, seed: int | None, scale: float) -> dict[str, Any]:
            edits = (dosed(self.model, direction, dose, seed, scale, side, svd) for dose in ends)
            return row(side, seed, scale, *(self._arm(edit, point, few) for edit in edits))

        first, put = first_side(self.model, direction), put_side(self.model, direction)
        rows = []
        for half, side in enumerate((first, put)):
            # A dose on a circuit's write side changes another weight, and the bias passes through it: it is run anew.
            rows.append(row(side, None, 1.0, *(arms[dose] for dose in ends)) if side == first else run(side, None, 1.0))
            for number in range(RANDOM):
                share = 0.7 + 0.15 * (half + number / RANDOM)
                tell(f"random directions, {side} side  {number + 1} of {RANDOM}", share)
                seed = self.seed + number
                if side == "write":  # its output energy is the direction's own; how strongly it is read is matched
                    scale = gain_scale(self.model, direction, seed, svd)
                else:
                    scale = output_energy_scale(self.model, direction, seed, inputs, side, svd)
                rows.append(run(side, seed, scale))
        table = pd.DataFrame(rows)
        table["seed"] = table["seed"].astype("Int64")
        found: dict[str, Any] = {"random_directions": RANDOM, "put_side": put, "first_side": first}
        for name, side in (("read", first), ("put", put)):
            of_side = table[table["side"] == side].reset_index(drop=True)
            size, ours = of_side["reach"].abs()[1:], abs(float(of_side["reach"][0]))
            # A random direction that reaches as far at the cost of what must not get worse does not count.
            as_far = int(((size >= ours) & (of_side[rise_column(readout)][1:] <= readout.rise)).sum())
            found |= {f"{name}_as_far": as_far, f"{name}_p_value": (1 + as_far) / (1 + RANDOM)}
            found[f"{name}_median"] = float(size.median())
        return table, found

    def _inputs(self, point: float | None, tell: ProgressCallback) -> Activations:
        """What the matrices read while the unedited model runs in the guard, or at the operating point."""
        task = self.readout.guard or (self.readout.task if point is None else self.readout.points[point])
        file = self.out / "activations.safetensors"
        return kept_activations(self.model, file, task, self.seed, lambda what, _: tell(what, 0.7))


def rise_column(readout: Readout) -> str:
    """The column of what must not rise."""
    return "failure_rise" if readout.guard is None else "guard_rise"


def _differ(outcomes: NDArray[np.float64], seed: int, draws: int = 9999) -> float:
    """Test whether a setting makes a difference: p of the range of mean outcomes, ``[point, unit]``, paired.

    Each unit's outcomes are permuted over the points; best and worst are picked anew in every permutation.
    """
    rng, range_of = np.random.default_rng(seed), np.ptp(outcomes.mean(1))
    drawn = np.array([np.ptp(rng.permuted(outcomes, axis=0).mean(1)) for _ in range(draws)])
    return (1 + int((drawn >= range_of * (1 - 1e-12)).sum())) / (1 + draws)


def _row(arm: _Arm, readout: Readout) -> dict[str, Any]:
    found, n = arm.found, len(arm.found)
    low, high = bootstrap_interval(found.outcomes)
    row: dict[str, Any] = {"mean": found.mean, "mean_low": low, "mean_high": high}
    if readout.guard is not None:
        low, high = bootstrap_interval(arm.harm)
        return row | {"guard": float(arm.harm.mean()), "guard_low": low, "guard_high": high, found.terms.units: n}
    failures = int(found.failed.sum())
    rate = wilson(failures, n)
    row |= {"failure_rate": failures / n, "failure_rate_low": rate.low, "failure_rate_high": rate.high}
    return row | {found.terms.units: n}


def _verdict(direction: Candidate, found: Mapping[str, Any], extent: float, readout: Readout) -> tuple[Verdict, str]:
    terms = readout.task.terms
    reach, rise = (Interval(*found[f"{name}_interval"]) for name in ("reach", "rise"))
    verdict: Verdict = "undecided"
    which = ""
    # What is the same in every unit, mostly 0, has no interval: against a margin the value itself counts.
    reach_high, rise_high = (
        found[name] if math.isnan(interval.high) else interval.high
        for name, interval in (("reach", reach), ("rise", rise))
    )
    first = DOES[found["first_side"]]
    if reach_high < readout.least:
        verdict = "none found"
    elif reach.low > 0 and rise_high > readout.rise:
        verdict = "moves the return by failing" if readout.guard is None else "moves it at the cost of the guard"
    elif reach.low > 0:
        own_p = tuple(found[f"{side}_p_value"] <= ALPHA for side in ("read", "put"))
        verdict = "found" if all(own_p) else "no more than random"
        which = EXCHANGED.get(own_p, "").format(first=first)
    share, harmless = bool(readout.points), "without failing" if readout.guard is None else "without that cost"
    moved = _said(found["reach"], reach, share, terms.in_scale)
    risen = _said(found["rise"], rise, readout.guard is None, "" if readout.guard is None else _scale(readout))
    if found["reach"] < 0:
        moved += " (against the sign that it had when it was chosen)"
    of_range = f" of the curve's range of {extent:,.{places(extent)}f}" if share else ""
    rises = "failures rise" if readout.guard is None else f"the {readout.harm} rises"
    sentence = (
        f"The best candidate was {direction.name} ({direction.why}). On fresh {_fresh(readout)} its doses move the "
        f"{terms.outcome_name} by {moved}{of_range}, and {rises} by {risen}; of {found['random_directions']} random "
        f"directions of the same output energy, {found['read_as_far']} move it as far {harmless} in place of what it "
        f"{first}, and {found['put_as_far']} in place of what it {DOES[found['put_side']]}"
        f"{GAIN if found['put_side'] == 'write' else ''}: {verdict}{which}."
    )
    return verdict, sentence


def _fresh(readout: Readout) -> str:
    terms = readout.task.terms
    return "seeds" if terms.index == "seed" else terms.units


def _scale(readout: Readout) -> str:
    assert readout.guard is not None
    return readout.guard.terms.in_scale


def _said(value: float, interval: Interval, share: bool, scale: str) -> str:
    """A number with its interval: a percentage, or in its own units."""
    if share:
        return f"{100 * value:+.0f} % {span(interval, percent=True, digits=0, sign=True)}"
    return f"{value:+.3f}{scale} {span(interval, digits=3, sign=True)}"
