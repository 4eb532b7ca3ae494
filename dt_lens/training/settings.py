"""The settings of a training run: everything besides the data that decides what it ends with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dt_lens.arguments import LAST_SEED, finite_numbers, is_finite_number, whole_number
from dt_lens.errors import DtLensError

__all__ = ["AgentSettings", "Schedule", "TextSettings"]


class Schedule:
    """The settings that every run has, with the learning rate that follows from them, and their checks."""

    steps: int
    batch_size: int
    context: int
    d_model: int
    n_layers: int
    n_heads: int
    dropout: float
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    bf16: bool
    seed: int

    def __post_init__(self) -> None:
        self._require_whole(1, "steps", "batch_size", "context", "d_model", "n_layers", "n_heads")
        self._require_whole(0, "warmup", "seed")
        whole_number(self.seed, "seed", 0, LAST_SEED)
        if self.d_model % self.n_heads:
            raise DtLensError(f"d_model is {self.d_model}; it must be a multiple of n_heads, {self.n_heads}.")
        self._require(lambda x: 0 <= x < 1, "at least 0 and below 1", "dropout")
        self._require(lambda x: x > 0, "positive", "lr", "clip")
        self._require(lambda x: x >= 0, "at least 0", "weight_decay")

    def _require_whole(self, least: int, *names: str) -> None:
        for name in names:
            object.__setattr__(self, name, whole_number(getattr(self, name), name, least))

    def _require(self, right: Callable[[float], bool], wanted: str, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not is_finite_number(value) or not right(float(value)):
                raise DtLensError(f"{name} is {value!r}; it must be {wanted}.")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: a linear warm-up, then half a cosine down to a hundredth.

        Step ``warmup - 1`` is the first one at the full rate ``lr``.
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        along = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * along)) / 2)


@dataclass(frozen=True, kw_only=True)
class AgentSettings(Schedule):
    """How a decision transformer is trained; the defaults are those of the bundled Hopper agent.

    Attributes:
        steps: gradient steps.
        batch_size: windows in a batch.
        context: steps the agent looks back.
        early: share of windows from the first steps of an episode; see ``Windows.sample``.
        shortened: share of windows with a part of their past masked; see ``Windows.sample``.
        d_model, n_layers, n_heads: the shape of the transformer, with ReLU and pre-LayerNorm as in the original.
        dropout: on tokens, attention and residual branches, in training only.
        lr: learning rate of AdamW, reached after ``warmup`` steps; half a cosine then takes it to a hundredth.
        warmup: steps.
        weight_decay: of AdamW.
        clip: the largest gradient norm.
        bf16: whether matrix products run in bfloat16 (weights, sums and the optimizer stay in float32).
        seed: of the initial weights, batches, dropout and evaluations.
        max_ep_len: rows of the timestep table; by default as many as the longest episode has steps. Later steps have
            the last row.
        targets: target returns to evaluate at, the agent's default first; empty for quantiles of the data's returns.

    Raises:
        DtLensError: for a value out of range, naming it.
    """

    steps: int = 6_000
    batch_size: int = 64
    context: int = 20
    early: float = 0.15
    shortened: float = 0.25
    d_model: int = 128
    n_layers: int = 3
    n_heads: int = 1
    dropout: float = 0.1
    lr: float = 1e-3
    warmup: int = 500
    weight_decay: float = 1e-4
    clip: float = 0.25
    bf16: bool = True
    seed: int = 0
    targets: tuple[float, ...] = ()
    max_ep_len: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_ep_len is not None:
            self._require_whole(1, "max_ep_len")
        self._require(lambda x: 0 <= x < 1, "at least 0 and below 1", "early", "shortened")
        object.__setattr__(self, "targets", tuple(finite_numbers(self.targets, "targets")))


@dataclass(frozen=True, kw_only=True)
class TextSettings(Schedule):
    """How a small GPT-2 is trained; the defaults are those of the bundled ``tiny-gpt2``.

    Attributes:
        vocabulary: tokens of the tokenizer, including the 256 bytes and the end of text.
        context: tokens of a window.
        d_model, n_layers, n_heads: the shape of the transformer.
        dropout: in training only.
        steps: gradient steps.
        batch_size: windows in a batch, each from anywhere in the text.
        lr: learning rate of AdamW, reached after ``warmup`` steps; half a cosine then takes it to a hundredth.
        warmup: steps.
        weight_decay: of AdamW, for matrices only.
        clip: the largest gradient norm.
        bf16: whether matrix products run in bfloat16 (weights, sums and the optimizer stay in float32).
        unwrap: whether the lines of each paragraph of a plain text are joined.
        held_out: share of the text that is not trained on.
        seed: of the choice of held-out text, the initial weights, the windows and dropout.

    Raises:
        DtLensError: for a value out of range, naming it.
    """

    vocabulary: int = 3_072
    context: int = 128
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    dropout: float = 0.0
    steps: int = 4_000
    batch_size: int = 16
    lr: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.1
    clip: float = 1.0
    bf16: bool = True
    unwrap: bool = False
    held_out: float = 0.015
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_whole(2, "context")
        self._require_whole(257, "vocabulary")
        self._require(lambda x: 0 < x < 1, "above 0 and below 1", "held_out")
