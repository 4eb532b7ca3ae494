"""Run the arms of a study: the unedited agent, each edit, each edit's control; all on the same seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dt_lens.arguments import atomic_write
from dt_lens.behaviour.agents.evaluation import Evaluation
from dt_lens.behaviour.agents.identity import model_id
from dt_lens.behaviour.evaluate import evaluate
from dt_lens.edits.singular import Edit
from dt_lens.errors import DtLensError
from dt_lens.statistics.multiplicity import q_values
from dt_lens.statistics.outcomes import bootstrap_interval

__all__ = ["Arm", "Trials", "verdicts"]

# What a verdict keeps of the scan's row of its direction.
KEPT = ("role", "matrix", "layer", "side", "sv", "sigma", "embedding", "label", "cosine", "z", "q_value")


@dataclass(frozen=True)
class Arm:
    """One condition of the study: the model with ``edit``, or as it is."""

    name: str
    edit: Edit | None = None


class Trials:
    """Evaluates arms and keeps each in a file, so that a study that was stopped goes on where it was."""

    def __init__(
        self, model: Any, folder: Path, episodes: int, seed: int, target_return: float | None, workers: int | None
    ) -> None:
        self.model, self.folder = model, folder
        self.settings: dict[str, Any] = {"episodes": episodes, "seed": seed, "target_return": target_return}
        self.workers = workers

    def run(self, arm: Arm, progress: Callable[[float, int], None] | None = None) -> Evaluation:
        """The arm's evaluation, from its file when it has been run before with the same weights and settings."""
        with arm.edit or nullcontext():
            key = hashlib.sha256(json.dumps([model_id(self.model), self.settings]).encode()).hexdigest()[:16]
            file = self.folder / f"{key}.json"
            kept = _read(file)
            if kept is None:
                kept = evaluate(self.model, workers=self.workers, progress=progress or False, **self.settings)
                _write(file, kept)
        return kept


def _write(file: Path, evaluation: Evaluation) -> None:
    with atomic_write(file) as part:
        part.write_text(json.dumps(evaluation.to_dict()), encoding="utf-8")


def _read(file: Path) -> Evaluation | None:
    if not file.exists():
        return None
    try:
        return Evaluation.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, DtLensError):
        return None  # a file that cannot be read is a trial that has to be run again


def verdicts(
    chosen: pd.DataFrame,
    edits: Sequence[Edit],
    baseline: Evaluation,
    edited: Sequence[Evaluation],
    controls: Sequence[Evaluation],
) -> pd.DataFrame:
    """A row per edit: what it did, what its control did, and whether it hurt more than its control.

    ``difference`` and ``control_difference`` are mean paired differences of the return from the unedited agent;
    ``damage_beyond_control`` is the mean paired return of the control less that of the edit, with a bootstrap interval;
    ``p_value`` its two-sided sign-flip permutation test; ``q`` Benjamini-Hochberg over the edits.
    """
    rows: list[dict[str, Any]] = []
    for direction, edit, result, control in zip(chosen.to_dict("records"), edits, edited, controls, strict=True):
        effect, control_effect, beyond = result.compare(baseline), control.compare(baseline), result.compare(control)
        interval = bootstrap_interval(control.returns - result.returns)
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
                "beyond_low": interval[0],
                "beyond_high": interval[1],
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
        _verdict(q, beyond) for q, beyond in zip(table["q"], table["damage_beyond_control"], strict=True)
    ]
    return table


def _verdict(q: float, beyond: float) -> str:
    if q < 0.05:
        return "hurts more than its control" if beyond > 0 else "hurts less than its control"
    return "no difference from its control shown"
