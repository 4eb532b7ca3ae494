"""``court``: try the claims on a model, both ways, and write the verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dt_lens.arguments import local_path, require_wrapped, require_writable, whole_number
from dt_lens.behaviour.task import Task
from dt_lens.behaviour.tasks import task_of
from dt_lens.errors import DtLensError, as_written
from dt_lens.lens.activations import Activations
from dt_lens.lens.matrices import select_matrices
from dt_lens.progress import ProgressCallback, reporting, silent, stage
from dt_lens.statistics.multiplicity import holm
from dt_lens.study.court.case import Case
from dt_lens.study.court.causes import acts_where_it_matters
from dt_lens.study.court.claims import CLAIMS, WAYS, Finding, NotApplicable, Way, claims_in, verdict_of
from dt_lens.study.court.damage import cosine_predicts_damage, hurts_more, output_shares
from dt_lens.study.court.inputs import follows_time, reward_beats_chance
from dt_lens.study.court.matches import first_is_common, reads_states, w_in_matches_more
from dt_lens.study.court.page import write_court
from dt_lens.study.court.result import CourtResult, Ruling
from dt_lens.study.court.rollouts import MeasuredEdits, Rollouts, common_output, edits_of_sweep
from dt_lens.svd.clustering import clusters

__all__ = ["court"]

# How long the edits run, and each claim is tried, beside the others; for the progress only.
OF_EDITS, OF_CLAIM, USUAL = 40.0, {2: 2.0, 3: 2.0, 8: 10.0}, 1.0


def court(
    model: Any,
    out: str | Path,
    what: Any = None,
    *,
    name: str = "the model",
    task: Task | None = None,
    units: int | None = None,
    seed: int = 0,
    sweep: str | Path | None = None,
    rollouts: bool = True,
    claims: Sequence[int] | None = None,
    draws: int = 4000,
    workers: int | None = None,
    command: str = "",
    progress: bool | ProgressCallback | None = None,
    **options: Any,
) -> CourtResult:
    """Try the eight claims on a model, as ``docs/court_registered.md`` has them, and write the result into ``out``.

    Called again with the same arguments after an interruption, it resumes: finished units are kept in SQLite files
    below ``out``.

    Args:
        model: a wrapped model. One whose task runs here is tried on the claims about edits too.
        out: the folder for the units, ``court.html``, ``court.csv`` and ``court.json``.
        what: what is run, as for ``evaluate``; the model's own task by default.
        name: what the page calls the model.
        task: a ``Task``, in place of ``what``.
        units: paired units of the unedited model, of each edit and of each control: 200 episodes or windows by default.
            ``episodes`` and ``windows`` are other names for it.
        seed: of the units, where they have seeds, of the controls and of the nulls.
        sweep: a finished sweep of this model, with controls; claim 7 is tried on its edits.
        rollouts: ``False`` leaves out the edits.
        claims: the numbers of those to try; all by default. Holm's correction counts the others too, as the least sure.
        draws: how many draws a null takes.
        workers: worker processes.
        command: the command line that repeats this, for the page.
        progress: ``True`` for a bar, ``False`` for none, or a function of (what is being done, share done); by
            default a bar in a notebook and none elsewhere.
        options: what else ``evaluate`` takes to say what is run, such as ``target_return``, ``texts`` or ``context``.

    Raises:
        DtLensError: if an argument does not fit the model or has no use for its kind of model, ``out`` holds files of
            another run, or the sweep is of another model. That a model's own task is not known here is no error if
            nothing says what is run: then the claims about edits are not applicable.
        KeyboardInterrupt: on Ctrl-C; finished units are kept.
    """
    require_wrapped(model, "court", "structure", "embeddings", "can_run", "can_act")
    for what_, value, least in (("seed", seed, 0), ("draws", draws, 200)):
        whole_number(value, what_, least)
    out, case = local_path(out, "out"), Case(model, seed, draws)
    asked_for = _numbers(claims)
    require_writable(*(out / f"court.{kind}" for kind in ("html", "csv", "json")))
    trial, numbers = _Trial(case, out, asked_for), range(0)
    asked = [what, task, units, *options.values()]
    try:
        trial.task, numbers = task_of(
            model, what, task=task, units=units, seed=seed, caller="court", use="court", **options
        )
        whole_number(len(numbers), trial.task.terms.units, 2)
    except DtLensError as error:
        if any(value is not None for value in asked):
            raise
        trial.no_edits_reason = _reason(error)
    if sweep is not None:
        swept, values = edits_of_sweep(sweep, model, trial.task)
        number = f"{len(swept.baseline)} {swept.baseline.terms.units}"
        trial.swept = swept, f"{len(swept.edits)} of a sweep, {values}, {number} each"
    with reporting(progress) as tell:
        trial.tell = tell
        trial.runs = rollouts
        if trial.task is not None and rollouts and {3, 7} & asked_for:
            claims_take = sum(OF_CLAIM.get(number, USUAL) for number in asked_for)
            trial.start = OF_EDITS / (OF_EDITS + claims_take)
            tell("running edits", 0.0)
            run = Rollouts(model, out, trial.task, numbers, seed, workers)
            trial.measured = run.run(stage(tell, 0.0, trial.start))
        elif trial.task is not None and not rollouts:
            trial.no_edits_reason = "rollouts were left out"
        rulings = trial.rulings()
    facts: dict[str, Any] = {"model": name, "seed": seed, "draws": draws, "command": command}
    if trial.task is not None:
        setting = trial.task.terms.setting
        facts |= {"model_id": trial.task.identity(model)[1]}
        facts |= {name: value for name, value in setting.items() if isinstance(value, str | int | float)}
    if trial.measured is not None:
        terms = trial.measured.baseline.terms
        facts |= {terms.units: len(numbers)}
        facts[f"unedited_mean_{terms.outcome}"] = round(
            trial.measured.baseline.mean, 3 if terms.digits is None else terms.digits
        )
        facts["arms"] = 1 + sum(1 + len(edit.controls) for edit in trial.measured.edits)
        facts["arms"] += len(trial.measured.raw) if trial.measured.folded else 0
    if sweep is not None:
        facts["sweep"] = str(sweep)
    result = CourtResult(rulings, facts)
    write_court(result, out)
    return result


@dataclass
class _Trial:
    """What is at hand to try the claims with, and the trying."""

    case: Case
    out: Path
    numbers: frozenset[int]  # of the claims to try
    runs: bool = True  # whether anything may be run
    task: Task | None = None
    no_edits_reason: str = ""
    measured: MeasuredEdits | None = None
    swept: tuple[MeasuredEdits, str] | None = None
    tell: ProgressCallback = silent
    start: float = 0.0  # the share of the whole that is done before the first claim

    def rulings(self) -> list[Ruling]:
        """Try every claim both ways; Holm's correction runs over the applicable claims of each way."""
        tries: dict[int, Callable[[Way], Finding]] = {
            1: lambda way: w_in_matches_more(self.case, way),
            2: lambda way: first_is_common(self.case, way, self._common()),
            3: self._hurts_more,
            4: lambda way: reads_states(self.case, way),
            5: lambda way: reward_beats_chance(self.case, way),
            6: lambda way: follows_time(self.case, way, self.task.terms.limit if self.task else None),
            7: self._predicts,
            8: self._acts_where_it_matters,
        }
        found: dict[Way, dict[int, Finding | str]] = {way: {} for way in WAYS}
        claims = claims_in(self.task.terms if self.task else None, *self._words())
        asked = ", ".join(map(str, sorted(self.numbers)))
        whole, done, take = self.tell, self.start, 0.0
        share_of_one = (1 - self.start) / sum(OF_CLAIM.get(number, USUAL) for number in self.numbers)
        for claim in claims:
            done, take = done + take, OF_CLAIM.get(claim.number, USUAL) * share_of_one
            if claim.number not in self.numbers:
                take = 0.0
            for way in WAYS:
                if claim.number not in self.numbers:
                    found[way][claim.number] = f"it was not asked for (asked for: {asked})"
                    continue
                # As it should be takes longer: it collects and counts what both ways read.
                self.tell = _stage(whole, f"claim {claim.number}", done, done + take, way)
                self.tell("trying it", 0.0)
                try:
                    found[way][claim.number] = tries[claim.number](way)
                except NotApplicable as reason:
                    found[way][claim.number] = str(reason)
        ruled: dict[tuple[int, Way], Ruling] = {}
        for way in WAYS:
            tried = {number: result for number, result in found[way].items() if isinstance(result, Finding)}
            # As if each claim that was not asked for had been tried, and were the least sure: never less than Holm's.
            untried = [1.0] * (len(claims) - len(self.numbers))
            ps = holm([*(result.p_value for result in tried.values()), *untried])
            adjusted = dict(zip(tried, ps, strict=False))
            for claim in claims:
                result = found[way][claim.number]
                if isinstance(result, str):
                    ruled[claim.number, way] = Ruling(claim, way, "not applicable", None, math.nan, result)
                else:
                    p = adjusted[claim.number]
                    ruled[claim.number, way] = Ruling(claim, way, verdict_of(claim.about, result, p), result, p)
        return [ruled[claim.number, way] for claim in claims for way in WAYS]

    def _words(self) -> Iterator[str]:
        """What the model puts out and what it is given, in a word each; an agent's words where it has none."""
        for side, usual in (("output", "action"), ("input", "state")):
            try:
                yield self.case.embedding(side).kind
            except NotApplicable:
                yield usual

    def _common(self) -> int:
        case, embedding = self.case, self.case.embedding("output")
        if len(embedding) < 2:
            raise NotApplicable(f"the model has only one {embedding.kind}, so there is no other to compare with")
        if self.task is None:
            raise NotApplicable(self.no_edits_reason)
        return common_output(case.model, self.task, embedding.kind, self.out, self.tell)

    def _own_edits(self) -> MeasuredEdits:
        """The edits that this court ran itself."""
        if self.measured is None:
            raise NotApplicable(self.no_edits_reason)
        return self.measured

    def _hurts_more(self, way: Way) -> Finding:
        measured = self._own_edits()
        if way == "note":
            return hurts_more(self.case, way, measured, {})
        energies = {
            "Frobenius energy": [edit.energy for edit in measured.edits],
            "output energy": output_shares(self.case, measured.edits, self._activations()),
        }
        absolute = output_shares(self.case, measured.edits, self._activations(), absolute=True)
        return hurts_more(self.case, way, measured, energies, {"absolute output energy": absolute})

    def _predicts(self, way: Way) -> Finding:
        measured, source = self.swept or (None, "")
        # A sweep's directions are of folded matrices, the note's of raw ones: sv=5 is not the same direction in both.
        if measured is None or (way == "note" and any(matrix.foldable for matrix in select_matrices(self.case.model))):
            measured = self._own_edits()
            source = f"this court's own, {len(measured.baseline)} {measured.baseline.terms.units} each"
        energies = None
        if way == "proper" and self.task is not None:
            energies = output_shares(self.case, measured.edits, self._activations())
        return cosine_predicts_damage(self.case, way, measured, source, energies)

    def _acts_where_it_matters(self, way: Way) -> Finding:
        if way == "note":
            raise NotApplicable("the claim is not the note's")
        if self.task is None or not self.runs:
            raise NotApplicable(self.no_edits_reason)
        model, seed = self.case.model, self.case.seed
        try:
            kinds = self.task.situations(model, seed, stage(self.tell, 0.0, 0.2))
            if not kinds:
                raise NotApplicable(
                    "its task does not list what the model can be faced with, with its factors and where they matter"
                )
            read = self.case.embedding("input").name
            table = clusters(model, embeddings=read, seed=seed, beside=False, progress=stage(self.tell, 0.2, 0.4))
            return acts_where_it_matters(
                self.case, self.task, kinds, table, self._activations(), tell=stage(self.tell, 0.5, 1.0)
            )
        except NotApplicable:
            raise
        except DtLensError as error:  # no planner, factors that cannot be tested, a direction that cannot be edited
            raise NotApplicable(_reason(error)) from error

    def _activations(self) -> Activations:
        from dt_lens.behaviour.collect_activations import kept_activations

        assert self.task is not None
        file = self.out / "activations.safetensors"
        try:
            return kept_activations(self.case.model, file, self.task, tell=stage(self.tell, 0.4, 0.5))
        except DtLensError as error:  # a task need not say what it feeds the model
            raise NotApplicable(_reason(error)) from error


def _stage(tell: ProgressCallback, name: str, start: float, end: float, way: Way) -> ProgressCallback:
    """The progress of one claim, tried one way."""
    middle = start + 0.9 * (end - start)
    told = stage(tell, *((start, middle) if way == "proper" else (middle, end)))
    return lambda what, share: told(f"{name}: {what}", share)


def _numbers(claims: Any) -> frozenset[int]:
    """The numbers of the claims that are tried."""
    known = [claim.number for claim in CLAIMS]
    if claims is None:
        return frozenset(known)
    found = list(claims) if isinstance(claims, list | tuple | set | frozenset | range) else [claims]
    if not found or any(number not in known for number in found):
        raise DtLensError(f"claims is {as_written(claims)}; give numbers of {known[0]} to {known[-1]}, such as [8].")
    return frozenset(map(int, found))


def _reason(error: Exception) -> str:
    """An error's sentence as a reason: without its capital and its full stop."""
    text = str(error).rstrip(".")
    return text[:1].lower() + text[1:]
