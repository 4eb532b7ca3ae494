"""The episodes behind the claims about behaviour: a few edits, each with its control, all on the same seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dt_lens.arguments import read_checked_json, write_checked_json
from dt_lens.behaviour.agents.evaluation import Evaluation
from dt_lens.behaviour.agents.identity import model_id
from dt_lens.behaviour.agents.recording import record_actions
from dt_lens.behaviour.agents.running import Setting
from dt_lens.behaviour.sweep.arms import parse_value, scales_sigma
from dt_lens.behaviour.sweep.results import SweepResults, at_seeds
from dt_lens.behaviour.sweep.store import FILE
from dt_lens.behaviour.sweep.sweep import Sweep
from dt_lens.edits.singular import load_edit
from dt_lens.errors import DtLensError
from dt_lens.lens.matrices import Snapshot, find_matrix, select_matrices
from dt_lens.progress import ProgressCallback
from dt_lens.study.court.claims import NotApplicable

__all__ = [
    "DIRECTIONS",
    "MeasuredEdit",
    "MeasuredEdits",
    "Rollouts",
    "common_action",
    "edits_of_sweep",
    "measured_edits",
]

DIRECTIONS = (0, 2)  # the note's first and third
EDIT = "constant"
OWN = 10  # episodes in which the most common action is counted


@dataclass(frozen=True)
class MeasuredEdit:
    """One edit with the returns of its episodes and of its controls', at the baseline's seeds."""

    matrix: str
    kind: str
    side: str
    sv: int
    energy: float
    record: Mapping[str, Any]
    returns: NDArray[np.float64]  # [episode]
    controls: NDArray[np.float64]  # [control, episode]


@dataclass(frozen=True)
class MeasuredEdits:
    """The edits that were run over one set of seeds, with the unedited agent.

    Attributes:
        baseline: the unedited agent's evaluation.
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
        """The unedited mean return, of which damage is a share.

        Raises:
            NotApplicable: if it is not above zero.
        """
        if not self.baseline.mean > 0:
            raise NotApplicable(
                f"the unedited agent returns {self.baseline.mean:.3g} on average, and damage is a share of it"
            )
        return self.baseline.mean


@dataclass(frozen=True)
class Rollouts:
    """How the court's episodes are run; ``run`` does it, and resumes after an interruption.

    Args:
        model: a wrapped agent.
        out: the folder; the sweeps' files are in ``arms/folded`` and ``arms/raw``.
        episodes, seed, environment, environment_kwargs, target_return, max_steps, workers: as for ``Sweep``.
    """

    model: Any
    out: Path
    episodes: int = 200
    seed: int = 0
    environment: str | None = None
    environment_kwargs: Mapping[str, Any] | None = None
    target_return: float | None = None
    max_steps: int | None = None
    workers: int | None = None

    def run(self, tell: ProgressCallback) -> MeasuredEdits:
        """Run what is not finished, and give all edits.

        Raises:
            DtLensError: as ``Sweep`` does.
            KeyboardInterrupt: on Ctrl-C; finished episodes are kept.
        """
        matrices = [m for m in select_matrices(self.model) if m.kind in ("W_in", "W_out")]
        directions = f"{DIRECTIONS[0]},{DIRECTIONS[1]}"
        names = [m.name for m in matrices]
        folds = any(m.foldable for m in matrices)
        share = 0.7 if folds else 1.0
        main = self._sweep(
            "folded", tell, (0.0, share), matrices=names, sv=directions, edits=EDIT, controls=1, sides=None
        )
        # The folder may hold more episodes, from a longer run.
        asked = range(self.seed, self.seed + self.episodes)
        baseline, edits = measured_edits(main, self.model, seeds=asked)
        if not folds:
            return MeasuredEdits(baseline, edits, [edit for edit in edits if edit.kind == "W_in"], folded=False)
        inward = [m.name for m in matrices if m.kind == "W_in"]
        raw = self._sweep(
            "raw", tell, (share, 1.0), matrices=inward, sv=directions, edits=EDIT, controls=0, baseline=False,
            fold_layernorm=False,
        )  # fmt: skip
        return MeasuredEdits(baseline, edits, measured_edits(raw, self.model, baseline, asked)[1])

    def _sweep(self, name: str, tell: ProgressCallback, part: tuple[float, float], **options: Any) -> SweepResults:
        def share(what: str, done: float) -> None:
            tell(f"running edits  {what}", part[0] + (part[1] - part[0]) * done)

        folder = self.out / "arms" / name
        finished = self._finished(folder, **options)
        if finished is not None:
            return finished
        setting: dict[str, Any] = {
            "episodes": self.episodes, "seed": self.seed, "environment": self.environment, "workers": self.workers,
            "environment_kwargs": self.environment_kwargs, "target_return": self.target_return,
            "max_steps": self.max_steps,
        }  # fmt: skip
        return Sweep(self.model, folder, **setting, **options).run(share).results

    def _finished(self, folder: Path, **options: Any) -> SweepResults | None:
        """The sweep in ``folder`` if it is finished and of these arms, whichever version ran it."""
        if not (folder / FILE).is_file():
            return None
        found = SweepResults(folder)
        wanted: dict[str, Any] = {
            "model": model_id(self.model), "episodes": self.episodes, "seed": self.seed, "edits": [EDIT],
            "matrices": options["matrices"], "controls": options["controls"],
            "fold_layernorm": options.get("fold_layernorm", True),
        }  # fmt: skip
        given: dict[str, Any] = {"environment": self.environment, "environment_kwargs": self.environment_kwargs}
        given |= {"target_return": self.target_return, "time_limit": self.max_steps}
        wanted |= {key: value for key, value in given.items() if value is not None}
        left = found.status()
        same = all(found.options.get(key) == value for key, value in wanted.items())
        return found if same and not left["todo"] + left["failed"] else None


