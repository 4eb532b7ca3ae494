"""Predict windows of tokens: the loss of each, and how far the predictions are from the unedited model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dt_lens.behaviour.job import Row, repeated, versions_of
from dt_lens.behaviour.texts.moved import Moved, most_moved
from dt_lens.behaviour.texts.windows import Windows
from dt_lens.edits.edit import suspended
from dt_lens.edits.state import state_of
from dt_lens.errors import DtLensError
from dt_lens.lens.forward_mode import measuring
from dt_lens.lens.weights import replaced
from dt_lens.progress import Count

__all__ = ["SOFTWARE", "TextJob", "predictions", "read_windows", "token_losses"]

SOFTWARE = ("torch", "transformers", "tokenizers", "numpy")  # another version of one of these may give other bits
AT_ONCE = 2**28  # bytes of logits to keep between running without edits and with them


def read_windows(
    model: Any, windows: Windows, units: Sequence[int], progress: Count | None = None
) -> tuple[list[tuple[int, float, float]], tuple[Moved, ...]]:
    """(predicted tokens, loss, KL) of each of ``units``, and the tokens that moved most.

    Every window is run by itself, so that its result depends on the model and its tokens alone, to the last bit on a
    CPU. If edits are in force, the windows also run with them suspended. Called without gradients.
    """
    edited = bool(state_of(model).edits)
    rows: list[tuple[int, float, float]] = []
    before = after = torch.zeros((), dtype=torch.float64)  # sums over positions, then [d_vocab]
    positions = 0
    for group in _groups([windows.tokens[unit] for unit in units], int(model.cfg.d_vocab)):
        bare: list[Tensor] = []
        if edited:
            with suspended(model):
                bare = [_logits(model, window, windows.unpredicted) for window in group]
        for i, window in enumerate(group):
            loss, kl, p, q = _against(
                _logits(model, window, windows.unpredicted), bare[i] if edited else None, window[windows.unpredicted :]
            )
            if q is not None:
                before, after, positions = before + q.sum(0), after + p.sum(0), positions + len(p)
            rows.append((len(window) - windows.unpredicted, loss, kl))
            if progress is not None:
                progress(len(rows), len(units))
    return rows, most_moved(before / positions, after / positions, model) if edited else ()


def _against(
    logits: Tensor, bare: Tensor | None, target: np.ndarray[Any, Any]
) -> tuple[float, float, Tensor, Tensor | None]:
    """Loss and KL of a window, and the probabilities ``[predicted, d_vocab]`` with the edits and without."""
    log_p = logits.double().log_softmax(-1)
    loss = float(_losses(log_p, target).mean())
    p = log_p.exp()
    if bare is None:
        return loss, 0.0, p, None
    log_q = bare.double().log_softmax(-1)
    q = log_q.exp()
    # Rounding may leave a little less than zero where the two are nearly the same.
    return loss, float((q * (log_q - log_p)).sum(-1).clamp(min=0).mean()), p, q


def token_losses(model: Any, windows: Windows, unit: int) -> NDArray[np.float64]:
    """The loss of each predicted token of a window, ``[predicted]``, in nats. Called without gradients."""
    window = windows.tokens[unit]
    log_p = _logits(model, window, windows.unpredicted).double().log_softmax(-1)
    return np.asarray(_losses(log_p, window[windows.unpredicted :]).cpu())


def _losses(log_p: Tensor, target: np.ndarray[Any, Any]) -> Tensor:
    """The loss of each token of ``target``, ``[predicted]``, under log probabilities ``[predicted, d_vocab]``."""
    return -log_p.gather(-1, torch.from_numpy(target).to(log_p.device)[:, None])[:, 0]


def predictions(model: Any, windows: Windows, units: Sequence[int]) -> NDArray[np.int64]:
    """How often each token is the likeliest one, ``[d_vocab]``. Called without gradients."""
    counts = torch.zeros(int(model.cfg.d_vocab), dtype=torch.int64)
    for unit in units:
        best = _logits(model, windows.tokens[unit], windows.unpredicted).argmax(-1)
        counts += torch.bincount(best.cpu(), minlength=len(counts))
    return np.asarray(counts)


def _groups(tokens: Sequence[np.ndarray[Any, Any]], vocabulary: int) -> Iterator[Sequence[np.ndarray[Any, Any]]]:
    size = max(1, AT_ONCE // (4 * vocabulary * max(len(window) for window in tokens)))
    for i in range(0, len(tokens), size):
        yield tokens[i : i + size]


def _logits(model: Any, window: np.ndarray[Any, Any], unpredicted: int) -> Tensor:
    """The logits of each predicted token from the tokens before it, ``[predicted, d_vocab]``."""
    device = next(iter(model.weights.values())).device
    out = model(torch.from_numpy(window)[None].to(device))
    logits: Tensor = getattr(out, "logits", out)[0, unpredicted - 1 : -1]
    if not bool(torch.isfinite(logits).all()):
        raise DtLensError(
            "The model predicts a logit that is NaN or infinite; its weights, or an edit of them, are too large for "
            "its precision."
        )
    return logits


@dataclass
class TextJob:
    """A language model with its windows, packed for any process; it keeps what the unedited model predicts."""

    model: Any
    windows: Windows
    _bare: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "windows": self.windows, "_bare": {}}

    def provenance(self) -> dict[str, Any]:
        return versions_of(SOFTWARE)

    def sample(self) -> str | None:
        return repeated(lambda: self.run({}, range(min(2, len(self.windows)))))

    def run(self, change: Mapping[str, Tensor], units: Sequence[int]) -> list[Row]:
        w = self.windows
        with measuring(self.model):
            bare = {unit: self._unedited(unit) for unit in units} if change else {}
            rows: list[Row] = []
            with replaced(self.model.weights, change):
                for unit in sorted(units):
                    target = w.tokens[unit][w.unpredicted :]
                    logits = _logits(self.model, w.tokens[unit], w.unpredicted)
                    loss, kl, _, _ = _against(logits, bare.get(unit), target)
                    rows.append((unit, len(target), loss, kl))
            return rows

    def _unedited(self, unit: int) -> Tensor:
        """The unedited model's logits of a window; kept as far as memory allows."""
        if unit in self._bare:
            return self._bare[unit]
        logits = _logits(self.model, self.windows.tokens[unit], self.windows.unpredicted)
        if (len(self._bare) + 1) * logits.numel() * logits.element_size() <= AT_ONCE:
            self._bare[unit] = logits
        return logits
