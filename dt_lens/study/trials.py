"""Evaluate a model under edits and their controls, all on the same seeds, and judge the edits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from dt_lens.arguments import read_checked_json, write_checked_json
from dt_lens.behaviour.agents.episodes import FailureRule, guess_rule, known_rule
from dt_lens.behaviour.agents.evaluation import Evaluation
from dt_lens.behaviour.agents.identity import model_id
from dt_lens.behaviour.evaluate import evaluate
from dt_lens.edits.edit import Edit
from dt_lens.errors import DtLensError
from dt_lens.progress import Count
from dt_lens.statistics.multiplicity import q_values

__all__ = ["Trials", "verdicts"]

# Columns of the scan that a verdict repeats.
KEPT = ("role", "matrix", "layer", "side", "sv", "sigma", "embedding", "label", "cosine", "z", "q_value")


class Trials:
    """Evaluates a model, edited or not, and keeps each evaluation in a file, so that interrupted studies resume.

    Args:
        model: a wrapped agent.
        folder: for the files.
        workers: worker processes.
        failure: what counts as failing; that of the model's facts by default, else a guess. Episodes that are kept are
            judged by it again.
        settings: what else ``evaluate`` takes. With the weights they name the files, so their order counts.
    """

    def __init__(
        self,
        model: Any,
        folder: Path,
        workers: int | None = None,
        *,
        failure: FailureRule | None = None,
        **settings: Any,
    ) -> None:
        self.failure = failure
        self.model, self.folder, self.workers, self.settings = model, folder, workers, settings

    def run(self, edit: Edit | None = None, progress: Count | None = None) -> Evaluation:
        """The evaluation under ``edit``, read from its file if the same weights ran with the same settings before."""
        with edit or nullcontext():
            key = hashlib.sha256(json.dumps([model_id(self.model), self.settings]).encode()).hexdigest()[:16]
            file = self.folder / f"{key}.json"
            kept = _read(file)
            if kept is None:
                kept = evaluate(self.model, workers=self.workers, progress=progress or False, **self.settings)
                write_checked_json(file, kept.to_dict())
        rule = known_rule(self.failure, self.model.facts, kept.environment)
        guessed = rule is None
        return replace(
            kept.with_failure(guess_rule(kept.environment) if rule is None else rule), failure_guessed=guessed
        )


def _read(file: Path) -> Evaluation | None:
    """The evaluation in ``file``; ``None`` if it does not exist, or is damaged: then the trial runs again.

    Files of dt-lens 0.2 and before have no checksum around the evaluation.
    """
    kept = read_checked_json(file)
    try:
        return Evaluation.from_dict(json.loads(file.read_text(encoding="utf-8")) if kept is None else kept)
    except (OSError, ValueError, KeyError, TypeError, DtLensError):
        return None


def verdicts(
    chosen: pd.DataFrame,
    edits: Sequence[Edit],
    baseline: Evaluation,
    edited: Sequence[Evaluation],
    controls: Sequence[Evaluation],
) -> pd.DataFrame:
    """Judge every edit against its control: a row per edit.

    ``difference`` and ``control_difference`` are mean paired differences of the return from the unedited agent;
    ``damage_beyond_control`` is the mean paired return of the control less that of the edit, with a bootstrap interval;
    ``p_value`` its two-sided sign-flip permutation test; ``q`` Benjamini-Hochberg's over the edits.
    """
    rows: list[dict[str, Any]] = []
    for direction, edit, result, control in zip(chosen.to_dict("records"), edits, edited, controls, strict=True):
        effect, control_effect, beyond = result.compare(baseline), control.compare(baseline), result.compare(control)
        low, high = beyond.difference_interval
        rows.append(
            {
                **{str(name): direction[name] for name in KEPT},
                "energy": edit.energy,
                "return_mean": result.mean,
                "difference": effect.difference,
                "difference_low": effect.difference_interval[0],
                "difference_high": effect.difference_interval[1],
                "control_difference": control_effect.difference,
                "control_difference_low": control_effect.difference_interval[0],
                "control_difference_high": control_effect.difference_interval[1],
                "damage_beyond_control": -beyond.difference,
                "beyond_low": -high,
                "beyond_high": -low,
                "damage_per_energy": -effect.difference / edit.energy,
                "p_value": beyond.p_value,
                "failure_rate": effect.failure_edited,
                "control_failure_rate": control_effect.failure_edited,
                "note": edit.note,
            }
        )
    table = pd.DataFrame(rows)
    table["q"] = q_values(table["p_value"])
    table["verdict"] = [
        _verdict(*row) for row in zip(table["q"], table["damage_beyond_control"], table["difference"], strict=True)
    ]
    return table


def _verdict(q: float, beyond: float, difference: float) -> str:
    """In words, by the sign of the edit's own mean ``difference`` from the unedited agent.

    >>> _verdict(0.01, 5.0, -8.0), _verdict(0.01, -5.0, 3.0), _verdict(0.01, 5.0, 3.0)
    ('hurts more than its control', 'improves more than its control', 'improves less than its control')
    >>> _verdict(0.01, 5.0, 0.0)
    'leaves the mean as it is, unlike its control'
    """
    if not q < 0.05:
        return "no difference from its control shown"
    if difference == 0:
        return "leaves the mean as it is, unlike its control"
    if beyond > 0:
        return "hurts more than its control" if difference < 0 else "improves less than its control"
    return "improves more than its control" if difference > 0 else "hurts less than its control"
