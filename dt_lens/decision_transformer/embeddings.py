"""The labelled directions of a decision transformer: rows of its embeddings and columns of its output heads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.environment_labels import environment_labels
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.lens.embeddings import Embedding, EmbeddingRegistry

__all__ = ["decision_transformer_embeddings"]


def decision_transformer_embeddings(
    weights: Mapping[str, Tensor], cfg: HookedDecisionTransformerConfig, facts: RunFacts, identity: str
) -> EmbeddingRegistry:
    """The seven standard embeddings, as live views of the weights, without those of heads that the model lacks.

    They are ``state_in``, ``action_in``, ``reward_in``, ``timestep_in``, ``action_out``, ``state_out``, ``reward_out``.
    Where embeddings pass through a tanh, a discrete action puts the tanh of its row into the stream: ``action_in`` then
    holds that, and is a copy instead of a view. The other embeddings remain the rows, which is their effect for small
    inputs.

    Args:
        weights: the model's weights by canonical name.
        cfg: the model's configuration.
        facts: which heads are trained, and the labels or the environment that has them.
        identity: the model's, so that embeddings of two models are never mixed.
    """
    registry = EmbeddingRegistry(cfg.d_model, identity)
    state_labels, action_labels = coordinate_labels(facts)
    # Only labels that fit are used: a checkpoint may have been trained on another version of the environment.
    state_labels = state_labels if len(state_labels) == cfg.state_dim else ()
    action_labels = action_labels if len(action_labels) == cfg.act_dim else ()
    embed_ln, ln_final = weights.get("embed_ln.w"), weights.get("ln_final.w")
    labels = {"state": state_labels, "action": action_labels, "return_to_go": ("return-to-go",)}
    for name, kind in (("state", "state"), ("action", "action"), ("return_to_go", "reward")):
        if f"embed.{name}.W" in weights:
            rows, named = weights[f"embed.{name}.W"], labels[name]
            if name == "action" and cfg.action_padding:
                named = (*(named or (f"action {i}" for i in range(cfg.act_dim))), "padding")
            if name == "action" and cfg.discrete_actions and cfg.embed_act == "tanh":
                rows = torch.tanh(rows + weights["embed.action.b"])
            registry[f"{kind}_in"] = Embedding(rows, named, kind=kind, side="in", layernorm=embed_ln)
    rows = weights["embed.timestep.W"]
    registry["timestep_in"] = Embedding(
        rows, [f"t={t}" for t in range(len(rows))], kind="timestep", side="in", layernorm=embed_ln
    )
    for name, kind in (("action", "action"), ("state", "state"), ("return_to_go", "reward")):
        if name not in cfg.predicts:
            continue
        registry[f"{kind}_out"] = Embedding(
            weights[f"predict.{name}.W"].T,
            labels[name],
            kind=kind,
            side="out",
            trained=name in facts.trained_heads or kind in facts.trained_heads,
            layernorm=ln_final,
        )
    return registry


def coordinate_labels(facts: RunFacts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels of state and action coordinates: the facts' own, else the environment's, else none."""
    state, action = facts.state_labels, facts.action_labels
    if facts.environment and (state is None or action is None):
        found = environment_labels(facts.environment, facts.environment_kwargs, facts.ignores, facts.texts)
        state, action = state or found[0], action or found[1]
    return state or (), action or ()
