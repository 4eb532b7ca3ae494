"""``steer``: find a singular direction whose dose moves a readout; the rules are in ``docs/steering_registered.md``.

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
from dt_lens.behaviour.readout import Readout
from dt_lens.behaviour.readouts import readout_of
from dt_lens.behaviour.task import Task
from dt_lens.edits.edit import Edit
from dt_lens.errors import DtLensError, a_type
from dt_lens.lens.activations import Activations
from dt_lens.lens.matrices import SideName
from dt_lens.progress import ProgressCallback, reporting, stage
from dt_lens.statistics.outcomes import bootstrap_interval, interval_note, sign_flip, wilson
from dt_lens.study.steering.doses import (
    Candidate,
    candidates_of,
    dosed,
    downstream_gain,
    first_side,
    gain_scale,
    given_candidates,
    output_energy_scale,
    put_side,
    slopes,
)
from dt_lens.study.steering.page import write_steering
from dt_lens.study.steering.result import SteeringResult
from dt_lens.study.steering.verdict import ALPHA, verdict_of
from dt_lens.study.trials import Trials
from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["DOSES", "Candidate", "steer"]

DOSES = (0.0, 0.5, 1.5, 2.0)
RANDOM = 19  # random directions on either side: p = 0.05 if none of them reaches as far


def steer(
    model: Any,
    out: str | Path,
    what: Any = None,
    *,
    name: str = "the model",
    task: Task | None = None,
    units: int | None = None,
    choosing: int | None = None,
    candidates: int | None = None,
    edits: Sequence[Edit] | None = None,
    readout: Readout | None = None,
    doses: Sequence[float] = DOSES,
    seed: int = 0,
    workers: int | None = None,
    command: str = "",
    progress: bool | ProgressCallback | None = None,
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
        candidates: how many directions are tried; 8 by default.
        edits: edits, not in force, whose directions are tried in their place, each by itself; the dose takes the place
            of their value. An edit's side is the one on which it is dosed.
        readout: what is moved and by which rules, made by ``of_task`` or by hand, in place of ``what``, ``task``,
            ``units``, ``choosing`` and ``options``.
        doses: what sigma is multiplied by; 1 is the unedited model, which is always included.
        seed: of the first unit while choosing, where units have seeds, and of the first random direction; the report
            begins 1,000 later.
        workers: worker processes, where the task can use any.
        command: the command line that repeats this, for the page.
        progress: ``True`` for a bar, ``False`` for none, or a function of (what is being done, share done); by
            default a bar in a notebook and none elsewhere.
        options: ``targets`` of an agent's curve, in the environment's units, the model's own by default; ``prompts``
            and ``answers`` of a language model (see ``PromptTask.of``); and what else ``evaluate`` takes to say what is
            run, such as ``max_steps``, ``failure`` or ``context``.

    Raises:
        DtLensError: if an argument is out of range, or does not fit the model.
        KeyboardInterrupt: on Ctrl-C; finished evaluations are kept.
    """
    if edits is not None and candidates is not None:
        raise DtLensError("edits are the candidates; leave out candidates.")
    count = 8 if candidates is None else candidates
    for said, value, least in (("candidates", count, 1), ("seed", seed, 0)):
        whole_number(value, said, least)
    grid = sorted(set(finite_numbers(doses, "doses")) - {1.0})
    if len(grid) < 2:
        raise DtLensError(f"doses is {list(doses)!r}; give at least two finite numbers besides 1.")
    if options.get("episodes") is not None:
        units = options.pop("episodes")
    # Refuses what does not fit the model before anything runs.
    asked = {"what": what, "task": task, "units": units, "choosing": choosing, **options}
    if readout is None:
        readout = readout_of(model, seed=seed, **asked)
    else:
        _require_alone(readout, asked)
    tried = None if edits is None else given_candidates(model, edits, readout.matching)
    require_writable(*(local_path(out, "out") / f"steering.{kind}" for kind in ("html", "csv", "json")))
    search = _Search(model, local_path(out, "out"), readout, grid, seed, workers)
    with reporting(progress) as tell:
        result = search.run(count, tell, tried)
    facts = {"model": name, "model_id": readout.task.identity(model)[1], "command": command}
    result = replace(result, numbers={**facts, **result.numbers})
    write_steering(result, out)
    return result


