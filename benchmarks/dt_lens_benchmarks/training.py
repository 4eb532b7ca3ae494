"""Time per step of ``train``, beside Hugging Face's Trainer on the same model, the same batches and one thread.

Both train a decision transformer of the bundled agent's shape on windows of made-up episodes, which both draw with the
same code; AdamW, dropout and gradient clipping are the same. They take turns, and of each round the mean time of a step
counts, without the first steps, in which memory is set up.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.training.agent import _AgentRun, action_loss
from dt_lens.training.dataset import Trajectories, Windows
from dt_lens.training.settings import AgentSettings
from dt_lens_benchmarks.row import Row

__all__ = ["measure"]

STATE, ACTION, STEPS_OF_AN_EPISODE, EPISODES = 11, 3, 500, 20
LEFT_OUT = 3  # steps
PEER = "Hugging Face's Trainer"


def measure(quick: bool) -> Iterator[Row]:
    """The rows of this subject; ``quick`` takes fewer rounds."""
    rounds, steps = (2, 9) if quick else (5, 30)
    torch.set_num_threads(1)  # several of a machine that others use too would measure how they wait for each other
    # In float32: without instructions for bfloat16 a processor takes ten times as long, whoever trains.
    data, settings = _data(), AgentSettings(steps=steps, warmup=1, bf16=False)
    what = f"a training step, 3 x 128, batch {settings.batch_size}, one thread"
    try:
        found = [(_ours(settings, data), _theirs(settings, data)) for _ in range(rounds)]
    except ImportError as error:  # the Trainer asks for accelerate when it starts
        nothing = float("nan")
        yield Row(what, 1e3 * _ours(settings, data), "ms", PEER, nothing, nothing, note=f"no peer: {error}"[:200])
        return
    ours, theirs = (1e3 * statistics.median(row[i] for row in found) for i in (0, 1))
    ratio = statistics.median(row[1] / row[0] for row in found)
    yield Row(what, ours, "ms", PEER, theirs, ratio, "at least 1", ratio >= 1)


def _data() -> Trajectories:
    """Episodes of random numbers, with the shape of Hopper's."""
    rng = np.random.default_rng(0)
    steps = EPISODES * STEPS_OF_AN_EPISODE
    states = rng.normal(size=(steps, STATE)).astype(np.float32)
    actions = rng.uniform(-1, 1, (steps, ACTION)).astype(np.float32)
    rewards = rng.uniform(0, 5, steps).astype(np.float32)
    return Trajectories(
        states, actions, rewards, np.full(EPISODES, STEPS_OF_AN_EPISODE), False, True, "made-up/data-v0"
    )


def _per_step(ends: list[float]) -> float:
    """The mean time between the ends of steps; the last one also writes a checkpoint."""
    taken = np.diff(ends)[LEFT_OUT - 1 : -1]
    return float(np.mean(taken))


def _ours(settings: AgentSettings, data: Trajectories) -> float:
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run = _AgentRun(settings, data, RunFacts(settings.context), Path(folder), torch.device("cpu"))
        run.finish(0, settings.steps, lambda _: ends.append(time.perf_counter()))
    return _per_step(ends)


def _theirs(settings: AgentSettings, data: Trajectories) -> float:
    from transformers import (
        DecisionTransformerConfig,
        DecisionTransformerModel,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    windows = Windows(data, settings.context)
    ends: list[float] = []

    class Learner(DecisionTransformerModel):  # type: ignore[misc]
        def forward(self, **batch: Any) -> dict[str, Any]:
            return {"loss": action_loss(super().forward(**batch).action_preds.float(), batch, discrete=False)}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    def collate(rows: list[int]) -> dict[str, Any]:
        return windows.sample(len(rows), settings.early, settings.shortened)

    drop, d = settings.dropout, settings.d_model
    torch.manual_seed(settings.seed)
    model = Learner(
        DecisionTransformerConfig(
            state_dim=STATE,
            act_dim=ACTION,
            hidden_size=d,
            max_ep_len=STEPS_OF_AN_EPISODE,
            n_layer=settings.n_layers,
            n_head=settings.n_heads,
            n_inner=4 * d,
            resid_pdrop=drop,
            embd_pdrop=drop,
            attn_pdrop=drop,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        given = TrainingArguments(
            output_dir=folder,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.lr,
            weight_decay=settings.weight_decay,
            warmup_steps=settings.warmup,
            lr_scheduler_type="cosine",
            max_grad_norm=settings.clip,
            optim="adamw_torch_fused",
            bf16=settings.bf16,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        rows: Any = list(range(settings.steps * settings.batch_size))
        with contextlib.redirect_stdout(sys.stderr):  # it prints how long it took
            Trainer(model, given, data_collator=collate, train_dataset=rows, callbacks=[Clock()]).train()
    return _per_step(ends)
