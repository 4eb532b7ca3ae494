"""``steer``: find a singular direction whose dose moves the return; the rules are in ``docs/steering.md``.

The direction is chosen on one set of seeds and reported on another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dt_lens.arguments import finite_numbers, local_path, require_writable, whole_number
from dt_lens.behaviour.agents.evaluation import AgentEvaluation
from dt_lens.behaviour.agents.identity import model_id
from dt_lens.behaviour.agents.task import AgentTask
from dt_lens.behaviour.collect_activations import kept_activations
from dt_lens.behaviour.printing import places, span
from dt_lens.behaviour.terms import FailureRule
from dt_lens.edits.edit import Edit
from dt_lens.errors import DtLensError
from dt_lens.lens.activations import Activations
from dt_lens.lens.matrices import SideName
from dt_lens.lens.protocol import require_agent
from dt_lens.progress import ProgressCallback, reporting
from dt_lens.statistics.outcomes import Interval, bootstrap_interval, interval_note, sign_flip, wilson
from dt_lens.study.steering.doses import (
    DOES,
    Candidate,
    candidates_of,
    dosed,
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
FRESH = 1000  # the report's seeds begin this far after those of the choice
REACH = 0.1  # the smallest reach of interest, a share of the curve's range
RISE = 0.1  # the largest rise in failures that is accepted
RANDOM = 19  # random directions on either side: p = 0.05 if none of them reaches as far
# What "no more than random" adds, by whether the direction beats random ones (on its read side, on the other).
EXCHANGED = {
    (False, True): " in what it reads, and more in where it puts that",
    (True, False): " in where it puts what it reads, and more in what that is",
}
GAIN = " (these of the same downstream gain instead)"
ALPHA = 0.05


def steer(
    model: Any,
    out: str | Path,
    *,
    name: str = "the model",
    episodes: int = 40,
    choosing: int = 8,
    candidates: int = 8,
    doses: Sequence[float] = DOSES,
    targets: Sequence[float] | None = None,
    seed: int = 0,
    environment: str | None = None,
    max_steps: int | None = None,
    failure: FailureRule | None = None,
    workers: int | None = None,
    command: str = "",
    progress: bool | ProgressCallback = False,
) -> SteeringResult:
    """Find the direction whose dose best moves the return along the target-return curve; report it on fresh seeds.

    Every finished evaluation is kept below ``out``; called again after an interruption, the search resumes.

    Args:
        model: a ``HookedDecisionTransformer`` whose environment runs here, with at least two target returns.
        out: the folder for the evaluations, ``steering.html``, ``steering.csv`` and ``steering.json``.
        name: what the page calls the model.
        episodes: per dose, on fresh seeds, for the report.
        choosing: episodes per dose while choosing, per target, and per random direction.
        candidates: how many directions are tried.
        doses: what sigma is multiplied by; 1 is the unedited agent, which is always included.
        targets: of the curve, in the environment's units; the model's own by default.
        seed: of the first episode while choosing, and of the first random direction; the report begins 1,000 later.
        environment, max_steps, failure, workers: as for ``evaluate``.
        command: the command line that repeats this, for the page.
        progress: ``True`` for a bar on standard error, or a function of (what is being done, share done).

    Raises:
        DtLensError: if an argument is out of range, or the model's environment does not run here.
        KeyboardInterrupt: on Ctrl-C; finished evaluations are kept.
    """
    require_agent(model, "steer")
    for what, value, least in (
        ("episodes", episodes, 2), ("choosing", choosing, 2), ("candidates", candidates, 1), ("seed", seed, 0),
    ):  # fmt: skip
        whole_number(value, what, least)
    if choosing > FRESH:
        raise DtLensError(f"choosing is {choosing}; it must be at most {FRESH}, where the fresh seeds begin.")
    grid = sorted(set(finite_numbers(doses, "doses")) - {1.0})
    if len(grid) < 2:
        raise DtLensError(f"doses is {list(doses)!r}; give at least two finite numbers besides 1.")
    wanted = finite_numbers(model.facts.target_returns if targets is None else targets, "targets")
    if len(set(wanted)) < 2:
        raise DtLensError(
            f"There are {len(set(wanted))} target returns; a curve needs at least two: give targets, in the "
            "environment's units."
        )
    require_writable(*(local_path(out, "out") / f"steering.{kind}" for kind in ("html", "csv", "json")))
    # Refuses a bad environment or target before any episode.
    task = AgentTask.of(
        model, environment, target_return=wanted[0], max_steps=max_steps, failure=failure, caller="steer"
    )
    search = _Search(model, local_path(out, "out"), task, sorted(set(wanted)), grid, seed, workers)
    with reporting(progress) as tell:
        result = search.run(episodes, choosing, candidates, tell)
    facts = {"model": name, "model_id": model_id(model), "command": command}
    result = SteeringResult(**{**result.__dict__, "numbers": {**facts, **result.numbers}})
    write_steering(result, out)
    return result


@dataclass
class _Search:
    """A search for a steering direction, and what it runs with."""

    model: Any
    out: Path
    task: AgentTask
    targets: list[float]
    doses: list[float]
    seed: int
    workers: int | None

    def run(self, episodes: int, choosing: int, count: int, tell: ProgressCallback) -> SteeringResult:
        tell("running the curve", 0.0)
        at = {}
        for number, target in enumerate(self.targets):
            at[target] = self._evaluate(None, target, choosing, self.seed)
            tell("running the curve", 0.1 * (number + 1) / len(self.targets))
        means = {target: found.mean for target, found in at.items()}
        worst, best = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        extent = means[best] - means[worst]
        curve = pd.DataFrame([{"target": target, **_row(found)} for target, found in at.items()])
        p = _differ(np.array([found.returns for found in at.values()]), self.seed)
        numbers: dict[str, Any] = {
            "environment": at[best].environment, "range": extent, "range_p_value": p, "doses": self.doses,
            "failure_rule": at[best].failure_rule, "failure_guessed": at[best].failure_guessed,
            "episodes": episodes, "choosing_episodes": choosing, "seed": self.seed,
        }  # fmt: skip
        if p >= ALPHA:
            sentence = (
                f"The target makes no clear difference to the return ({extent:+,.1f} between the best and the worst, "
                f"p = {p:.2g}), so there is no curve to move along."
            )
            empty = pd.DataFrame(), pd.DataFrame(), pd.DataFrame()
            return SteeringResult("not applicable", sentence, None, curve, *empty, numbers)
        target = min(means, key=lambda t: abs(means[t] - (means[best] + means[worst]) / 2))
        tried = self._choose(at[target], means, target, choosing, count, tell)
        # The steepest of those that are not set aside; if all are, the one with the smallest rise in failures.
        order = tried.assign(steep=-tried["slope"].abs()).sort_values(
            ["set_aside", "steep"] if not tried["set_aside"].all() else ["failure_rise", "steep"], kind="stable"
        )
        chosen = order.to_dict("records")[0]
        direction = Candidate(*(chosen[name] for name in Candidate._fields))
        sign = 1.0 if chosen["slope"] >= 0 else -1.0
        numbers |= {"operating_target": target, "slope_when_chosen": float(chosen["slope"])}
        numbers["set_aside_when_chosen"] = bool(chosen["set_aside"])
        table, arms, found = self._report(direction, target, extent, sign, episodes, tell)
        randoms, more = self._randoms(direction, target, extent, arms, choosing, tell)
        found |= more
        verdict, sentence = _verdict(direction, found, extent)
        if at[best].failure_guessed:
            sentence += f" Failed episodes ({at[best].failure_rule}): {at[best].failure_note}."
        return SteeringResult(verdict, sentence, direction, curve, tried, table, randoms, {**numbers, **found})

    def _evaluate(self, edit: Edit | None, target: float, episodes: int, seed: int) -> AgentEvaluation:
        task = self.task.at(target)
        found = Trials(self.model, task, self.out / "arms", self.workers).run(task.units(episodes, seed), edit)
        assert isinstance(found, AgentEvaluation)
        return found

    def _choose(
        self,
        plain: AgentEvaluation,
        means: Mapping[float, float],
        target: float,
        episodes: int,
        count: int,
        tell: ProgressCallback,
    ) -> pd.DataFrame:
        rows, found = [], candidates_of(self.model, count)
        floor, ceiling = min(means.values()), max(means.values())
        slack = REACH * (ceiling - floor)
        for number, candidate in enumerate(found):
            arms = {1.0: plain}
            for place, dose in enumerate(self.doses):
                tell(
                    f"choosing  {candidate.name}",
                    0.1 + 0.5 * (number + place / len(self.doses)) / len(found),
                )
                edit = dosed(self.model, candidate, dose)
                arms[dose] = self._evaluate(edit, target, episodes, self.seed)
            base = plain.failed.mean()
            rise = max(float(arms[dose].failed.mean() - base) for dose in self.doses)
            off = any(not floor - slack <= arm.mean <= ceiling + slack for arm in arms.values())
            rows.append(
                {
                    **candidate._asdict(),
                    "slope": float(slopes(arms).mean()),
                    "lowest": min(arm.mean for arm in arms.values()),
                    "highest": max(arm.mean for arm in arms.values()),
                    "failure_rise": rise,
                    "set_aside": rise > RISE or off,
                }
            )
        return pd.DataFrame(rows)

    def _report(
        self, direction: Candidate, target: float, extent: float, sign: float, episodes: int, tell: ProgressCallback
    ) -> tuple[pd.DataFrame, dict[float, AgentEvaluation], dict[str, Any]]:
        start = self.seed + FRESH
        plain = self._evaluate(None, target, episodes, start)
        arms = {1.0: plain}
        for done, dose in enumerate(self.doses):
            tell("reporting on fresh seeds", 0.5 + 0.2 * (done + 1) / (len(self.doses) + 1))
            arms[dose] = self._evaluate(dosed(self.model, direction, dose), target, episodes, start)
        table = pd.DataFrame([{"dose": dose, **_row(arms[dose])} for dose in sorted(arms)])
        reach = slopes(arms) * (max(arms) - min(arms)) / extent * sign
        rise = np.mean([arms[dose].failed for dose in self.doses], axis=0) - plain.failed
        found: dict[str, Any] = {"p_value": sign_flip(reach)}
        for name, values in (("reach", reach), ("rise", rise)):
            found[name] = float(values.mean())
            found[f"{name}_interval"] = list(bootstrap_interval(values))
            found[f"{name}_note"] = interval_note(values, "differences")
        return table, arms, found

    def _randoms(
        self,
        direction: Candidate,
        target: float,
        extent: float,
        arms: Mapping[float, AgentEvaluation],
        episodes: int,
        tell: ProgressCallback,
    ) -> tuple[pd.DataFrame, dict[str, Any]]:
        """How far random directions reach in place of the chosen one, on either side, from the two outermost doses."""
        ends, start = (min(self.doses), max(self.doses)), self.seed + FRESH
        svd, inputs, few = WeightSVD(self.model), self._inputs(target, tell), slice(0, min(episodes, len(arms[1.0])))

        def row(
            side: str, seed: int | None, scale: float, one: AgentEvaluation, other: AgentEvaluation
        ) -> dict[str, Any]:
            low, high = (float(found.returns[few].mean()) for found in (one, other))
            rise = max(float(found.failed[few].mean() - arms[1.0].failed[few].mean()) for found in (one, other))
            place = {"side": side, "seed": seed, "scale": scale, "lowest": low, "highest": high}
            return place | {"reach": (high - low) / extent, "failure_rise": rise}

        def run(side: SideName, seed: int | None, scale: float) -> dict[str, Any]:
            edits = (dosed(self.model, direction, dose, seed, scale, side, svd) for dose in ends)
            return row(side, seed, scale, *(self._evaluate(edit, target, few.stop, start) for edit in edits))

        put = put_side(self.model, direction)
        rows = []
        for half, side in enumerate(("read", put)):
            # A dose on a circuit's write side changes another weight, and the bias passes through it: it is run anew.
            own = row(side, None, 1.0, *(arms[dose] for dose in ends)) if side == "read" else run(side, None, 1.0)
            rows.append(own)
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
        found: dict[str, Any] = {"random_directions": RANDOM, "put_side": put}
        for name, side in (("read", "read"), ("put", put)):
            of_side = table[table["side"] == side].reset_index(drop=True)
            size, ours = of_side["reach"].abs()[1:], abs(float(of_side["reach"][0]))
            # A random direction that moves the return by failing does not count.
            as_far = int(((size >= ours) & (of_side["failure_rise"][1:] <= RISE)).sum())
            found |= {f"{name}_as_far": as_far, f"{name}_p_value": (1 + as_far) / (1 + RANDOM)}
            found[f"{name}_median"] = float(size.median())
        return table, found

    def _inputs(self, target: float, tell: ProgressCallback) -> Activations:
        """What the matrices read while the unedited agent plays at the operating target."""
        file = self.out / "activations.safetensors"
        return kept_activations(self.model, file, self.task.at(target), self.seed, lambda what, _: tell(what, 0.7))


def _differ(returns: NDArray[np.float64], seed: int, draws: int = 9999) -> float:
    """Test whether the target makes a difference: p of the range of mean returns, ``[target, episode]``, paired.

    Each episode's returns are permuted over the targets; best and worst are picked anew in every permutation.
    """
    rng, range_of = np.random.default_rng(seed), np.ptp(returns.mean(1))
    drawn = np.array([np.ptp(rng.permuted(returns, axis=0).mean(1)) for _ in range(draws)])
    return (1 + int((drawn >= range_of * (1 - 1e-12)).sum())) / (1 + draws)


def _row(found: AgentEvaluation) -> dict[str, Any]:
    failures = int(found.failed.sum())
    low, high = bootstrap_interval(found.returns)
    rate = wilson(failures, len(found))
    return {
        "mean": found.mean, "mean_low": low, "mean_high": high, "failure_rate": failures / len(found),
        "failure_rate_low": rate.low, "failure_rate_high": rate.high, "episodes": len(found),
    }  # fmt: skip


def _verdict(direction: Candidate, found: Mapping[str, Any], extent: float) -> tuple[Verdict, str]:
    reach, rise = (Interval(*found[f"{name}_interval"]) for name in ("reach", "rise"))
    verdict: Verdict = "undecided"
    which = ""
    # What is the same in every episode, mostly 0, has no interval: against a margin the value itself counts.
    reach_high, rise_high = (
        found[name] if math.isnan(interval.high) else interval.high
        for name, interval in (("reach", reach), ("rise", rise))
    )
    if reach_high < REACH:
        verdict = "none found"
    elif reach.low > 0 and rise_high > RISE:
        verdict = "moves the return by failing"
    elif reach.low > 0:
        own_p = tuple(found[f"{side}_p_value"] <= ALPHA for side in ("read", "put"))
        verdict = "found" if all(own_p) else "no more than random"
        which = EXCHANGED.get(own_p, "")
    own, failures = (
        f"{100 * found[name]:+.0f} % {span(interval, percent=True, digits=0, sign=True)}"
        for name, interval in (("reach", reach), ("rise", rise))
    )
    sentence = (
        f"The best candidate was {direction.name} ({direction.why}). On fresh seeds its doses move the return by "
        f"{own} of the curve's range of {extent:,.{places(extent)}f}, and failures rise by {failures}; of "
        f"{found['random_directions']} random directions of the same output energy, {found['read_as_far']} move it as "
        f"far without failing in place of what it reads, and {found['put_as_far']} in place of what it "
        f"{DOES[found['put_side']]}"
        f"{GAIN if found['put_side'] == 'write' else ''}: {verdict}{which}."
    )
    return verdict, sentence
