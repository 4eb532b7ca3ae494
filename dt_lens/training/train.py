"""Train a decision transformer on a Minari data set: the original recipe, stoppable at any time and resumed exactly."""

from __future__ import annotations

import json
import math
import pickle
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dt_lens.decision_transformer.checkpoint import save_pretrained
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.errors import DtLensError
from dt_lens.training.dataset import Trajectories, Windows, read

__all__ = ["Settings", "train"]

CHECKPOINT = "checkpoint.pt"
CURVE = "curve.jsonl"
TARGET_QUANTILES = (0.95, 0.75, 0.55, 0.35, 0.15)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a training run ends with, beside the data."""

    dataset: str
    steps: int
    batch_size: int
    context: int
    early: float
    shortened: float
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
    targets: tuple[float, ...]

    def rate(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then half a cosine down to a hundredth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        along = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * along)) / 2)


@dataclass(frozen=True)
class Progress:
    """What ``report`` is told after every step."""

    step: int
    steps: int
    loss: float  # mean of the steps since the last row of the curve
    returns: dict[float, float]  # newest mean return at each target; empty before the first evaluation


def train(
    dataset_id: str = "hopper/climb-v0",
    out: str | Path = "runs/hopper",
    *,
    steps: int = 6_000,
    batch_size: int = 64,
    context: int = 20,
    early: float = 0.15,
    shortened: float = 0.25,
    d_model: int = 128,
    n_layers: int = 3,
    n_heads: int = 1,
    dropout: float = 0.1,
    lr: float = 1e-3,
    warmup: int = 500,
    weight_decay: float = 1e-4,
    clip: float = 0.25,
    bf16: bool = True,
    seed: int = 0,
    targets: Sequence[float] | None = None,
    eval_every: int = 2_000,
    eval_episodes: int = 8,
    checkpoint_every: int = 250,
    environment: str | None = None,
    resume: bool = True,
    device: str | torch.device = "cpu",
    report: Callable[[Progress], None] | None = None,
) -> HookedDecisionTransformer:
    """Train on any Minari data set, local or downloadable; the defaults are the bundled Hopper's.

    ``out`` ends up with the model in Hugging Face's format (``config.json``, ``model.safetensors``), ``dt_lens.json``,
    ``curve.jsonl`` (a row for every ``eval_every`` steps: step, loss, learning rate, mean return at each target) and
    ``checkpoint.pt``, from which the same call goes on after an interruption: what it ends with is the same to the bit
    on the same machine with the same number of threads.

    Args:
        dataset_id: a Minari id; continuous actions are learned by squared error, discrete ones by cross-entropy.
        out: the folder to write.
        steps: gradient steps.
        batch_size: windows in a batch.
        context: steps the agent looks back.
        early: the share of windows from the first steps of an episode; see ``Windows.sample``.
        shortened: the share of windows without a part of their past; likewise.
        d_model, n_layers, n_heads: the shape of the transformer; ReLU and pre-LayerNorm, as in the original.
        dropout: on tokens, attention and residual branches, in training only.
        lr: of AdamW, reached after ``warmup`` steps and taken down half a cosine to a hundredth of it.
        weight_decay: of AdamW.
        clip: the largest gradient norm.
        bf16: whether matrix products run in bfloat16 (weights, sums and the optimizer stay in float32).
        seed: of the initial weights, batches, dropout and evaluations.
        targets: target returns to evaluate at, the agent's default first; quantiles of the data's returns when omitted.
        eval_every: steps between evaluations; 0 for none.
        eval_episodes: episodes at each target.
        checkpoint_every: steps between checkpoints.
        environment: a Gymnasium id to evaluate in; the data set's own when omitted.
        resume: whether to go on from ``out`` where it holds an unfinished run.
        device: where the model trains.
        report: called after every step.

    Returns:
        The trained model in evaluation mode, with its run facts.

    Raises:
        DtLensError: for a data set that cannot be read, settings that make no model, an ``environment`` that does not
            fit, a checkpoint of another run in ``out``, or a folder that cannot be written. A data set's own
            environment that cannot be made is a warning, and there are no evaluations.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("checkpoint_every", checkpoint_every)):
        if value < 1:
            raise DtLensError(f"{name} is {value}; it must be at least 1.")
    for name, share in (("dropout", dropout), ("early", early), ("shortened", shortened)):
        if not 0 <= share < 1:
            raise DtLensError(f"{name} is {share}; it must be at least 0 and below 1.")
    if not lr > 0 or not clip > 0 or min(warmup, eval_every, eval_episodes) < 0:
        raise DtLensError("lr and clip must be positive, and warmup, eval_every and eval_episodes not negative.")
    data = read(dataset_id)
    if environment is not None:
        data = replace(data, environment=environment, environment_kwargs={})
    chosen = tuple(float(t) for t in targets) if targets else _targets(data.returns)
    settings = Settings(
        dataset_id, steps, batch_size, context, early, shortened, d_model, n_layers, n_heads, dropout, lr,
        warmup, weight_decay, clip, bf16, seed, chosen,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        run = _Run(settings, data, Path(out), torch.device(device))
        if eval_every and eval_episodes and not run.can_evaluate(insist=environment is not None):
            eval_episodes = 0
        if resume:
            run.resume()
        run.finish(eval_every, eval_episodes, checkpoint_every, report or (lambda _: None))
    model: HookedDecisionTransformer = run.model
    return model


def _targets(returns: np.ndarray[Any, Any]) -> tuple[float, ...]:
    """Quantiles of the returns, best first, to two significant digits, without repeats."""
    rounded = (float(f"{q:.2g}") for q in np.quantile(returns, TARGET_QUANTILES))
    return tuple(dict.fromkeys(rounded))


class _Run:
    """A training run between two steps."""

    def __init__(self, settings: Settings, data: Trajectories, out: Path, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.data = data
        self.out = out
        self.device = device
        longest = max(int(data.lengths.max()), data.time_limit or 0)
        drop = settings.dropout
        self.model: HookedDecisionTransformer = HookedDecisionTransformer(
            HookedDecisionTransformerConfig(
                state_dim=data.states.shape[1],
                act_dim=data.actions.shape[1],
                d_model=settings.d_model,
                n_layers=settings.n_layers,
                n_heads=settings.n_heads,
                d_mlp=4 * settings.d_model,
                n_ctx=settings.context,
                max_ep_len=longest,
                action_tanh=data.bounded,
                discrete_actions=data.discrete,
                embed_dropout=drop,
                attn_dropout=drop,
                resid_dropout=drop,
            )
        ).to(device)
        self.model.facts = _facts(settings, data)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.windows = Windows(data, settings.context, device)
        self.step = 0
        self.curve: list[dict[str, Any]] = []
        self._losses = torch.zeros((), device=device)
        self._counted = 0

    def finish(self, eval_every: int, eval_episodes: int, checkpoint_every: int, report: Callable[..., None]) -> None:
        """Train to the last step, evaluating and saving on the way."""
        settings, began = self.settings, time.monotonic()
        returns: dict[float, float] = {}
        while self.step < settings.steps:
            self._learn()
            last = self.step == settings.steps
            if last or (eval_every and self.step % eval_every == 0):
                returns = self._evaluate(eval_episodes) if eval_every else {}
                self._note(returns, time.monotonic() - began)
                self.model.train()
            if last or self.step % checkpoint_every == 0:
                self._save()
            report(Progress(self.step, settings.steps, float(self._losses) / max(1, self._counted), returns))
        self.model.eval()
        save_pretrained(self.model, self.out)

    def _learn(self) -> None:
        self.model.train()
        batch = self.windows.sample(self.settings.batch_size, self.settings.early, self.settings.shortened)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            predicted = self.model(**batch).action_preds
        loss = _loss(predicted.float(), batch, self.data.discrete)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.step += 1
        self._losses += loss.detach()
        self._counted += 1

    def can_evaluate(self, insist: bool) -> bool:
        """Whether the environment is there and fits; said now rather than at the first evaluation."""
        from dt_lens.behaviour.environment import make_task

        if self.data.environment is None:
            return False
        try:
            make_task(self.data.environment, self.data.environment_kwargs or {}, self.model.cfg)
        except DtLensError as error:
            if insist:
                raise
            warnings.warn(f"{error} Training goes on without evaluations.", stacklevel=3)
            return False
        return True

    def _evaluate(self, episodes: int) -> dict[float, float]:
        if not episodes:
            return {}
        from dt_lens.behaviour.evaluate import evaluate

        self.model.eval()
        with torch.random.fork_rng(devices=[]):
            return {
                target: float(
                    evaluate(self.model, episodes=episodes, seed=self.settings.seed, target_return=target).mean
                )
                for target in self.settings.targets
            }

    def _note(self, returns: dict[float, float], seconds: float) -> None:
        """Add a row to the curve and write the model as it is."""
        self.curve.append(
            {
                "step": self.step,
                "loss": float(self._losses) / max(1, self._counted),
                "lr": self.settings.rate(self.step - 1),
                "seconds": round(seconds, 1),
                "returns": {f"{target:g}": round(value, 1) for target, value in returns.items()},
            }
        )
        self._losses.zero_()
        self._counted = 0
        save_pretrained(self.model, self.out)

    def _save(self) -> None:
        state = {
            "settings": json.dumps(asdict(self.settings)),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "losses": self._losses,
            "counted": self._counted,
            "curve": json.dumps(self.curve),
        }
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            partial = self.out / f"{CHECKPOINT}.partial"
            torch.save(state, partial)
            partial.replace(self.out / CHECKPOINT)
            lines = "".join(json.dumps(row) + "\n" for row in self.curve)
            (self.out / CURVE).write_text(lines, encoding="utf-8")
        except (OSError, RuntimeError) as error:
            raise DtLensError(f"The checkpoint cannot be written to {self.out}: {error}.") from error

    def resume(self) -> None:
        """Continue from the checkpoint in ``out``, where there is one."""
        file = self.out / CHECKPOINT
        if not file.exists():
            return
        try:
            state = torch.load(file, map_location=self.device, weights_only=True)
            settings = json.loads(state["settings"])
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise DtLensError(f"{file} cannot be read as a training checkpoint; delete it to start again.") from error
        mine = json.loads(json.dumps(asdict(self.settings)))
        other = [name for name, value in mine.items() if settings.get(name) != value]
        if other:
            raise DtLensError(
                f"{self.out} holds a run with another {', '.join(other)}; choose another folder or do not resume."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        self.step = state["step"]
        self.curve = json.loads(state["curve"])
        self._losses, self._counted = state["losses"], state["counted"]


def _loss(predicted: Tensor, batch: dict[str, Tensor], discrete: bool) -> Tensor:
    """Over the real steps: squared error of the actions, or cross-entropy of the action ids."""
    real = batch["attention_mask"]
    if discrete:
        return F.cross_entropy(predicted[real], batch["actions"][real].argmax(-1))
    return F.mse_loss(predicted[real], batch["actions"][real])


def _facts(settings: Settings, data: Trajectories) -> RunFacts:
    returns = data.returns
    return RunFacts(
        context=settings.context,
        environment=data.environment,
        environment_kwargs=data.environment_kwargs or {},
        state_mean=tuple(float(m) for m in data.state_mean),
        state_std=tuple(float(s) for s in data.state_std),
        return_scale=data.return_scale,
        target_returns=settings.targets,
        about={
            "dataset": {
                "id": data.dataset_id,
                "episodes": len(data.lengths),
                "steps": int(data.lengths.sum()),
                "return_quantiles": [round(float(q), 1) for q in np.quantile(returns, (0, 0.25, 0.5, 0.75, 1))],
            },
            "recipe": asdict(settings),
        },
    )