def measured_edits(
    results: SweepResults, model: Any, baseline: Evaluation | None = None, seeds: range | None = None
) -> tuple[Evaluation, list[MeasuredEdit]]:
    """The baseline of a sweep, and every edit that ran all of its seeds, with controls.

    Edits of activation-aware directions are left out.

    Args:
        results: a sweep's file.
        model: the model that was swept.
        baseline: from another sweep over the same seeds, if this one has none.
        seeds: the episodes to take; all by default.

    Raises:
        DtLensError: if there is no baseline.
    """
    evaluations = results.evaluations()
    if seeds is not None:
        evaluations = {arm: at_seeds(found, seeds) for arm, found in evaluations.items()}
    if baseline is None:
        if not results.options["baseline"] or 0 not in evaluations:
            raise DtLensError(f"The sweep in {results.file} has no unedited agent; run one with its baseline.")
        baseline = evaluations[0]
    columns = ["kind", "matrix", "side", "sv"]
    rows = results.episodes().drop_duplicates("arm")[["arm", *columns]].to_dict("records")
    whole = [row for row in rows if np.array_equal(evaluations[row["arm"]].seeds, baseline.seeds)]
    finished, controls = {row["arm"] for row in whole}, results.controls()
    found = []
    for row in whole:
        if row["kind"] != "edit":
            continue
        (record,) = evaluations[row["arm"]].edits
        if record["kind"] != "singular" or record.get("activations"):
            continue
        found.append(
            MeasuredEdit(
                row["matrix"],
                find_matrix(Snapshot.of(model), row["matrix"]).kind,
                row["side"],
                int(row["sv"]),
                load_edit(model, record).energy,
                record,
                evaluations[row["arm"]].returns,
                np.array([evaluations[c].returns for c in controls.get(row["arm"], ()) if c in finished]).reshape(
                    -1, len(baseline)
                ),
            )
        )
    return baseline, found


def edits_of_sweep(source: str | Path, model: Any) -> tuple[MeasuredEdits, str]:
    """The edits of a finished sweep of this model, and their value: removals if the sweep has several values.

    Raises:
        DtLensError: if the sweep is of another model or of raw matrices, or has no edit with a control.
    """
    results = SweepResults(source)
    if results.options["model"] != model_id(model):
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


def common_action(model: Any, setting: Setting, out: Path | None, tell: ProgressCallback) -> int:
    """The most common action in ten of the agent's own episodes, kept in ``out/actions.json``.

    Discrete: the index of the most frequent action. Continuous: the coordinate of largest mean |action|.
    """
    identity = [model_id(model), setting.target_return, setting.environment, setting.made.time_limit]
    identity += [setting.environment_kwargs] if setting.environment_kwargs else []
    file = None if out is None else out / "actions.json"
    kept = _kept(file, identity)
    if kept is not None:
        return kept
    where = Evaluation.from_outcomes(
        [], environment=setting.environment, environment_kwargs=setting.environment_kwargs,
        target_return=setting.target_return, time_limit=setting.made.time_limit,
    )  # fmt: skip
    sizes = np.zeros(model.cfg.act_dim)
    for seed in range(OWN):
        tell(f"counting actions  episode {seed + 1} of {OWN}", 0.1)
        actions = record_actions(model, where, seed)
        if model.cfg.discrete_actions:
            kinds = actions.astype(np.int64) - int(getattr(setting.made.action_space, "start", 0))
            sizes += np.bincount(kinds, minlength=len(sizes))
        else:
            sizes += np.abs(actions).sum(0)
    found = {"of": identity, "episodes": OWN, "sizes": sizes.tolist(), "most_common": int(sizes.argmax())}
    if file is not None:
        write_checked_json(file, found)
    return int(sizes.argmax())


def _kept(file: Path | None, identity: list[Any]) -> int | None:
    kept = None if file is None else read_checked_json(file)
    try:
        return int(kept["most_common"]) if kept is not None and kept["of"] == identity else None
    except (ValueError, KeyError, TypeError):
        return None  # of another version: it is counted again
