"""What every training run is: steps of AdamW, a curve, and a checkpoint from which it goes on to the same bits."""

from __future__ import annotations

import json
import math
import pickle
import time
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dt_lens.arguments import atomic_write
from dt_lens.errors import DtLensError

__all__ = ["Schedule", "TrainingRun"]

CHECKPOINT = "checkpoint.pt"
CURVE = "curve.jsonl"


class Schedule:
    """What the settings of every run have; a dataclass of all that decides what a run ends with, beside the data."""

    steps: int
    lr: float
    warmup: int
    clip: float
    bf16: bool

    def rate(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then half a cosine down to a hundredth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        along = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * along)) / 2)


class TrainingRun(ABC):
    """A training run between two steps.

    Args:
        settings: a dataclass.
        data: what else has to be the same for the run to go on, by the name that a message calls it.
        out: the folder of the checkpoint and the curve.
        model: on its device.
        optimizer: over its parameters.
    """

    def __init__(
        self, settings: Any, data: dict[str, str], out: Path, model: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        self.settings, self.out, self.model, self.optimizer = settings, out, model, optimizer
        self.device: torch.device = next(model.parameters()).device
        self.step = 0
        self.curve: list[dict[str, Any]] = []
        self._data = data
        self._losses = torch.zeros((), device=self.device)
        self._counted = 0
        self._began = time.monotonic()

    @abstractmethod
    def loss(self) -> Tensor:
        """The loss of a fresh batch."""

    @property
    def mean_loss(self) -> float:
        """Of the steps since the last row of the curve."""
        return float(self._losses) / max(1, self._counted)

    def learn(self) -> None:
        """One step."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step)
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.step += 1
        self._losses += loss.detach()
        self._counted += 1

    def autocast(self) -> torch.autocast:
        """Matrix products in bfloat16 where the settings say so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def note(self, **measured: Any) -> None:
        """Add a row to the curve."""
        row = {"step": self.step, "loss": self.mean_loss, "lr": self.settings.rate(self.step - 1)}
        self.curve.append(row | {"seconds": round(time.monotonic() - self._began, 1)} | measured)
        self._losses.zero_()
        self._counted = 0

    def save(self) -> None:
        """Write the checkpoint and the curve.

        Raises:
            DtLensError: when the folder cannot be written.
        """
        state = {
            "settings": json.dumps(asdict(self.settings)),
            **self._data,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "losses": self._losses,
            "counted": self._counted,
            "curve": json.dumps(self.curve),
        }
        with atomic_write(self.out / CHECKPOINT, RuntimeError) as part:  # torch.save's own error for a full disk
            torch.save(state, part)
        with atomic_write(self.out / CURVE) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in self.curve), encoding="utf-8")

    def resume(self) -> None:
        """Continue from the checkpoint in ``out``, where there is one.

        Raises:
            DtLensError: for one that cannot be read, or is of another run.
        """
        file = self.out / CHECKPOINT
        if not file.exists():
            return
        try:
            state = torch.load(file, map_location=self.device, weights_only=True)
            settings, data = json.loads(state["settings"]), {name: state[name] for name in self._data}
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise DtLensError(f"{file} cannot be read as a training checkpoint; delete it to start again.") from error
        mine = json.loads(json.dumps(asdict(self.settings)))
        other = [name for name, value in mine.items() if settings.get(name) != value]
        other += [name for name, value in self._data.items() if data[name] != value]
        if other:
            raise DtLensError(
                f"{self.out} holds a run with another {', '.join(other)}; choose another folder, or begin anew "
                "(--fresh; resume=False)."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        self.step = state["step"]
        self.curve = json.loads(state["curve"])
        self._losses, self._counted = state["losses"], state["counted"]
        if self.curve:
            self._began = time.monotonic() - self.curve[-1]["seconds"]
