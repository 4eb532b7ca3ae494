"""Train a decision transformer on a Minari data set: the original recipe, stoppable at any time and resumed exactly."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dt_lens.arguments import local_path, require_writable, whole_number
from dt_lens.decision_transformer.checkpoint import save_pretrained
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.environment_factors import environment_factors
from dt_lens.decision_transformer.environment_labels import environment_labels, environment_parts
from dt_lens.decision_transformer.environment_wrappers import APART
from dt_lens.decision_transformer.facts import RunFacts, from_file
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.errors import DtLensError, a_type, as_written, nearest
from dt_lens.lens.environment_names import FileKeywords, import_module_of
from dt_lens.training.dataset import Trajectories, Windows, read
from dt_lens.training.run import CHECKPOINT, TrainingRun, saved_state
from dt_lens.training.settings import AgentSettings

__all__ = ["AgentProgress", "action_loss", "train"]

TARGET_QUANTILES = (0.95, 0.75, 0.55, 0.35, 0.15)


@dataclass(frozen=True)
class AgentProgress:
    """What ``report`` is called with after every step."""

    step: int
    steps: int
    loss: float  # mean of the steps since the last row of the curve; just after a row, the row's own
    returns: dict[float, float]  # newest mean return at each target; empty before the first evaluation


def train(
    dataset_id: str = "hopper/climb-v0",
    out: str | Path = "runs/hopper",
    settings: AgentSettings | None = None,
    *,
    eval_every: int = 2_000,
    eval_episodes: int = 8,
    max_steps: int | None = None,
    checkpoint_every: int = 250,
    environment: str | None = None,
    environment_kwargs: Mapping[str, Any] | None = None,
    failure: str | float | None = None,
    ignores: Sequence[str] | None = None,
    resume: bool = True,
    device: str | torch.device = "cpu",
    report: Callable[[AgentProgress], None] | None = None,
) -> HookedDecisionTransformer:
    """Train on any Minari data set, local or downloadable; the defaults are the bundled Hopper's.

    ``out`` ends up with the model in Hugging Face's format (``config.json``, ``model.safetensors``), ``dt_lens.json``,
    ``curve.jsonl`` (a row for every ``eval_every`` steps: step, loss, learning rate, mean return at each target) and
    ``checkpoint.pt``, from which the same call resumes after an interruption. A resumed run ends with the same bits as
    an uninterrupted one on the same machine with the same number of threads.

    Args:
        dataset_id: a Minari id; continuous actions are learned by squared error, discrete ones by cross-entropy.
        out: the folder to write.
        settings: everything else that decides what training ends with; ``AgentSettings()`` by default.
        eval_every: steps between evaluations; 0 for none.
        eval_episodes: episodes at each target.
        max_steps: cut these episodes after this many steps; rows of the curve say so.
        checkpoint_every: steps between checkpoints.
        environment: a Gymnasium id to evaluate in, ``"module:Id"`` to import a package that registers it. By default
            the evaluation environment of the data set, if it has one, else its own; they must be registered. The
            model's facts keep it as ``evaluation_environment`` beside the data set's own ``environment``; where the
            data set names none, as ``environment``.
        environment_kwargs: its keyword arguments; by default the data set's own, with its environment, as far as the
            environment is registered with them. Time limit and wrappers as in ``evaluate``.
        failure: what counts as failing in the data's environment, a fact of the model: ``"terminated"``,
            ``"truncated"`` or a return to fall below. It changes nothing in training.
        ignores: parts of the observations that the model does not read, by name, such as ``["mission"]`` of MiniGrid's;
            a fact of the model, as are the texts of those that it reads, one-hot. Texts that are always the same are
            left out too.
        resume: whether to resume an unfinished run in ``out``.
        device: where the model trains.
        report: called after every step.

    Returns:
        The trained model in evaluation mode, with its run facts.

    Raises:
        DtLensError: if the data set cannot be read, the settings do not make a model, ``environment`` with
            ``environment_kwargs`` cannot be made or does not fit, ``out`` holds a checkpoint of another run, or the
            folder cannot be written. If the data set names no environment, or its own cannot be made, that is a
            warning, and there are no evaluations.
    """
    eval_every = whole_number(eval_every, "eval_every", 0)
    eval_episodes = whole_number(eval_episodes, "eval_episodes", 0)
    if max_steps is not None:
        max_steps = whole_number(max_steps, "max_steps", 1)
    checkpoint_every = whole_number(checkpoint_every, "checkpoint_every", 1)
    settings = AgentSettings() if settings is None else settings
    if not isinstance(settings, AgentSettings):
        raise DtLensError(f"settings is {a_type(settings)}; it must be an AgentSettings.")
    require_writable(local_path(out, "out") / CHECKPOINT)
    data = read(dataset_id, ignores)
    if not settings.targets:
        settings = replace(settings, targets=_targets(data.returns))
    facts = replace(_to_evaluate_in(_facts(settings, data), environment, environment_kwargs), failure=failure)
    facts = replace(facts, **_names(data, facts))  # of the environment that the user has named or confirmed by now
    _require_parts(data, facts)
    facts.to_json()  # what JSON cannot hold is found before the work
    folder, on = local_path(out, "out"), torch.device(device)
    kept = saved_state(folder, on) if resume else None
    with torch.random.fork_rng(devices=[]):
        run = _AgentRun(settings, data, facts, folder, on, _older_rows(kept))
        wanted, asked = bool(eval_every and eval_episodes), not (environment is None and environment_kwargs is None)
        if (asked or wanted) and run.can_evaluate(insist=asked) and wanted:
            run.eval_episodes, run.max_steps = eval_episodes, max_steps
        if kept is not None:
            run.resume(kept)
        run.finish(eval_every, checkpoint_every, report or (lambda _: None))
    return run.model


def _identity(data: Trajectories) -> dict[str, str]:
    """What identifies the data to a run that resumes."""
    found = {"dataset": data.dataset_id}
    if data.ignores:
        found["ignores"] = ", ".join(data.ignores)
    if data.as_they_are is not None and data.as_they_are.any():
        found["normalisation"] = "not of zeros and ones"  # version 0.5 and before normalised them
    return found


def _require_parts(data: Trajectories, facts: RunFacts) -> None:
    """Raise unless every part that is to be ignored is one of the data's observations, or the environment's."""
    unknown = [name for name in data.ignores if name not in data.parts]
    place, kwargs, _ = facts.environment_for()
    known = {*data.parts, *(environment_parts(place, kwargs) if unknown and place else ())}
    for name in unknown:
        if name not in known:
            raise DtLensError(
                f"ignores names {name!r}, and the observations of {data.dataset_id!r} have no such part; their parts "
                f"are {', '.join(sorted(known)) or 'none'}." + nearest(name, known)
            )


def _targets(returns: np.ndarray[Any, Any]) -> tuple[float, ...]:
    """Quantiles of the returns, best first, to two significant digits, without repeats."""
    rounded = (float(f"{q:.2g}") for q in np.quantile(returns, TARGET_QUANTILES))
    return tuple(dict.fromkeys(rounded))


def _older_rows(state: dict[str, Any] | None) -> int | None:
    """Rows of the timestep table in a checkpoint of version 0.2.0, whose settings do not say them: its time limit."""
    if state is None or "max_ep_len" in json.loads(state["settings"]):
        return None
    table = state["model"].get("embed.timestep.W") if isinstance(state.get("model"), dict) else None
    return len(table) if isinstance(table, Tensor) else None


def _short(value: float) -> float:
    """To five significant digits, whatever the scale: returns may lie between 0 and 1."""
    return float(f"{value:.5g}")


class _AgentRun(TrainingRun):
    """Trains a decision transformer to act on windows of a data set."""

    model: HookedDecisionTransformer
    settings: AgentSettings

    def __init__(
        self,
        settings: AgentSettings,
        data: Trajectories,
        facts: RunFacts,
        out: Path,
        device: torch.device,
        rows: int | None = None,
    ) -> None:
        torch.manual_seed(settings.seed)
        longest = int(data.lengths.max())
        if settings.max_ep_len is not None and settings.max_ep_len < longest:
            raise DtLensError(
                f"max_ep_len is {settings.max_ep_len}; it must be at least {longest}, the steps of the longest episode."
            )
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
                max_ep_len=settings.max_ep_len or max(rows or 0, longest),
                action_tanh=data.bounded,
                discrete_actions=data.discrete,
                embed_dropout=drop,
                attn_dropout=drop,
                resid_dropout=drop,
            )
        ).to(device)
        model.facts = facts
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        super().__init__(settings, _identity(data), out, model, optimizer)
        self.data = data
        self.windows = Windows(data, settings.context, device)
        self.eval_episodes = 0
        self.max_steps: int | None = None  # of an episode of the evaluations
        self._returns: dict[float, float] = {}  # the newest mean return at each target

    def loss(self) -> Tensor:
        batch = self.windows.sample(self.settings.batch_size, self.settings.early, self.settings.shortened)
        with self.autocast():
            predicted = self.model(**batch).action_preds
        return action_loss(predicted.float(), batch, self.data.discrete, self.data.choices)

    def can_evaluate(self, insist: bool) -> bool:
        """Whether the environment can be made and fits the model; checked before training, not at the first evaluation.

        Raises:
            DtLensError: if it does not and ``insist`` is true; otherwise that is a warning.
        """
        from dt_lens.behaviour.agents.running import setting_of

        if self.model.facts.environment_for()[0] is None:
            warnings.warn(
                f"The data set {self.data.dataset_id!r} names no environment; pass environment= (--environment on the "
                "command line). Training continues without evaluations.",
                stacklevel=3,
            )
            return False
        try:
            setting_of(self.model, None, None, None, None, "train")
        except DtLensError as error:
            if insist:
                raise
            warnings.warn(f"{error} Training continues without evaluations.", stacklevel=3)
            return False
        return True

    def measure(self) -> dict[str, Any]:
        """Evaluate the agent at each target, and write it so that an unfinished run can be used."""
        self._returns = self._evaluate() if self.eval_episodes else {}
        self._write_model()
        cut = {} if self.max_steps is None or not self._returns else {"max_steps": self.max_steps}
        return {"returns": {f"{target:g}": _short(value) for target, value in self._returns.items()}, **cut}

    def _evaluate(self) -> dict[float, float]:
        from dt_lens.behaviour.evaluate import evaluate

        self.model.eval()
        how: dict[str, Any] = {"episodes": self.eval_episodes, "seed": self.settings.seed, "max_steps": self.max_steps}
        with torch.random.fork_rng(devices=[]):
            return {
                target: float(evaluate(self.model, target_return=target, **how).mean)
                for target in self.settings.targets
            }

    def progress(self) -> AgentProgress:
        return AgentProgress(self.step, self.settings.steps, self.mean_loss, self._returns)

    def write(self) -> None:
        self._write_model()

    def _write_model(self) -> None:
        """Write the model; its facts say how far it is trained, so that an unfinished one is known wherever it goes."""
        facts = self.model.facts
        self.model.facts = replace(facts, about={**facts.about, "trained_steps": self.step})
        save_pretrained(self.model, self.out)


def action_loss(
    predicted: Float[Tensor, "batch step act_dim"],
    batch: dict[str, Tensor],
    discrete: bool,
    choices: Sequence[int] = (),
) -> Float[Tensor, ""]:
    """The loss of predicted actions, over the steps that ``attention_mask`` marks as real: padding does not count.

    Args:
        predicted: actions, or logits of discrete ones.
        batch: a batch of ``Windows``.
        discrete: cross-entropy of the action ids instead of the squared error of the actions.
        choices: the sizes of several choices made at once, whose cross-entropies are added; of one by default.
    """
    real = batch["attention_mask"]
    if choices:
        logits, taken = (torch.split(x[real], list(choices), -1) for x in (predicted, batch["actions"]))
        losses = [F.cross_entropy(part, chosen.argmax(-1)) for part, chosen in zip(logits, taken, strict=True)]
        return torch.stack(losses).sum()
    if discrete:
        return F.cross_entropy(predicted[real], batch["actions"][real].argmax(-1))
    return F.mse_loss(predicted[real], batch["actions"][real])


def _to_evaluate_in(facts: RunFacts, environment: str | None, kwargs: Mapping[str, Any] | None) -> RunFacts:
    """The facts with the environment that the user wants the agent evaluated in, beside the one of the data."""
    if environment is not None and not isinstance(environment, str):
        raise DtLensError(f"environment is {as_written(environment)}; it must be a Gymnasium id, such as 'Hopper-v5'.")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise DtLensError(f"environment_kwargs is {as_written(kwargs)}; it must be a dictionary of keywords.")
    import_module_of(environment)
    if environment is None and kwargs is None:
        return facts
    place, known, _ = facts.environment_for(environment, kwargs)
    if place is None:
        raise DtLensError("The data set names no environment for environment_kwargs; pass environment= as well.")
    if facts.environment is None:
        return replace(facts, environment=place, environment_kwargs=dict(known))
    same = (place, dict(known)) == (facts.environment, dict(facts.environment_kwargs))
    if same:  # the data's own, confirmed by the user
        return replace(facts, environment_kwargs=dict(known), evaluation_environment=None)
    return replace(facts, evaluation_environment={"id": place, "kwargs": known})


def _facts(settings: AgentSettings, data: Trajectories) -> RunFacts:
    returns = data.returns
    places = {
        "environment": data.environment,
        "environment_kwargs": data.environment_kwargs or {},
        "evaluation_environment": data.evaluation_environment,
    }
    return RunFacts(
        context=settings.context,
        **from_file(places),
        state_mean=tuple(float(m) for m in data.state_mean) if data.normalised else None,
        state_std=tuple(float(s) for s in data.state_std) if data.normalised else None,
        ignores=data.ignores or None,
        texts=data.texts,
        choices=data.choices or None,
        return_scale=data.return_scale,
        target_returns=settings.targets,
        about={
            "dataset": {
                "id": data.dataset_id,
                "episodes": len(data.lengths),
                "steps": int(data.lengths.sum()),
                "return_quantiles": [_short(q) for q in np.quantile(returns, (0, 0.25, 0.5, 0.75, 1))],
            },
            "recipe": {"dataset": data.dataset_id, **asdict(settings)},
        },
    )


def _names(data: Trajectories, facts: RunFacts) -> dict[str, Any]:
    """Labels of states and actions, and factors of the states: the environment need not be there to read them."""
    place, kwargs = facts.environment, facts.environment_kwargs
    if place is None:
        return {}
    factors = environment_factors(place, kwargs, data.ignores, data.texts)
    if factors is None and isinstance(kwargs, FileKeywords):
        harmless = {name: kwargs[name] for name in APART if name in kwargs}
        if kwargs != harmless and environment_factors(place, harmless, data.ignores, data.texts) is not None:
            warnings.warn(
                f"The states of {data.dataset_id!r} get neither labels nor factors, since nobody has confirmed the "
                f"keywords of its environment; if they are right, pass "
                f"environment_kwargs={as_written(dict(kwargs), 200)} (--environment-kwargs on the command line).",
                stacklevel=3,
            )
    states, actions = environment_labels(place, kwargs, data.ignores, data.texts)
    found: dict[str, Any] = {}
    if states is not None and len(states) == data.states.shape[1]:
        found["state_labels"] = states
    if actions is not None and len(actions) == data.actions.shape[1]:
        found["action_labels"] = actions
    if factors is not None and len(next(iter(factors.values()))) == data.states.shape[1]:
        found["factors"] = {"state_in": factors}
    return found
