"""Train a decision transformer on a Minari data set: the original recipe, stoppable at any time and resumed exactly."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dt_lens.arguments import local_path
from dt_lens.decision_transformer.checkpoint import save_pretrained
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.errors import DtLensError
from dt_lens.training.dataset import Trajectories, Windows, read
from dt_lens.training.run import Schedule, TrainingRun

__all__ = ["Settings", "train"]

TARGET_QUANTILES = (0.95, 0.75, 0.55, 0.35, 0.15)


@dataclass(frozen=True)
class Settings(Schedule):
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
        run = _Run(settings, data, local_path(out, "out"), torch.device(device))
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


class _Run(TrainingRun):
    """Learns to act from windows of a data set."""

    model: HookedDecisionTransformer
    settings: Settings

    def __init__(self, settings: Settings, data: Trajectories, out: Path, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        longest = max(int(data.lengths.max()), data.time_limit or 0)
        drop = settings.dropout
        model: HookedDecisionTransformer = HookedDecisionTransformer(
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
        model.facts = _facts(settings, data)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        super().__init__(settings, {}, out, model, optimizer)
        self.data = data
        self.windows = Windows(data, settings.context, device)

    def finish(self, eval_every: int, eval_episodes: int, checkpoint_every: int, report: Callable[..., None]) -> None:
        """Train to the last step, evaluating and saving on the way."""
        steps = self.settings.steps
        returns: dict[float, float] = {}
        while self.step < steps:
            self.learn()
            last = self.step == steps
            if last or (eval_every and self.step % eval_every == 0):
                returns = self._evaluate(eval_episodes) if eval_every else {}
                self.note(returns={f"{target:g}": round(value, 1) for target, value in returns.items()})
                save_pretrained(self.model, self.out)  # as it is
            if last or self.step % checkpoint_every == 0:
                self.save()
            report(Progress(self.step, steps, self.mean_loss, returns))
        self.model.eval()
        save_pretrained(self.model, self.out)

    def loss(self) -> Tensor:
        batch = self.windows.sample(self.settings.batch_size, self.settings.early, self.settings.shortened)
        with self.autocast():
            predicted = self.model(**batch).action_preds
        return _loss(predicted.float(), batch, self.data.discrete)

    def can_evaluate(self, insist: bool) -> bool:
        """Whether the environment is there and fits; said now rather than at the first evaluation."""
        from dt_lens.behaviour.agents.environment import make_task

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