def _require_alone(readout: Readout, asked: Mapping[str, Any]) -> None:
    """Raise ``DtLensError`` unless ``readout`` is one, and nothing that it says was given beside it."""
    if not isinstance(readout, Readout):
        raise DtLensError(f"readout is {a_type(readout)}; it must be a Readout, as dt_lens.behaviour.readout has it.")
    beside = [name for name, value in asked.items() if value is not None]
    if beside:
        raise DtLensError(f"readout says what is moved and over which units; leave out {', '.join(beside)}.")


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

    def run(self, count: int, tell: ProgressCallback, given: Sequence[Candidate] | None = None) -> SteeringResult:
        """The search among ``given`` candidates, or ``count`` that are found by rule."""
        readout, terms = self.readout, self.readout.task.terms
        numbers: dict[str, Any] = {
            **{name: value for name, value in terms.setting.items() if isinstance(value, str)},
            "doses": self.doses, "units": len(readout.report), "choosing_units": len(readout.choose),
            "seed": self.seed, "outcome": terms.outcome_name, "harm": readout.harm, "least": readout.least,
            "rise_limit": readout.rise, "lasting_unit": terms.units, "actor": terms.actor, "place": terms.place,
            "scale": terms.scale, "harm_scale": "" if readout.guard is None else readout.guard.terms.scale,
            "random_units": readout.few,
            **({"point": readout.point} if readout.points else {}),
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
                self.readout = readout = replace(readout, least=_a_tenth_of(plain))
                numbers["least"] = readout.least
        found = list(given or candidates_of(self.model, count, readout.matching, readout.kinds, readout.across))
        tried = self._choose(found, _Arm(plain, self._harm(None, plain)), bounds, point, tell)
        # The steepest of those that are not set aside; if all are, the one with the smallest rise.
        order = tried.assign(steep=-tried["slope"].abs()).sort_values(
            ["set_aside", "steep"] if not tried["set_aside"].all() else [rise_column(self.readout), "steep"],
            kind="stable",
        )
        chosen = order.iloc[0]
        direction = found[int(order.index[0])]
        sign = 1.0 if chosen["slope"] >= 0 else -1.0
        numbers |= {"slope_when_chosen": float(chosen["slope"]), "set_aside_when_chosen": bool(chosen["set_aside"])}
        numbers |= {"candidates": len(found), "given": given is not None}
        table, arms, reached = self._report(direction, point, extent, sign, tell)
        randoms, more = self._randoms(direction, point, extent, arms, tell)
        reached |= more
        verdict, sentence = verdict_of(direction, reached, extent, self.readout, len(found))
        if readout.guard is None and terms.failure_note:
            sentence += f" Failed {terms.units} ({terms.failure_rule}): {terms.failure_note}."
        tables = [curve, tried, table, randoms]
        if not readout.watches:
            sentence += (
                f" Failing has no meaning in this task, so that nothing was watched beside the {terms.outcome_name}."
            )
            tables = [frame[[name for name in frame if not str(name).startswith("failure_")]] for frame in tables]
            reached = {name: value for name, value in reached.items() if not name.startswith("rise")}
        curve, tried, table, randoms = tables
        return SteeringResult(verdict, sentence, direction, curve, tried, table, randoms, {**numbers, **reached})

    def _curve(self, tell: ProgressCallback) -> tuple[dict[float, Evaluation], pd.DataFrame, dict[float, float]]:
        """The unedited model at every point."""
        readout, at = self.readout, dict[float, Evaluation]()
        tell("running the curve", 0.0)
        for number, place in enumerate(readout.points):
            at[place] = self._evaluate(None, place, readout.choose)
            tell(f"running the curve  {number + 1} of {len(readout.points)}", 0.1 * (number + 1) / len(readout.points))
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
        self,
        found: Sequence[Candidate],
        plain: _Arm,
        bounds: tuple[float, float],
        point: float | None,
        tell: ProgressCallback,
    ) -> pd.DataFrame:
        """A row per candidate, in their order."""
        readout, rows = self.readout, []
        floor, ceiling = bounds
        slack = readout.least * (ceiling - floor) if readout.points else 0.0
        for number, candidate in enumerate(found):
            arms = {1.0: plain}
            for place, dose in enumerate(self.doses):
                tell(
                    f"choosing  {candidate.name}",
                    0.1 + 0.4 * (number + place / len(self.doses)) / len(found),
                )
                arms[dose] = self._arm(dosed(self.model, candidate, dose), point, readout.choose)
            rise = max(float(arms[dose].harm.mean() - plain.harm.mean()) for dose in self.doses)
            off = bool(readout.points) and any(
                not floor - slack <= arm.found.mean <= ceiling + slack for arm in arms.values()
            )
            rows.append(
                {
                    **{name: value for name, value in candidate._asdict().items() if value is not None},
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
            tell(f"reporting on fresh units  dose {dose:g}", 0.5 + 0.2 * (done + 1) / (len(self.doses) + 1))
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
        own_side = direction.side or first
        rows = []
        for half, side in enumerate((first, put)):
            # A dose on a circuit's other side changes another weight, and the bias passes through it: it is run anew.
            same = side == own_side
            rows.append(row(side, None, 1.0, *(arms[dose] for dose in ends)) if same else run(side, None, 1.0))
            for number in range(RANDOM):
                share = 0.72 + 0.14 * (half + number / RANDOM)
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
        found["put_matched"] = "output energy"
        if put == "write":
            own_direction = svd[direction.matrix]
            gain = downstream_gain(self.model, own_direction.matrix, own_direction.side("write")[direction.sv])
            found["put_matched"] = "downstream gain" if gain > 0 else "length"
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
        return kept_activations(self.model, file, task, self.seed, stage(tell, 0.7, 0.72))


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


def _a_tenth_of(plain: Evaluation) -> float:
    """The smallest reach of interest of a task that does not say what is large.

    Raises:
        DtLensError: if the mean outcome cannot be told from 0: a tenth of it says nothing.
    """
    size = plain.mean_size()
    if math.isnan(size):
        name = plain.terms.outcome_name
        raise DtLensError(
            f"The unedited mean {name} is {plain.mean:.3g} and cannot be told from 0, so that a tenth of it is no "
            f"smallest effect of interest; say in the task's terms what counts as large: Terms(large=...), in units of "
            f"the {name}."
        )
    return 0.1 * size
