"""What is printed of a decision transformer."""

from __future__ import annotations

from typing import Any

from dt_lens.lens.assumed import assumed_text
from dt_lens.lens.printing import Rows, listed, size_of

__all__ = ["agent_rows"]


def agent_rows(model: Any) -> tuple[str, Rows]:
    """The title and the lines of a ``HookedDecisionTransformer``: its shape, what it acts in, what to do next."""
    cfg, facts = model.cfg, model.facts
    title = (
        f"{type(model).__name__}: {cfg.n_layers} layer{'s' * (cfg.n_layers != 1)} x {cfg.n_heads} "
        f"head{'s' * (cfg.n_heads != 1)}, d_model {cfg.d_model}, d_mlp {cfg.d_mlp}, context {facts.context}"
    )
    action = f"one of {cfg.act_dim}" if cfg.discrete_actions else f"{cfg.act_dim} number{'s' * (cfg.act_dim != 1)}"
    state = f"{cfg.state_dim} number{'s' * (cfg.state_dim != 1)}{_of_observation(facts)}"
    rows = [("state", state), ("action", action)]
    if facts.environment:
        targets = ", ".join(f"{target:g}" for target in facts.target_returns)
        rows.append(("environment", f"{facts.environment}{', target returns ' + targets if targets else ''}"))
    rows += [("weights", size_of(model.weights)), ("embeddings", listed(model.embeddings))]
    active = getattr(model, "active_edits", ())
    rows += [("in force", listed([f"{edit.matrix.name} sv={edit.sv}" for edit in active], 3))] if active else []
    rows += [("assumed", assumed_text(model.assumed))] if model.assumed else []
    rows += [("note", note) for note in getattr(facts, "notes", ())]
    return title, [
        *rows,
        ("next", "dt_lens.WeightSVD(model), dt_lens.evaluate(model), model.weights, model.embeddings"),
    ]


def _of_observation(facts: Any) -> str:
    """What of an observation is not read, and which texts are."""
    parts = [f", {name} one-hot among {len(known)} texts" for name, known in (facts.texts or {}).items()]
    return "".join(parts) + (f", without {listed(facts.ignores)}" if facts.ignores else "")
