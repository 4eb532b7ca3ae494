"""The subjects of ``dt-lens bench``, in the order in which they are measured."""

from __future__ import annotations

__all__ = ["SUBJECTS"]

SUBJECTS = {
    "start_up": "from nothing to the first singular value",
    "rollouts": "environment steps per second, beside the machine's limit and the usual loop",
    "batched_edits": "many edits in one batch, beside unedited episodes",
    "training": "a training step, beside Hugging Face's Trainer",
    "solvers": "singular directions, beside SVDInterpreter and torch.linalg.svd, by shape and spectrum",
    "edits": "entering and leaving an edit, beside copying the matrix and rebuilding it",
    "growth": "time and memory against episodes, edits, workers, width, depth and vocabulary",
}
