"""The main job: scan a model, choose directions, edit them beside controls, measure, and write the report."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dt_lens.arguments import local_path, require_writable, whole_number
from dt_lens.behaviour.arms import Arms
from dt_lens.behaviour.printing import edit_name
from dt_lens.behaviour.task import Task
from dt_lens.behaviour.tasks import task_of
from dt_lens.edits.edit import Edit
from dt_lens.edits.singular import SingularEdit
from dt_lens.lens.matrices import Snapshot, catalogue
from dt_lens.lens.printing import Printed, Rows, listed
from dt_lens.progress import Count, ProgressCallback, reporting, stage
from dt_lens.statistics.rank_correlation import rank_correlation
from dt_lens.study.clusters import clusters_of
from dt_lens.study.page import write_study
from dt_lens.study.result import StudyResult
from dt_lens.study.selection import choose_directions, rows_of_directions
from dt_lens.study.trials import Trials, verdicts
from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["MATRICES", "Study"]

MATRICES = ("*.W_in", "*.W_out", "*.OV.*")


class Study(Printed):
    """A study of one model in its task.

    ``run`` does it. Run again with the same settings, it resumes: finished evaluations are read from ``out``.

    Args:
        model: a wrapped model that can run.
        out: the folder for the report, the tables and the trials.
        what: what is run, as for ``evaluate``; the model's own task by default.
        name: what the report calls the model.
        task: a ``Task``, in place of ``what``.
        matrices: which matrices to scan and to choose from; shell patterns. By default the MLPs' and the OV circuits,
            as far as the model has them.
        units: paired units of the unedited model, of each edit and of each control: 50 episodes, or 128 windows, by
            default. ``episodes`` and ``windows`` are other names for it.
        edits: how many strong directions to edit, each with a weak one as its contrast; the first direction of each
            kind of matrix is edited as well. Or the edits themselves, not in force; then nothing is chosen.
        value: what the edits put in place of a singular vector; see ``SingularEdit``.
        seed: of the units, where they have seeds, of the null's sampling and of the controls.
        workers: worker processes, where the task can use any.
        command: the command line that makes the report again, for the report.
        options: what else ``evaluate`` takes to say what is run, such as ``target_return``, ``failure`` or ``context``;
            for an agent also ``video=False``, which leaves out the video.

    Raises:
        DtLensError: for a model or settings that cannot be studied.
    """

    def __init__(
        self,
        model: Any,
        out: str | Path,
        what: Any = None,
        *,
        name: str = "the model",
        task: Task | None = None,
        matrices: Sequence[str] | None = None,
        units: int | None = None,
        edits: int | Sequence[Edit] = 2,
        value: Any = "constant",
        seed: int = 0,
        workers: int | None = None,
        command: str = "",
        **options: Any,
    ) -> None:
        self.folder = local_path(out, "out")
        self.task, self.units = task_of(
            model, what, task=task, units=units, seed=seed, caller="a study", use="study", **options
        )
        whole_number(len(self.units), self.task.terms.units, 2)
        self.given = list(edits) if isinstance(edits, Sequence) else None
        self.edits = whole_number(len(edits) if isinstance(edits, Sequence) else edits, "edits", 1)
        if workers is not None:
            whole_number(workers, "workers", 1)
        if matrices is None:
            present = list(catalogue(Snapshot.of(model)))
            matrices = [pattern for pattern in MATRICES if fnmatch.filter(present, pattern)]
            names = [edit.matrix.name for edit in self.given or ()]
            matrices += [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in matrices)]
        self.model, self.name, self.matrices, self.value = model, name, matrices, value
        self.seed, self.workers, self.command = seed, workers, command

    def _shown(self) -> tuple[str, Rows]:
        terms = self.task.terms
        chosen = f"{self.edits} of strong directions, each with a contrast, and the first of each kind"
        rows = [
            ("measures", f"{terms.outcome_name} over {len(self.units)} {terms.units}"),
            ("matrices", listed(self.matrices)),
            ("edits", chosen if self.given is None else f"{len(self.given)} of your own"),
            ("folder", str(self.folder)),
        ]
        return f"Study of {self.name} in {terms.place}", [*rows, ("next", "run()")]

    def run(self, progress: bool | ProgressCallback | None = None) -> StudyResult:
        """Do the study and write its report and its tables: ``scan.csv``, ``verdicts.csv``, ``clusters.csv`` if any.

        Args:
            progress: ``True`` for a bar, ``False`` for none, or a function of (what is being done, share done); by
                default a bar in a notebook and none elsewhere.

        Raises:
            DtLensError: for matrices that cannot be scanned, a value that cannot be put in force, or a folder that
                cannot be written.
        """
        require_writable(*(self.folder / name for name in ("report.html", "scan.csv", "verdicts.csv", "trials/trial")))
        with reporting(progress) as tell:
            return self._run(tell)

    def _run(self, tell: ProgressCallback) -> StudyResult:
        tell("scanning the weights", 0.0)
        svd = WeightSVD(self.model)
        # Every embedding with every side: the claim to be tested is that W_in, which reads, matches the outputs.
        table = svd.scan(self.matrices, seed=self.seed, embeddings="*", progress=stage(tell, 0.0, 0.01))
        strongest = svd.strongest(self.matrices, embeddings="*", samples=200, seed=self.seed)
        sorted_by = clusters_of(self.model, self.matrices, self.seed, stage(tell, 0.01, 0.04))
        chosen, edits = self._edits(table, svd)
        conditions: list[tuple[str, Edit | None]] = [("unedited", None)]
        for i, edit in enumerate(edits):
            conditions += [("edit", edit), ("control", edit.control(self.seed + i))]
        trials = Trials(self.model, self.task, self.folder / "trials", self.workers)
        results = []
        for number, (kind, change) in enumerate(conditions):
            where = "" if change is None else f" of {change.matrix.name} [{number} of {len(conditions) - 1}]"
            start, share = 0.04 + 0.92 * number / len(conditions), 0.92 / len(conditions)
            results.append(trials.run(self.units, change, _counted(tell, kind + where, start, share)))
        baseline, edited, controls = results[0], results[1::2], results[2::2]
        summary = verdicts(chosen, edits, baseline, edited, controls)
        tell("drawing", 0.96)
        names = [edit_name(row) for row in summary.to_dict("records")]
        arms = Arms(self.model, baseline, edits, names, edited, controls)
        sections = self.task.sections(arms, self.folder)
        tell("writing the report", 0.99)
        result = StudyResult(
            table=table,
            strongest=strongest,
            verdicts=summary,
            baseline=baseline,
            edited=edited,
            controls=controls,
            edits=edits,
            spearman=rank_correlation(summary["cosine"].abs(), summary["damage_beyond_control"], seed=self.seed),
            sections=sections,
            report=self.folder / "report.html",
            svd=svd,
            facts=self._facts(chosen),
            clusters=sorted_by,
        )
        write_study(result, self.folder)
        tell("done", 1.0)
        return result

    def _edits(self, table: pd.DataFrame, svd: WeightSVD) -> tuple[pd.DataFrame, list[Edit]]:
        """The edits, and a row of the scan for each."""
        if self.given is not None:
            places = [(edit.matrix.name, edit.side, edit.sv[0]) for edit in self.given]
            return rows_of_directions(table, places), self.given
        chosen = choose_directions(table, svd, self.edits)
        return chosen, [
            SingularEdit(
                self.model,
                row["matrix"],
                int(row["sv"]),
                side=row["side"],
                value=self.value,
                seed=self.seed,
                decomposition=svd[row["matrix"]],
            )
            for _, row in chosen.iterrows()
        ]

    def _facts(self, chosen: pd.DataFrame) -> dict[str, Any]:
        return {
            "model": self.name,
            "seed": self.seed,
            "value": self.value,
            "command": self.command,
            "software": list(self.task.software),
            "without_contrast": list(chosen.attrs["without_contrast"]),
        }


def _counted(tell: ProgressCallback, what: str, start: float, share: float) -> Count:
    """Report ``what``; the result reports how much of its ``share`` of the whole study is done."""
    tell(what, start)
    return lambda done, total: tell(what, start + share * done / total)
