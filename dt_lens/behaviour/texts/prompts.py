"""Answers after prompts: how probable a language model finds given tokens after given texts. A unit is a prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from dt_lens.behaviour.task import Columns, Task
from dt_lens.behaviour.terms import Terms
from dt_lens.behaviour.texts.windows import read_lines, token_ids
from dt_lens.errors import DtLensError, a_type
from dt_lens.progress import Count

__all__ = ["PromptTask"]


@dataclass(frozen=True)
class PromptTask(Task):
    """The log probability of an answer after each prompt. Make one with ``PromptTask.of``.

    Attributes:
        tokens: ``[length]`` ids of each prompt with its answer, what the tokenizer puts before a text included.
        answered: how many tokens at the end of each are its answer.
        answers: the answers, each once.
    """

    tokens: tuple[NDArray[np.int64], ...]
    answered: tuple[int, ...]
    answers: tuple[str, ...]

    @classmethod
    def of(cls, model: Any, prompts: str | Path | Sequence[str], answers: str | Sequence[str]) -> Self:
        """Make the task of a model with its tokenizer.

        Prompt and answer are tokenized apart and put together, so that the answer's tokens do not depend on the prompt.
        A space before a word belongs to the answer: ``" the"``.

        Args:
            model: a wrapped language model.
            prompts: texts, or a file with one a line.
            answers: one for all prompts, or one for each.

        Raises:
            DtLensError: for prompts or answers that are empty or too long for the model, or a model without a
                tokenizer.
        """
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise DtLensError(
                "The model has no tokenizer to read prompts with; wrap it with one: dt_lens.wrap(model, tokenizer=...)."
            )
        texts = read_lines(prompts)
        each = [answers] if isinstance(answers, str) else list(answers)
        if not all(isinstance(answer, str) and answer for answer in each) or not each:
            raise DtLensError(f"answers is {a_type(answers)}; give a text, or one for each prompt, none of them empty.")
        if len(each) not in (1, len(texts)):
            raise DtLensError(
                f"There are {len(texts)} prompts and {len(each)} answers; give one answer, or one for each."
            )
        tokens, answered = [], []
        for text, answer in zip(texts, each * (len(texts) if len(each) == 1 else 1), strict=True):
            asked, said = token_ids(tokenizer, text), token_ids(tokenizer, answer, start=False)
            if not len(asked) or len(asked) + len(said) > int(model.cfg.n_ctx):
                raise DtLensError(
                    f"The prompt {text[:60]!r} has {len(asked)} tokens and its answer {len(said)}; together they must "
                    f"be at most the model's {int(model.cfg.n_ctx)}, and a prompt needs one."
                )
            tokens.append(np.concatenate([asked, said]))
            answered.append(len(said))
        return cls(tuple(tokens), tuple(answered), tuple(dict.fromkeys(each)))

    @property
    def terms(self) -> Terms:
        digest = hashlib.sha256(
            repr([(row.tolist(), n) for row, n in zip(self.tokens, self.answered, strict=True)]).encode()
        )
        shown = ", ".join(repr(answer) for answer in self.answers[:3]) + (", ..." if len(self.answers) > 3 else "")
        return Terms(
            task="answers",
            measures={"log_probability": "real", "rank": "integer"},
            outcome="log_probability",
            better="more",
            unit="prompt",
            scale="nats",
            digits=3,
            setting={"prompts_id": digest.hexdigest()[:16], "prompts": len(self.tokens)},
            titles={"prompts_id": "prompts and answers"},
            place=f"{shown} after {len(self.tokens)} prompts",
        )

    def units(self, count: int | None = None, seed: int = 0, use: str = "evaluate") -> range:
        """The first ``count`` prompts, or all if there are fewer; ``seed`` does not matter."""
        return range(len(self.tokens) if count is None else min(count, len(self.tokens)))

    def run(
        self, model: Any, units: Sequence[int], *, workers: int | None = None, progress: Count | None = None
    ) -> Columns:
        scores, ranks = [], []
        device = next(iter(model.weights.values())).device
        for done, unit in enumerate(units, 1):
            row, n = torch.from_numpy(self.tokens[unit]).to(device), self.answered[unit]
            out = model(row[None])
            log_p = getattr(out, "logits", out)[0, -n - 1 : -1].double().log_softmax(-1)
            own = log_p.gather(-1, row[-n:, None])
            scores.append(float(own.sum()))
            ranks.append(int((log_p[0] > own[0]).sum()))
            if progress is not None:
                progress(done, len(units))
        return {"log_probability": scores, "rank": ranks}

    def batches(self, model: Any, units: Sequence[int]) -> Iterable[Any]:
        return (torch.from_numpy(self.tokens[unit])[None] for unit in units)

    @property
    def first_tokens(self) -> list[int]:
        """The first token of each answer, each once: what a direction that raises the answers writes towards."""
        found = (int(row[-n]) for row, n in zip(self.tokens, self.answered, strict=True))
        return list(dict.fromkeys(found))
