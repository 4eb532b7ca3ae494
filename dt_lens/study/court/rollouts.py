"""The units behind the claims about behaviour: a few edits, each with its control, all over the same units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dt_lens.arguments import as_json, read_checked_json, write_checked_json
from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.sweep.arms import is_of_sweep, scales_sigma
from dt_lens.behaviour.sweep.plan import sv_of
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.store import FILE
from dt_lens.behaviour.sweep.sweep import Sweep
from dt_lens.behaviour.task import Task
from dt_lens.behaviour.tasks import identity_of, terms_in
from dt_lens.edits.singular import load_edit
from dt_lens.edits.written import parse_value
from dt_lens.errors import DtLensError
from dt_lens.lens.matrices import Snapshot, find_matrix, select_matrices
from dt_lens.progress import ProgressCallback
from dt_lens.study.court.claims import NotApplicable

__all__ = [
    "DIRECTIONS",
    "MeasuredEdit",
    "MeasuredEdits",
    "Rollouts",
    "common_output",
    "edits_of_sweep",
    "measured_edits",
]

Array = NDArray[np.float64]
DIRECTIONS = (0, 2)  # the note's first and third
EDIT = "constant"


@dataclass(frozen=True)
class MeasuredEdit:
    """One edit with the outcomes of its units and of its controls', over the baseline's units."""

    matrix: str
    kind: str
    side: str
    sv: int
    energy: float
    record: Mapping[str, Any]
    outcomes: Array  # [unit]
    controls: Array  # [control, unit]


@dataclass(frozen=True)
class MeasuredEdits:
    """The edits that were run over the same units, with the unedited model.

    Attributes:
        baseline: the unedited model's evaluation.
        edits: of the folded matrices, with controls.
        raw: of the raw ``W_in``, for the note's way; without LayerNorms these are edits of ``edits``.
        folded: whether ``edits`` are of folded matrices.
    """

    baseline: Evaluation
    edits: Sequence[MeasuredEdit]
    raw: Sequence[MeasuredEdit]
    folded: bool = True

    @property
    def scale(self) -> float:
        """What damage is measured in: the unedited mean, or one of the outcome's own units if the task says what of
        those is a large loss.

        Raises:
            NotApplicable: if damage is a share of a mean that is not above zero.
        """
        terms = self.baseline.terms
        if terms.large is not None:
            return 1.0
        if not self.baseline.mean > 0:
            raise NotApplicable(
                f"the mean {terms.outcome} of the unedited {terms.actor} is {self.baseline.mean:.3g}, and damage is a "
                "share of it"
            )
        return self.baseline.mean

    def damage(self, edit: MeasuredEdit) -> Array:
        """``[unit]``, how much worse an edit's outcomes are than the unedited model's, in units of ``scale``."""
        return np.asarray(self.baseline.terms.sign * (self.baseline.outcomes - edit.outcomes) / self.scale)

    def beyond(self, edit: MeasuredEdit) -> Array:
        """``[unit]``, how much worse an edit's outcomes are than its controls', in units of ``scale``."""
        return np.asarray(self.baseline.terms.sign * (edit.controls.mean(0) - edit.outcomes) / self.scale)

    def cost(self, damage: float) -> str:
        """A damage as a number in a sentence."""
        terms = self.baseline.terms
        return f"{100 * damage:.0f} %" if terms.large is None else f"{damage:.{self.digits}f}"

    @property
    def of(self) -> str:
        """What follows ``cost``: ``" of the return"``, ``" nats per token"``."""
        terms = self.baseline.terms
        if terms.large is None:
            return f" of the {terms.outcome}"
        return terms.in_scale

    @property
    def digits(self) -> int:
        """Decimals of a damage."""
        terms = self.baseline.terms
        return 2 if terms.large is None else 3 if terms.digits is None else terms.digits


@dataclass(frozen=True)
class Rollouts:
    """How the court's units are run; ``run`` does it, and resumes after an interruption.

    Args:
        model: a wrapped model.
        out: the folder; the sweeps' files are in ``arms/folded`` and ``arms/raw``.
        task: what is run.
        units: the numbers of the units.
        seed: of the controls.
        workers: worker processes.
    """

    model: Any
    out: Path
    task: Task
    units: range
    seed: int = 0
    workers: int | None = None

    def run(self, tell: ProgressCallback) -> MeasuredEdits:
        """Run what is not finished, and give all edits.

        Raises:
            DtLensError: as ``Sweep`` does.
            KeyboardInterrupt: on Ctrl-C; finished units are kept.
        """
        matrices = [m for m in select_matrices(self.model) if m.kind in ("W_in", "W_out")]
        directions = f"{DIRECTIONS[0]},{DIRECTIONS[1]}"
        names = [m.name for m in matrices]
        folds = any(m.foldable for m in matrices)
        share = 0.7 if folds else 1.0
        main = self._sweep("folded", tell, (0.0, share), matrices=names, sv=directions, value=EDIT, controls=1)
        # The folder may hold more units, from a longer run.
        baseline, edits = measured_edits(main, self.model, units=self.units)
        if not folds:
            return MeasuredEdits(baseline, edits, [edit for edit in edits if edit.kind == "W_in"], folded=False)
        inward = [m.name for m in matrices if m.kind == "W_in"]
        raw = self._sweep(
            "raw", tell, (share, 1.0), matrices=inward, sv=directions, value=EDIT, controls=0, baseline=False,
            fold_layernorm=False,
        )  # fmt: skip
        return MeasuredEdits(baseline, edits, measured_edits(raw, self.model, baseline, self.units)[1])

    def _sweep(self, name: str, tell: ProgressCallback, part: tuple[float, float], **options: Any) -> SweepResults:
        def share(what: str, done: float) -> None:
            tell(f"running edits  {what}", part[0] + (part[1] - part[0]) * done)

        folder = self.out / "arms" / name
        finished = self._finished(folder, **options)
        if finished is not None:
            return finished
        setting: dict[str, Any] = {"units": len(self.units), "seed": self.seed, "workers": self.workers}
        return Sweep(self.model, folder, task=self.task, **setting, **options).run(share).results

    def _finished(self, folder: Path, **options: Any) -> SweepResults | None:
        """The sweep in ``folder`` if it is finished and of these arms, whichever version ran it."""
        if not (folder / FILE).is_file():
            return None
        found = SweepResults(folder)
        wanted: dict[str, Any] = {
            "model": self.task.identity(self.model)[1], "seed": self.seed, "edits": [EDIT],
            "matrices": options["matrices"], "controls": options["controls"],
            "fold_layernorm": options.get("fold_layernorm", True),
        }  # fmt: skip
        left, kept = found.status(), found.options
        number = next((kept[name] for name in ("units", self.task.terms.units) if name in kept), None)
        here, there = (as_json(dict(terms.setting)) for terms in (self.task.terms, terms_in(kept)))
        same = here == there and number == len(self.units)
        same = same and all(kept.get(key) == value for key, value in wanted.items())
        return found if same and not left["todo"] + left["failed"] else None


def measured_edits(
    results: SweepResults, model: Any, baseline: Evaluation | None = None, units: range | None = None
) -> tuple[Evaluation, list[MeasuredEdit]]:
    """The baseline of a sweep, and every edit that ran all of its units, with controls.

    Edits of activation-aware directions are left out.

    Args:
        results: a sweep's file.
        model: the model that was swept.
        baseline: from another sweep over the same units, if this one has none.
        units: the units to take; all by default.

    Raises:
        DtLensError: if there is no baseline.
    """
    evaluations = results.evaluations()
    if units is not None:
        shared = {arm: np.intersect1d(found.units, units) for arm, found in evaluations.items()}
        evaluations = {arm: evaluations[arm].at(common) for arm, common in shared.items() if len(common)}
    if baseline is None:
        if not results.options["baseline"] or 0 not in evaluations:
            actor = terms_in(results.options).actor
            raise DtLensError(f"The sweep in {results.file} has no unedited {actor}; run one with its baseline.")
        baseline = evaluations[0]
    whole = {arm: found for arm, found in evaluations.items() if np.array_equal(found.units, baseline.units)}
    controls, bare = results.controls(), Snapshot.of(model)
    edits = []
    for arm, found in whole.items():
        record = found.edits[0] if found.edits else {"kind": "none"}
        if record["kind"] != "singular" or record.get("activations"):  # the unedited model, a control, other directions
            continue
        beside = [whole[control].outcomes for control in controls.get(arm, ()) if control in whole]
        matrix = find_matrix(bare, record["matrix"])
        if not is_of_sweep(record, matrix, bool(results.options["fold_layernorm"])):
            continue
        edits.append(
            MeasuredEdit(
                matrix.name,
                matrix.kind,
                record["side"],
                int(sv_of(record)[0]),
                load_edit(model, record).energy,
                record,
                found.outcomes,
                np.array(beside).reshape(-1, len(baseline)),
            )
        )
    return baseline, edits


def edits_of_sweep(source: str | Path, model: Any, task: Task | None = None) -> tuple[MeasuredEdits, str]:
    """The edits of a finished sweep of this model, and their value: removals if the sweep has several values.

    Raises:
        DtLensError: if the sweep is of another model or of raw matrices, or has no edit with a control.
    """
    results = SweepResults(source)
    terms = terms_in(results.options)
    own = identity_of(model, terms) if task is None or task.terms.task != terms.task else task.identity(model)[1]
    if results.options["model"] != own:
        raise DtLensError(f"The sweep in {results.file} is of another model; give the model it was made with.")
    folded = bool(results.options["fold_layernorm"])
    if not folded and any(matrix.foldable for matrix in select_matrices(model)):
        raise DtLensError(f"The sweep in {results.file} is of raw matrices; give one of folded matrices.")
    baseline, edits = measured_edits(results, model)
    values = results.options["edits"]
    chosen = "zero" if "zero" in values else "constant" if "constant" in values else values[0]
    kept: dict[tuple[str, int, str], MeasuredEdit] = {}
    for edit in edits:
        value = edit.record["value"]
        if len(edit.controls) and parse_value(value)[0] == chosen:
            # Scaling sigma is the same edit on either side.
            kept.setdefault((edit.matrix, edit.sv, "" if scales_sigma(value) else edit.side), edit)
    if not kept:
        raise DtLensError(
            f"The sweep in {results.file} has no finished edit with a control; run one with --controls 1."
        )
    found = list(kept.values())
    return MeasuredEdits(baseline, found, found, folded), chosen


def common_output(model: Any, task: Task, kind: str, out: Path | None, tell: ProgressCallback) -> int:
    """The label of the output embedding that a model puts out most, by its task; kept in ``out``.

    Args:
        kind: of the embedding, such as ``"action"``: the file is named after it.

    Raises:
        NotApplicable: if the task does not count outputs.
    """
    of = as_json([task.identity(model)[1], dict(task.terms.setting)])
    file = None if out is None else out / f"{kind}s.json"
    kept = _kept(file, of)
    if kept is not None:
        return kept
    sizes = task.common_outputs(model, tell)
    if sizes is None:
        raise NotApplicable(f"the task {task.terms.task!r} does not say which {kind} is the most common one")
    found = {"of": of, "sizes": np.asarray(sizes).tolist(), "most_common": int(np.argmax(sizes))}
    if file is not None:
        write_checked_json(file, found)
    return int(found["most_common"])


def _kept(file: Path | None, of: Any) -> int | None:
    kept = None if file is None else read_checked_json(file)
    try:
        return int(kept["most_common"]) if kept is not None and kept["of"] == of else None
    except (ValueError, KeyError, TypeError):
        return None  # of another version: it is counted again
