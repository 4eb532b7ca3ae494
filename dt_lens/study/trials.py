"""Evaluate a model under edits and their controls, all over the same units, and judge the edits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd

from dt_lens.arguments import as_json, read_checked_json, write_checked_json
from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.task import Task
from dt_lens.edits.edit import Edit
from dt_lens.errors import DtLensError
from dt_lens.progress import Count
from dt_lens.statistics.multiplicity import q_values

__all__ = ["Trials", "verdicts"]

# Columns of the scan that a verdict repeats.
KEPT = ("role", "matrix", "layer", "side", "sv", "sigma", "embedding", "label", "cosine", "z", "q_value")


class Trials:
    """Evaluates a model in its task, edited or not, and keeps each evaluation in a file, so that studies resume.

    Args:
        model: a wrapped model.
        task: what is run. Evaluations that are kept are judged by its failure rule again.
        folder: for the files.
        workers: worker processes.
    """

    def __init__(self, model: Any, task: Task, folder: Path, workers: int | None = None) -> None:
        self.model, self.task, self.folder, self.workers = model, task, folder, workers
        terms = task.terms
        self._setting = as_json([terms.task, dict(terms.measures), dict(terms.setting)])

    def run(self, units: range, edit: Edit | None = None, progress: Count | None = None) -> Evaluation:
        """The evaluation of ``units`` under ``edit``; from its file if the same weights ran them in this task before.

        Raises:
            DtLensError: if the units cannot be run, or the file cannot be written.
        """
        with edit or nullcontext():
            key = [self.task.identity(self.model)[1], self._setting, units.start, units.stop]
            name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
            file = self.folder / f"{name}.json"
            kept = self._read(file)
            if kept is None:
                kept = self.task.evaluate(self.model, units, workers=self.workers, progress=progress)
                write_checked_json(file, kept.to_dict())
        return kept.with_terms(self.task.terms)

    def _read(self, file: Path) -> Evaluation | None:
        """The evaluation in ``file``; ``None`` if it does not exist, or is damaged: then it runs again."""
        values = read_checked_json(file)
        try:
            return None if values is None else self.task.evaluation.from_dict(values)
        except DtLensError:
            return None


def verdicts(
    chosen: pd.DataFrame,
    edits: Sequence[Edit],
    baseline: Evaluation,
    edited: Sequence[Evaluation],
    controls: Sequence[Evaluation],
) -> pd.DataFrame:
    """Judge every edit against its control: a row per edit.

    ``difference`` and ``control_difference`` are mean paired differences of the outcome from the unedited model;
    ``damage_beyond_control`` is how much worse the edit is than its control on average, with a bootstrap interval;
    ``p_value`` its two-sided sign-flip permutation test; ``q`` Benjamini-Hochberg's over the edits. Failure rates are
    there where failing has a meaning.
    """
    terms = baseline.terms
    rows: list[dict[str, Any]] = []
    for direction, edit, result, control in zip(chosen.to_dict("records"), edits, edited, controls, strict=True):
        effect, control_effect, beyond = result.compare(baseline), control.compare(baseline), result.compare(control)
        failures = {"failure_rate": effect.failure_edited, "control_failure_rate": control_effect.failure_edited}
        rows.append(
            {
                **{str(name): direction[name] for name in KEPT},
                "energy": edit.energy,
                f"{terms.outcome}_mean": result.mean,
                "difference": effect.difference,
                "difference_low": effect.difference_interval[0],
                "difference_high": effect.difference_interval[1],
                "control_difference": control_effect.difference,
                "control_difference_low": control_effect.difference_interval[0],
                "control_difference_high": control_effect.difference_interval[1],
                "damage_beyond_control": beyond.damage,
                "beyond_low": beyond.damage_interval[0],
                "beyond_high": beyond.damage_interval[1],
                "damage_per_energy": effect.damage / edit.energy,
                "p_value": beyond.p_value,
                **({} if terms.failure is None else failures),
                "note": edit.note,
            }
        )
    table = pd.DataFrame(rows)
    table["q"] = q_values(table["p_value"])
    table["verdict"] = [
        _verdict(q, beyond, terms.sign * difference)
        for q, beyond, difference in zip(table["q"], table["damage_beyond_control"], table["difference"], strict=True)
    ]
    return table


def _verdict(q: float, beyond: float, gained: float) -> str:
    """In words, by what the edit itself ``gained`` on the unedited model on average: below 0 it hurts.

    >>> _verdict(0.01, 5.0, -8.0), _verdict(0.01, -5.0, 3.0), _verdict(0.01, 5.0, 3.0)
    ('hurts more than its control', 'improves more than its control', 'improves less than its control')
    >>> _verdict(0.01, 5.0, 0.0)
    'leaves the mean as it is, unlike its control'
    """
    if not q < 0.05:
        return "no difference from its control shown"
    if gained == 0:
        return "leaves the mean as it is, unlike its control"
    if beyond > 0:
        return "hurts more than its control" if gained < 0 else "improves less than its control"
    return "improves more than its control" if gained > 0 else "hurts less than its control"
