"""The task of language models: a unit is a window of text, which is numbered by its index; less loss is better."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from dt_lens.arguments import whole_number
from dt_lens.behaviour.arms import Arms
from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.job import Job
from dt_lens.behaviour.task import Columns, Task, require_portable
from dt_lens.behaviour.terms import Terms
from dt_lens.behaviour.texts.evaluation import TextEvaluation, terms_of_windows
from dt_lens.behaviour.texts.reading import SOFTWARE, TextJob, predictions, read_windows, token_losses
from dt_lens.behaviour.texts.windows import Texts, Windows, cut, read_texts
from dt_lens.errors import DtLensError
from dt_lens.lens.forward_mode import measuring
from dt_lens.progress import Count, ProgressCallback, silent

if TYPE_CHECKING:
    from dt_lens.report.page import Section

__all__ = ["CONTEXT", "HELD_OUT", "LossTask", "TextTask"]

COUNTED = 64  # windows in which predictions are counted
HELD_OUT = "heldout.txt"  # a text in the model's folder that it was not trained on
CONTEXT = 128  # the default: shorter windows are more units, and a long window's later tokens are easier


@dataclass(frozen=True)
class TextTask(Task):
    """Windows of a text that a language model predicts. Make one with ``TextTask.of``.

    Attributes:
        windows: the tokens of all windows.
        text: what is read, in words.
        context: tokens of a window.
    """

    # Windows are cheap beside episodes, and their losses vary less under an edit than returns do.
    counts: ClassVar[Mapping[str, int]] = {
        "evaluate": 2**40, "sweep": 32, "study": 128, "steer": 2**40, "choose": 32, "court": 200,
        "activations": 256,
    }  # fmt: skip
    evaluation: ClassVar[type[Evaluation]] = TextEvaluation
    software: ClassVar[tuple[str, ...]] = SOFTWARE

    windows: Windows
    text: str
    context: int

    @classmethod
    def of(
        cls, model: Any, texts: Texts | None = None, *, context: int | None = None, caller: str = "evaluate"
    ) -> Self:
        """Cut texts into windows by the model's tokenizer.

        Args:
            model: a wrapped language model, with its tokenizer.
            texts: the path of a text file, a text, or a list of texts; the held-out text in the model's folder by
                default.
            context: tokens of a window, at most the model's own; 128 by default.
            caller: who asks, for messages.

        Raises:
            DtLensError: for texts that cannot be read or are too short, a context that does not fit, or a model without
                a tokenizer.
        """
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise DtLensError(
                "The model has no tokenizer to read texts with; wrap it with one: dt_lens.wrap(model, tokenizer=...)."
            )
        longest = int(model.cfg.n_ctx)
        context = min(longest, CONTEXT) if context is None else whole_number(context, "context", 2)
        if context > longest:
            raise DtLensError(
                f"context is {context}, and the model reads no more than {longest} tokens; give at most that."
            )
        texts = _held_out(model, caller) if texts is None else texts
        read = read_texts(texts)
        return cls(cut(read, tokenizer, int(context)), _in_words(texts, read), int(context))

    @property
    def terms(self) -> Terms:
        return terms_of_windows(self.text, self.windows.text_id, self.context)

    def units(self, count: int | None, seed: int = 0, use: str = "evaluate") -> range:
        """The first ``count`` windows, or all if there are fewer; ``seed`` does not matter."""
        wanted = {**Task.counts, **self.counts}[use] if count is None else whole_number(count, "windows", 1)
        return range(min(wanted, len(self.windows)))

    def run(
        self, model: Any, units: Sequence[int], *, workers: int | None = None, progress: Count | None = None
    ) -> Columns:
        rows, _ = read_windows(model, self.windows, units, progress)
        return _columns(rows)

    def evaluate(
        self, model: Any, units: Sequence[int], *, workers: int | None = None, progress: Count | None = None
    ) -> Evaluation:
        with measuring(model):
            rows, moved = read_windows(model, self.windows, units, progress)
        about = self.about(model)
        about["details"] = about["details"] | {"moved": [list(row) for row in moved]}
        return self.result(units, _columns(rows), **about)

    @property
    def details(self) -> dict[str, Any]:
        return {"text": self.text, "bytes_per_token": self.windows.bytes_per_token}

    def pack(self, model: Any) -> Job:
        require_portable(model)
        return TextJob(model, self.windows)

    def common_outputs(self, model: Any, tell: ProgressCallback = silent) -> np.ndarray[Any, Any]:
        """How often the model predicts each token, greedily, in the first 64 windows."""
        tell("counting predictions", 0.1)
        with measuring(model):
            return predictions(model, self.windows, self.units(COUNTED))

    def sections(self, arms: Arms, folder: Path) -> list[Section]:
        from dt_lens.behaviour.texts.report import text_sections

        return text_sections(arms, self.windows)

    def batches(self, model: Any, units: Sequence[int]) -> Iterable[Any]:
        return (torch.from_numpy(self.windows.tokens[unit])[None] for unit in units)


@dataclass(frozen=True)
class LossTask(TextTask):
    """Windows of a text of which only the loss is measured, without the KL: half the work under an edit."""

    evaluation: ClassVar[type[Evaluation]] = Evaluation

    @classmethod
    def like(cls, task: TextTask) -> Self:
        """The task of the same windows."""
        return cls(task.windows, task.text, task.context)

    @property
    def terms(self) -> Terms:
        return replace(super().terms, task="text loss", measures={"tokens": "integer", "loss": "real"})

    def run(
        self, model: Any, units: Sequence[int], *, workers: int | None = None, progress: Count | None = None
    ) -> Columns:
        losses = []
        for unit in units:
            losses.append(token_losses(model, self.windows, unit))
            if progress is not None:
                progress(len(losses), len(units))
        return {"tokens": [len(loss) for loss in losses], "loss": [float(loss.mean()) for loss in losses]}

    def evaluate(
        self, model: Any, units: Sequence[int], *, workers: int | None = None, progress: Count | None = None
    ) -> Evaluation:
        return Task.evaluate(self, model, units, workers=workers, progress=progress)

    def pack(self, model: Any) -> Job:
        return Task.pack(self, model)


def _columns(rows: Sequence[tuple[int, float, float]]) -> dict[str, np.ndarray[Any, Any]]:
    tokens, loss, kl = (np.asarray(column) for column in zip(*rows, strict=True))
    return {"tokens": tokens, "loss": loss, "kl": kl}


def _held_out(model: Any, caller: str) -> Path:
    """The held-out text in the folder that the model, or its tokenizer, was loaded from."""
    config = getattr(getattr(model, "original", None), "config", None)
    named = (
        getattr(model, "folder", None),
        getattr(config, "_name_or_path", None),
        getattr(model.tokenizer, "name_or_path", None),
    )
    for folder in named:
        if folder and (Path(folder) / HELD_OUT).is_file():
            return Path(folder) / HELD_OUT
    raise DtLensError(
        f"The model's folder holds no {HELD_OUT}; give {caller} a text: a file, a string, or a list of strings."
    )


def _in_words(texts: Texts, read: list[str]) -> str:
    if len(read) > 1:
        return f"{len(read)} texts"
    one = texts if isinstance(texts, str | Path) else texts[0]
    if isinstance(one, Path) or one != read[0]:
        return Path(one).name
    return f"a text of {len(one):,} characters"
