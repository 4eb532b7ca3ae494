"""The main job: scan a model, choose directions, edit them beside controls, measure, and write the report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dt_lens.arguments import atomic_write, local_path
from dt_lens.behaviour.agents.evaluation import Evaluation
from dt_lens.behaviour.agents.recording import record_actions
from dt_lens.behaviour.video.video import SideBySide, side_by_side
from dt_lens.edits.singular import Edit, SingularEdit
from dt_lens.errors import DtLensError
from dt_lens.statistics.rank_correlation import rank_correlation
from dt_lens.study.result import StudyResult
from dt_lens.study.selection import choose_directions
from dt_lens.study.trials import Arm, Trials, verdicts
from dt_lens.svd.weight_svd import WeightSVD

__all__ = [
    "MATRICES",
    "Study",
]

MATRICES = ("*.W_in", "*.W_out", "*.OV.*")
Report = Callable[[str, float], None]  # what is being done, and the share of the whole that is done


@dataclass
class Study:
    """A study of one decision transformer; ``run`` does it, and again with the same settings it goes on where it
    stopped.

    Args:
        model: a ``HookedDecisionTransformer`` that knows its environment and target returns.
        out: the folder for the report, the tables and the trials.
        name: what the report calls the model.
        matrices: which matrices to scan and to choose from; shell patterns.
        episodes: paired episodes of every arm.
        edits: how many strong directions, each with a weak one as its contrast.
        value: what the edits put in place of a singular vector; see ``SingularEdit``.
        seed: of the episodes, of the null's sampling and of the controls.
        target_return: what the agent is asked for; the model's first one by default.
        workers: worker processes of the rollouts.
        video: draw the unedited and the worst-hit agent side by side where the machine can.
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
    workers: int | None = None
    video: bool = True
    command: str = ""

    @property
    def folder(self) -> Path:
        """``out``, as a path."""
        return local_path(self.out, "out")

    def run(self, report: Report | None = None) -> StudyResult:
        """Do the study and write ``report.html``, ``scan.csv`` and ``verdicts.csv``.

        Raises:
            DtLensError: for settings or a model that make no study, or a folder that cannot be written.
        """
        if not hasattr(self.model, "facts"):
            raise DtLensError(
                "A study takes a decision transformer from dt_lens.load or dt_lens.wrap, not a "
                f"{type(self.model).__name__}; of a language model, scan the weights and evaluate its texts."
            )
        if self.episodes < 2:
            raise DtLensError(
                f"episodes is {self.episodes}; a study compares at least 2, and 50 or more say something."
            )
        if self.edits < 1:
            raise DtLensError(f"edits is {self.edits}; a study needs at least 1.")
        tell = report or (lambda _what, _share: None)
        self._require_writable()
        tell("scanning the weights", 0.0)
        svd = WeightSVD(self.model)
        # Every embedding meets every side: the claim to be tested is that W_in, which reads, matches what is put out.
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
        arms = [
            Arm("unedited"),
            *(
                arm
                for i, e in enumerate(edits)
                for arm in (Arm(f"edit {i}", e), Arm(f"control {i}", e.control(self.seed + i)))
            ),
        ]
        trials = Trials(self.model, self.folder / "trials", self.episodes, self.seed, self.target_return, self.workers)
        results = []
        for number, arm in enumerate(arms):
            with _labelled(tell, arm, number, len(arms)) as progress:
                results.append(trials.run(arm, progress))
        baseline, edited, controls = results[0], results[1::2], results[2::2]
        summary = verdicts(chosen, edits, baseline, edited, controls)
        tell("drawing the video", 0.96)
        video = self._video(summary, edits, baseline, edited)
        tell("writing the report", 0.99)
        rho = rank_correlation(summary["cosine"].abs(), summary["damage_beyond_control"], seed=self.seed)
        result = StudyResult(
            table,
            strongest,
            summary,
            baseline,
            edited,
            controls,
            edits,
            rho,
            video,
            self.folder / "report.html",
        )
        self._write(result, svd)
        tell("done", 1.0)
        return result

    def _require_writable(self) -> None:
        """Find out now, not after minutes of rollouts, that the results cannot be written."""
        probe = self.folder / "trials" / ".writable"
        with atomic_write(probe) as part:
            part.write_bytes(b"0" * 4096)
        probe.unlink()

    def _video(
        self, summary: pd.DataFrame, edits: list[Edit], baseline: Evaluation, edited: list[Evaluation]
    ) -> SideBySide:
        if not self.video:
            return SideBySide(None, "There is no video: it was switched off.")
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
            ended="fell",
        )

    def _write(self, result: StudyResult, svd: WeightSVD) -> None:
        from dt_lens.study.page import write_study

        for name, table in (("scan", result.table), ("verdicts", result.verdicts)):
            with atomic_write(self.folder / f"{name}.csv") as part:
                table.to_csv(part, index=False)
        write_study(self, result, svd)


@contextlib.contextmanager
def _labelled(tell: Report, arm: Arm, number: int, count: int) -> Iterator[Callable[[float, int], None]]:
    what = (
        arm.name if arm.edit is None else f"{arm.name.split()[0]} of {arm.edit.matrix.name} [{number} of {count - 1}]"
    )
    start, share = 0.04 + 0.92 * number / count, 0.92 / count
    tell(what, start)
    yield lambda done, total: tell(what, start + share * done / total)
