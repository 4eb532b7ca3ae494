"""A training run: steps of an optimizer, a curve, and a checkpoint from which it resumes with the same bits."""

from __future__ import annotations

import json
import time
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dt_lens.arguments import atomic_write
from dt_lens.errors import DtLensError, because
from dt_lens.training.settings import AgentSettings, TextSettings

__all__ = ["CHECKPOINT", "TrainingRun", "saved_state"]

CHECKPOINT = "checkpoint.pt"
CURVE = "curve.jsonl"


class TrainingRun(ABC):
    """Trains a model step by step; a subclass says what the loss is, what is measured and what is written.

    Args:
        settings: everything besides the data that decides what the run ends with.
        data: what identifies the data, by the name that an error sentence uses; it must not change on resuming.
        out: the folder of the checkpoint and the curve.
        model: on its device.
        optimizer: over its parameters.
    """

    def __init__(
        self,
        settings: AgentSettings | TextSettings,
        data: dict[str, str],
        out: Path,
        model: Any,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.settings, self.out, self.model, self.optimizer = settings, out, model, optimizer
        self.device: torch.device = next(model.parameters()).device
        self.step = 0
        self.curve: list[dict[str, Any]] = []
        self._data = data
        self._losses = torch.zeros((), device=self.device)
        self._counted = 0
        self._kept = 0  # the step of the newest checkpoint
        self._began = time.monotonic()

    @abstractmethod
    def loss(self) -> Tensor:
        """The loss of a new batch."""

    @abstractmethod
    def measure(self) -> dict[str, Any]:
        """Evaluate the model as it is now: what a row of the curve holds besides the loss."""

    @abstractmethod
    def progress(self) -> Any:
        """What ``report`` is called with after every step."""

    @abstractmethod
    def write(self) -> None:
        """Write the model to ``out``."""

    @property
    def mean_loss(self) -> float:
        """The mean loss of the steps since the last row of the curve; just after a row, the row's own."""
        if not self._counted:
            return float(self.curve[-1]["loss"]) if self.curve else 0.0
        return float(self._losses) / self._counted

    def finish(self, eval_every: int, checkpoint_every: int, report: Callable[[Any], None]) -> None:
        """Train to the last step, measuring every ``eval_every`` steps (0: only at the end), and write the model.

        Raises:
            KeyboardInterrupt: on Ctrl-C, with a sentence that says what is kept.
        """
        try:
            self._finish(eval_every, checkpoint_every, report)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._stopped()) from None

    def _finish(self, eval_every: int, checkpoint_every: int, report: Callable[[Any], None]) -> None:
        steps = self.settings.steps
        while self.step < steps:
            self.learn()
            last = self.step == steps
            if last or (eval_every and self.step % eval_every == 0):
                self.note(**self.measure())
            if last or self.step % checkpoint_every == 0:
                self.save()
            report(self.progress())
        self.model.eval()
        self.write()

    def _stopped(self) -> str:
        """What is kept of an interrupted run, and how to go on."""
        stopped = f"Stopped at step {self.step} of {self.settings.steps}"
        if not self._kept:
            return f"{stopped}, before the first checkpoint; nothing is kept, and the same command starts again."
        return (
            f"{stopped}; {self.out / CHECKPOINT} keeps step {self._kept}, and the same call resumes from there "
            "(on the command line without --fresh)."
        )

    def learn(self) -> None:
        """Train on one batch, at the learning rate of this step."""
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
        """A context in which matrix products run in bfloat16, if the settings say so."""
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
            DtLensError: if the folder cannot be written.
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
        self._kept = self.step
        with atomic_write(self.out / CURVE) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in self.curve), encoding="utf-8")

    def resume(self, state: dict[str, Any] | None = None) -> None:
        """Resume from the checkpoint in ``out``, if there is one; ``state`` is what ``saved_state`` read of it.

        Raises:
            DtLensError: if it cannot be read, or belongs to another run.
        """
        state = saved_state(self.out, self.device) if state is None else state
        if state is None:
            return
        saved = json.loads(state["settings"]) | {name: state[name] for name in self._data if name in state}
        mine = json.loads(json.dumps(asdict(self.settings))) | self._data
        other = [name for name, value in mine.items() if saved.get(name) != value]
        if other:
            raise DtLensError(
                f"{self.out} holds a run with another {', '.join(other)}; choose another folder, or start again there "
                "(--fresh; resume=False)."
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"].cpu())
            self.step = self._kept = state["step"]
            self.curve = json.loads(state["curve"])
            self._losses, self._counted = state["losses"], state["counted"]
        except Exception as error:  # of another version: other names, shapes or parts
            raise DtLensError(
                f"{self.out / CHECKPOINT} does not fit this run's model ({because(error)}); choose another folder, or "
                "start again there (--fresh; resume=False)."
            ) from error
        if self.curve:
            self._began = time.monotonic() - self.curve[-1]["seconds"]


def saved_state(out: Path, device: torch.device) -> dict[str, Any] | None:
    """The checkpoint in ``out`` as ``TrainingRun.save`` wrote it; ``None`` if there is none.

    Raises:
        DtLensError: if it cannot be read.
    """
    file = out / CHECKPOINT
    if not file.exists():
        return None
    try:
        with zipfile.ZipFile(file) as archive:  # torch.load does not compare the checksums in it
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
        dict(json.loads(state["settings"]))
    except Exception as error:  # a damaged archive or pickle may raise anything
        raise DtLensError(f"{file} is damaged or not a training checkpoint; delete it to start again.") from error
    return state
