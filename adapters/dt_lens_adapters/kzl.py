"""State dicts of kzl/decision-transformer, the authors' own code (its gym half).

The blocks are an early copy of Hugging Face's GPT-2, so the tensors are Hugging Face's under other names:
``transformer.`` for ``encoder.``, and no position table. A file that has one (``transformer.wpe``) comes from a model
around Hugging Face's ``GPT2Model`` itself, which adds a row to each token of the window. The file says nothing of
heads, context or normalisation; the number of heads cannot be read off shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dt_lens.arguments import refuse_unknown
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import FACTS, RunFacts, given_facts
from dt_lens.decision_transformer.hf_layout import ACTIVATIONS, config_from_hf, heads_in
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.errors import DtLensError, because
from dt_lens.lens.assumed import Options
from dt_lens.lens.checkpoints import Checkpoint
from dt_lens.lens.weights import require_computable
from dt_lens_adapters.hf_decision_transformer import (
    SHAPE_OPTIONS,
    HFReference,
    config_from_shapes,
    lens_on,
    original,
    used,
)

__all__ = ["KZLDecisionTransformer"]

OPTIONS = {*SHAPE_OPTIONS, "discrete_actions", "position", *FACTS}
PREDICTIONS = ("state_preds", "action_preds", "return_preds")
POSITION, STATE = "encoder.wpe.weight", "embed_state.weight"
MASK = re.compile(r"encoder\.h\.\d+\.attn\.(masked_)?bias")


class KZLDecisionTransformer:
    """The adapter: renames to Hugging Face's keys, reads the sizes off the shapes and asks for the heads."""

    name = "kzl"

    def recognises(self, source: Checkpoint | nn.Module) -> bool:
        keys = set(source.tensors) if isinstance(source, Checkpoint) else set(dict(source.named_parameters()))
        return {"embed_return.weight", "transformer.h.0.attn.c_attn.weight", "predict_action.0.weight"} <= keys

    def load(self, checkpoint: Checkpoint, **given: Any) -> HookedDecisionTransformer:
        refuse_unknown(given, OPTIONS)
        checkpoint.require_finite(key for key in checkpoint.tensors if not MASK.fullmatch(_rename(key)))
        tensors = _renamed(checkpoint.tensors)
        with _in_kzls_words():
            # Before a row of positions is made in their type.
            require_computable({key: tensor for key, tensor in tensors.items() if not MASK.fullmatch(key)})
            options = Options(given)
            config = _config(tensors, options)
            cfg, facts = _shape(tensors, config, options)
            tensors.setdefault(POSITION, _no_position(tensors))
            model = original(tensors, config)
        hooked = lens_on(model, lambda: used(model.state_dict()), cfg, facts, HFReference(lambda: model, cfg))
        hooked.assumed = options.assumed
        return hooked

    def wrap(self, model: nn.Module, **given: Any) -> HookedDecisionTransformer:
        refuse_unknown(given, OPTIONS)
        live = _Live(model)
        tensors = live.tensors()
        options = Options({**_read_live(model), **given})
        config = _config(tensors, options)
        cfg, facts = _shape(tensors, config, options)
        hooked = lens_on(model, lambda: used(live.tensors()), cfg, facts, _KZLReference(live, config, cfg))
        hooked.assumed = options.assumed
        return hooked


