"""The main job: scan a model, choose directions, edit them beside controls, measure, and write the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dt_lens.arguments import local_path, require_writable
from dt_lens.behaviour.agents.episodes import FailureRule, check_rule
from dt_lens.behaviour.agents.evaluation import Evaluation
from dt_lens.behaviour.agents.recording import record_actions
from dt_lens.behaviour.video.video import SideBySide, side_by_side
from dt_lens.edits.edit import Edit
from dt_lens.edits.singular import SingularEdit
from dt_lens.errors import DtLensError
from dt_lens.lens.protocol import require_agent
from dt_lens.progress import Count, ProgressCallback, reporting
from dt_lens.statistics.rank_correlation import rank_correlation
from dt_lens.study.page import write_study
from dt_lens.study.result import StudyResult
from dt_lens.study.selection import choose_directions
from dt_lens.study.trials import Trials, verdicts
from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["MATRICES", "Study"]

MATRICES = ("*.W_in", "*.W_out", "*.OV.*")


@dataclass
class Study:
    """A study of one decision transformer.

    ``run`` does it. Run again with the same settings, it resumes: finished evaluations are read from ``out``.

    Args:
        model: a ``HookedDecisionTransformer`` that knows its environment and target returns.
        out: the folder for the report, the tables and the trials.
        name: what the report calls the model.
        matrices: which matrices to scan and to choose from; shell patterns.
        episodes: paired episodes of the unedited model, of each edit and of each control.
        edits: how many strong directions to edit, each with a weak one as its contrast.
        value: what the edits put in place of a singular vector; see ``SingularEdit``.
        seed: of the episodes, of the null's sampling and of the controls.
        target_return: what the agent is asked for; the model's first one by default.
        failure: what counts as failing; that of the model's facts by default, else a guess; see ``Evaluation``.
        workers: worker processes of the rollouts.
        video: draw the unedited and the worst-hit agent side by side if the machine can.
        command: the command line that makes the report again, for the report.
    """

    model: Any
    out: str | Path
    name: str = "the model"
    matrices: Sequence[str] = MATRICES
    episodes: int = 50
    edits: int = 2
    value: Any = "constant"
    seed: int = 0
    target_return: float | None = None
    failure: FailureRule | None = None
    workers: int | None = None
    video: bool = True
    command: str = ""

    @property
    def folder(self) -> Path:
        """``out``, as a path."""
        return local_path(self.out, "out")

    def run(self, progress: bool | ProgressCallback = False) -> StudyResult:
        """Do the study and write ``report.html``, ``scan.csv`` and ``verdicts.csv``.

        Args:
            progress: ``True`` for a bar on standard error, or a function of (what is being done, share done).

        Raises:
            DtLensError: for a model or settings that cannot be studied, or a folder that cannot be written.
        """
        require_agent(self.model, "A study")
        if self.failure is not None:
            check_rule(self.failure)
        if self.episodes < 2:
            raise DtLensError(f"episodes is {self.episodes}; a study needs at least 2, and 50 or more to decide much.")
        if self.edits < 1:
            raise DtLensError(f"edits is {self.edits}; a study needs at least 1.")
        require_writable(*(self.folder / name for name in ("report.html", "scan.csv", "verdicts.csv", "trials/trial")))
        with reporting(progress) as tell:
            return self._run(tell)

    def _run(self, tell: ProgressCallback) -> StudyResult:
        tell("scanning the weights", 0.0)
        svd = WeightSVD(self.model)
        # Every embedding with every side: the claim to be tested is that W_in, which reads, matches the outputs.
        table = svd.scan(self.matrices, seed=self.seed, embeddings="*")
        strongest = svd.strongest(self.matrices, embeddings="*", samples=200, seed=self.seed)
        chosen = choose_directions(table, svd, self.edits)
        edits: list[Edit] = [
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
        conditions: list[tuple[str, Edit | None]] = [("unedited", None)]
        for i, edit in enumerate(edits):
            conditions += [("edit", edit), ("control", edit.control(self.seed + i))]
        settings = {"episodes": self.episodes, "seed": self.seed, "target_return": self.target_return}
        trials = Trials(self.model, self.folder / "trials", self.workers, failure=self.failure, **settings)
        results = []
        for number, (kind, change) in enumerate(conditions):
            where = "" if change is None else f" of {change.matrix.name} [{number} of {len(conditions) - 1}]"
            start, share = 0.04 + 0.92 * number / len(conditions), 0.92 / len(conditions)
            results.append(trials.run(change, _counted(tell, kind + where, start, share)))
        baseline, edited, controls = results[0], results[1::2], results[2::2]
        summary = verdicts(chosen, edits, baseline, edited, controls)
        tell("drawing the video", 0.96)
        video = self._video(summary, edits, baseline, edited)
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
            video=video,
            report=self.folder / "report.html",
            svd=svd,
            facts={"model": self.name, "seed": self.seed, "value": self.value, "command": self.command},
        )
        write_study(result, self.folder)
        tell("done", 1.0)
        return result

    def _video(
        self, summary: pd.DataFrame, edits: list[Edit], baseline: Evaluation, edited: list[Evaluation]
    ) -> SideBySide:
        if not self.video:
            return SideBySide(None, "There is no video: it was switched off.")
        if not (summary["difference"] < 0).any():
            return SideBySide(None, "There is no video: no edit lowered the mean return.")
        worst = int(summary["difference"].to_numpy().argmin())
        losses = baseline.returns - edited[worst].returns
        # The seed whose loss is the median one: a typical episode, not the most spectacular.
        episode = int(losses.argsort(kind="stable")[len(losses) // 2])
        seed = int(baseline.seeds[episode])
        unedited = record_actions(self.model, baseline, seed)
        with edits[worst]:
            hit = record_actions(self.model, edited[worst], seed)
        row = summary.iloc[worst]
        return side_by_side(
            baseline.environment,
            unedited,
            hit,
            seed=seed,
            file=self.folder / "worst.mp4",
            captions=("unedited", f"{row['matrix']} sv={row['sv']} edited"),
            environment_kwargs=baseline.environment_kwargs,
            ended="fell" if baseline.failure == "terminated" and not baseline.failure_guessed else "ended",
        )


def _counted(tell: ProgressCallback, what: str, start: float, share: float) -> Count:
    """Report ``what``; the result reports how much of its ``share`` of the whole study is done."""
    tell(what, start)
    return lambda done, total: tell(what, start + share * done / total)
