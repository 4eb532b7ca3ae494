"""``court``: try the seven claims on a model, both ways, and write the verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dt_lens.arguments import local_path, require_wrapped, require_writable, whole_number
from dt_lens.behaviour.agents.identity import model_id
from dt_lens.behaviour.agents.running import Setting, setting_of
from dt_lens.behaviour.texts.windows import Texts, cut, read_texts
from dt_lens.errors import DtLensError
from dt_lens.lens.activations import Activations
from dt_lens.lens.matrices import select_matrices
from dt_lens.progress import ProgressCallback, reporting, silent
from dt_lens.statistics.multiplicity import holm
from dt_lens.study.court.case import Case
from dt_lens.study.court.claims import CLAIMS, WAYS, Finding, NotApplicable, Way, verdict_of
from dt_lens.study.court.damage import cosine_predicts_damage, hurts_more, output_shares
from dt_lens.study.court.inputs import follows_time, reward_beats_chance
from dt_lens.study.court.matches import first_is_common, reads_states, w_in_matches_more
from dt_lens.study.court.page import write_court
from dt_lens.study.court.result import CourtResult, Ruling
from dt_lens.study.court.rollouts import MeasuredEdits, Rollouts, common_action, edits_of_sweep

__all__ = ["court"]

WINDOWS = 64  # of a text, to find the most common prediction


def court(
    model: Any,
    out: str | Path,
    *,
    name: str = "the model",
    episodes: int = 200,
    seed: int = 0,
    environment: str | None = None,
    environment_kwargs: Mapping[str, Any] | None = None,
    target_return: float | None = None,
    max_steps: int | None = None,
    sweep: str | Path | None = None,
    texts: Texts | None = None,
    rollouts: bool = True,
    draws: int = 4000,
    workers: int | None = None,
    command: str = "",
    progress: bool | ProgressCallback = False,
) -> CourtResult:
    """Try the seven claims on a model, as registered in ``docs/court.md``, and write the result into ``out``.

    Called again with the same arguments after an interruption, it resumes: finished episodes are kept in SQLite files
    below ``out``.

    Args:
        model: a wrapped model. Agents whose environment runs here are tried on all claims, others on those that apply.
        out: the folder for the episodes, ``court.html``, ``court.csv`` and ``court.json``.
        name: what the page calls the model.
        episodes: paired episodes of the unedited model, of each edit and of each control.
        seed: of the episodes, of the controls and of the nulls.
        environment, environment_kwargs, target_return, max_steps: as for ``evaluate``.
        sweep: a finished sweep of this model, with controls; claim 7 is tried on its edits.
        texts: for a language model: texts in which its most common prediction is counted.
        rollouts: ``False`` leaves out what needs more than ten episodes.
        draws: how many draws a null takes.
        workers: processes of the rollouts.
        command: the command line that repeats this, for the page.
        progress: ``True`` for a bar on standard error, or a function of (what is being done, share done).

    Raises:
        DtLensError: if an argument does not fit the model or has no use for its kind of model, ``out`` holds files of
            another run, or the sweep is of another model.
        KeyboardInterrupt: on Ctrl-C; finished episodes are kept.
    """
    require_wrapped(model, "court", "structure", "embeddings", "can_run", "can_act")
    for what, value, least in (("episodes", episodes, 2), ("seed", seed, 0), ("draws", draws, 200)):
        whole_number(value, what, least)
    out, case = local_path(out, "out"), Case(model, seed, draws)
    require_writable(*(out / f"court.{kind}" for kind in ("html", "csv", "json")))
    if model.can_run:
        of_agents: dict[str, Any] = {
            "environment": environment,
            "environment_kwargs": environment_kwargs,
            "sweep": sweep,
        }
        of_agents |= {"target_return": target_return, "max_steps": max_steps}
        _refuse_unused(not model.can_act, {"texts": texts}, of_agents)
    trial = _Trial(case, out, texts)
    if model.can_run and model.can_act:
        try:
            trial.setting = setting_of(model, environment, environment_kwargs, target_return, max_steps, "court")
        except DtLensError as error:
            if environment is not None or target_return is not None:
                raise
            trial.no_rollouts_reason = _reason(error)
    if sweep is not None:
        swept, values = edits_of_sweep(sweep, model)
        trial.swept = swept, f"{len(swept.edits)} of a sweep, {values}, {len(swept.baseline)} episodes each"
    with reporting(progress) as tell:
        trial.tell = tell
        if trial.setting is not None and rollouts:
            tell("running edits", 0.0)
            run = Rollouts(
                model, out, episodes, seed, environment, environment_kwargs, target_return, max_steps, workers
            )
            trial.measured = run.run(lambda what, share: tell(what, 0.9 * share))
        elif trial.setting is not None:
            trial.no_rollouts_reason = "rollouts were left out"
        rulings = trial.rulings()
    facts: dict[str, Any] = {"model": name, "seed": seed, "draws": draws, "command": command}
    if trial.setting is not None:
        facts |= {
            "model_id": model_id(model),
            "environment": trial.setting.environment,
            "target_return": trial.setting.target_return,
            "time_limit": trial.setting.made.time_limit,
        }
    if trial.measured is not None:
        facts |= {"episodes": episodes, "unedited_mean_return": round(trial.measured.baseline.mean, 3)}
        facts["arms"] = 1 + sum(1 + len(edit.controls) for edit in trial.measured.edits)
        facts["arms"] += len(trial.measured.raw) if trial.measured.folded else 0
    if sweep is not None:
        facts["sweep"] = str(sweep)
    result = CourtResult(rulings, facts)
    write_court(result, out)
    return result


def _refuse_unused(text: bool, of_text: Mapping[str, Any], of_agents: Mapping[str, Any]) -> None:
    """Raise ``DtLensError`` for an option that this kind of model has no use for."""
    given = [name for name, value in (of_agents if text else of_text).items() if value is not None]
    if given:
        what, other = ("a language model", "an agent") if text else ("an agent", "a language model")
        raise DtLensError(f"{given[0]} is for {other}, and this is {what}; leave it out.")


@dataclass
class _Trial:
    """What is at hand to try the claims with, and the trying."""

    case: Case
    out: Path
    texts: Texts | None = None
    setting: Setting | None = None
    no_rollouts_reason: str = "it does not act in an environment"
    measured: MeasuredEdits | None = None
    swept: tuple[MeasuredEdits, str] | None = None
    tell: ProgressCallback = silent

    def rulings(self) -> list[Ruling]:
        """Try every claim both ways; Holm's correction runs over the applicable claims of each way."""
        tries: dict[int, Callable[[Way], Finding]] = {
            1: lambda way: w_in_matches_more(self.case, way),
            2: lambda way: first_is_common(self.case, way, self._common()),
            3: self._hurts_more,
            4: lambda way: reads_states(self.case, way),
            5: lambda way: reward_beats_chance(self.case, way),
            6: lambda way: follows_time(self.case, way, self.setting.made.time_limit if self.setting else None),
            7: self._predicts,
        }
        found: dict[Way, dict[int, Finding | str]] = {way: {} for way in WAYS}
        for claim in CLAIMS:
            for way in WAYS:
                self.tell(f"trying claim {claim.number}", 0.9 + 0.1 * (claim.number - 1) / len(CLAIMS))
                try:
                    found[way][claim.number] = tries[claim.number](way)
                except NotApplicable as reason:
                    found[way][claim.number] = str(reason)
        ruled: dict[tuple[int, Way], Ruling] = {}
        for way in WAYS:
            tried = {number: result for number, result in found[way].items() if isinstance(result, Finding)}
            adjusted = dict(zip(tried, holm([result.p_value for result in tried.values()]), strict=True))
            for claim in CLAIMS:
                result = found[way][claim.number]
                if isinstance(result, str):
                    ruled[claim.number, way] = Ruling(claim, way, "not applicable", None, math.nan, result)
                else:
                    p = adjusted[claim.number]
                    ruled[claim.number, way] = Ruling(claim, way, verdict_of(claim.about, result, p), result, p)
        return [ruled[claim.number, way] for claim in CLAIMS for way in WAYS]

    def _common(self) -> int:
        case = self.case
        if not case.model.can_act:
            if self.texts is None:
                raise NotApplicable("no texts were given to find the most common token in")
            return common_token(case.model, self.texts)
        if len(case.embedding("output")) < 2:
            raise NotApplicable("the model has only one action, so there is no other to compare with")
        if self.setting is None:
            raise NotApplicable(self.no_rollouts_reason)
        return common_action(case.model, self.setting, self.out, self.tell)

    def _own_edits(self) -> MeasuredEdits:
        """The edits that this court ran itself."""
        if self.measured is None:
            raise NotApplicable(
                self.no_rollouts_reason if self.case.model.can_act else f"a {self.case.model.kind} does not act"
            )
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
            source = f"this court's own, {len(measured.baseline)} episodes each"
        energies = None
        if way == "proper" and self.setting is not None:
            energies = output_shares(self.case, measured.edits, self._activations())
        return cosine_predicts_damage(self.case, way, measured, source, energies)

    def _activations(self) -> Activations:
        from dt_lens.behaviour.collect_activations import kept_activations

        assert self.setting is not None
        file = self.out / "activations.safetensors"
        return kept_activations(self.case.model, file, self.setting, tell=lambda what, _: self.tell(what, 0.92))


def common_token(model: Any, texts: Texts) -> int:
    """The token that a language model predicts most often, greedily, in the first windows of ``texts``.

    Raises:
        NotApplicable: if the model has no tokenizer.
    """
    if getattr(model, "tokenizer", None) is None:
        raise NotApplicable("the model has no tokenizer to read texts with")
    windows = cut(read_texts(texts), model.tokenizer, min(int(model.cfg.n_ctx), 128), WINDOWS)
    counts = torch.zeros(int(model.cfg.d_vocab))
    with torch.no_grad():
        for window in windows.tokens:
            out = model(torch.from_numpy(window)[None])
            best = getattr(out, "logits", out)[0, windows.unpredicted - 1 : -1].argmax(-1)
            counts += torch.bincount(best.cpu(), minlength=len(counts))
    return int(counts.argmax())


def _reason(error: Exception) -> str:
    """An error's sentence as a reason: without its capital and its full stop."""
    text = str(error).rstrip(".")
    return text[:1].lower() + text[1:]