class _Live:
    """A live model's tensors under Hugging Face's keys, on the model's own memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.position: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        renamed = _renamed(self.model.state_dict())
        if POSITION not in renamed:
            # The lens's own row of zeros: one memory for as long as the model stays where it is.
            zeros = _no_position(renamed) if self.position is None else self.position.to(renamed[STATE])
            self.position = renamed[POSITION] = zeros
        return renamed


class _KZLReference:
    """The live model's own predictions, and every activation before them from Hugging Face's class on its weights."""

    def __init__(self, live: _Live, config: Mapping[str, Any], cfg: HookedDecisionTransformerConfig) -> None:
        self.live = live
        self.config = config
        self.cfg = cfg

    def activations(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        made = original(self.live.tensors(), self.config)
        seen = HFReference(lambda: made, self.cfg).activations(batch)
        model = self.live.model
        training = model.training
        try:
            with torch.no_grad():
                out = model.eval()(**batch, rewards=torch.zeros_like(batch["returns_to_go"]))
            # A model with an action head only may return no more than the actions, or nothing in the others' places.
            named = {"action_preds": out} if isinstance(out, Tensor) else dict(zip(PREDICTIONS, out, strict=True))
            predictions = {name: tensor for name, tensor in named.items() if tensor is not None}
        except Exception as error:
            raise DtLensError(
                f"This model's own forward pass fails, so nothing can be certified against it: {because(error)}."
            ) from error
        finally:
            model.train(training)
        return seen | {name: tensor.detach() for name, tensor in predictions.items()}


@contextmanager
def _in_kzls_words() -> Iterator[None]:
    """Use the file's names of tensors in errors."""
    try:
        yield
    except DtLensError as error:
        raise DtLensError(str(error).replace("'encoder.", "'transformer.")) from error


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_rename(key): tensor for key, tensor in tensors.items()}


def _rename(key: str) -> str:
    return re.sub(r"^transformer\.", "encoder.", key)


def _no_position(renamed: Mapping[str, Tensor]) -> Tensor:
    return renamed[STATE].new_zeros(1, renamed[STATE].shape[0])


def _facts(renamed: Mapping[str, Tensor], given: Options) -> dict[str, Any]:
    """The run facts that were given, and kzl's own values of the others."""
    facts = {name: value for name, value in given.items() if name in FACTS}
    # What kzl's experiment.py uses in every gym environment.
    facts["return_scale"] = given.assume("return_scale", 1000.0)
    widths = [tensor.shape[-1] for key, tensor in renamed.items() if MASK.fullmatch(key) and tensor.ndim]
    # A causal mask has three tokens a step of the context, where somebody chose it; 1024 is GPT-2's default.
    if widths and widths[0] % 3 == 0:
        facts.setdefault("context", widths[0] // 3)
    if "discrete_actions" in given:
        facts["discrete_actions"] = given["discrete_actions"]
    return facts


def _shape(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], given: Options
) -> tuple[HookedDecisionTransformerConfig, RunFacts]:
    """The configuration, with the way in which positions are added, and the facts of the run."""
    facts = given_facts(None, given.over(_facts(tensors, given)))
    cfg = config_from_hf(config, facts.context, given.get("discrete_actions"), heads_in(tensors))
    # A model that adds row 0 to every token, as Hugging Face's decision transformer does, needs no other row.
    rows = tensors[POSITION].shape[0] if POSITION in tensors else 1
    position = given.assume("position", "learned") if rows > 1 else given.get("position", "constant")
    if position not in ("learned", "constant") or (position == "learned" and rows < 2):
        raise DtLensError(
            f"position is {position!r}; for this checkpoint, whose position table has {rows} rows, it can be "
            f"{'learned (a row for each token of the window) or ' * (rows > 1)}constant (row 0 for every token)."
        )
    facts.require_fit(cfg.state_dim, cfg.act_dim)
    return replace(cfg, position=position), facts


def _config(tensors: Mapping[str, Tensor], given: Options) -> dict[str, Any]:
    """What Hugging Face's configuration would say, from shapes and from what was given."""
    if "n_heads" not in given:
        raise DtLensError(
            "A kzl checkpoint does not say how many attention heads it has; pass n_heads= (kzl's default is n_heads=1)."
        )
    return config_from_shapes(tensors, given, "a kzl decision transformer")


def _read_live(model: Any) -> dict[str, Any]:
    """What a live kzl model holds and its state dict does not."""
    inner = getattr(getattr(model, "transformer", None), "config", None)
    found: dict[str, Any] = {}
    if inner is not None:
        found["n_heads"] = inner.n_head
        found["act_fn"] = ACTIVATIONS.get(inner.activation_function, inner.activation_function)
    if isinstance(getattr(model, "predict_action", None), nn.Sequential):
        found["action_tanh"] = any(isinstance(part, nn.Tanh) for part in model.predict_action)
    if isinstance(getattr(model, "max_length", None), int):
        found["context"] = model.max_length
    return found
