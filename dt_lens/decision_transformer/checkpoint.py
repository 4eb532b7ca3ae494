"""Save a decision transformer in Hugging Face's format, which its own class reads back to identical outputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import save_file

from dt_lens.arguments import atomic_write, local_path
from dt_lens.decision_transformer.facts import FACTS_FILE
from dt_lens.decision_transformer.hf_layout import config_to_hf, hf_from_canonical
from dt_lens.errors import DtLensError
from dt_lens.lens.protocol import require_agent

if TYPE_CHECKING:
    from dt_lens.decision_transformer.facts import RunFacts
    from dt_lens.decision_transformer.model import HookedDecisionTransformer

__all__ = ["save_pretrained"]


def save_pretrained(model: HookedDecisionTransformer, folder: str | Path, *, edited: bool = False) -> Path:
    """Write ``config.json``, ``model.safetensors`` (Hugging Face's format) and ``dt_lens.json`` (the run facts).

    A failure leaves none of them half written, and an old checkpoint in ``folder`` as it was.

    Args:
        model: a decision transformer.
        folder: created if missing.
        edited: save the weights with the edits in force; otherwise a model that is being edited is refused.

    Raises:
        DtLensError: while an edit is in force, for a model that Hugging Face's class cannot represent, or a folder that
            cannot be written.
    """
    require_agent(model, "save_pretrained")
    folder = local_path(folder, "folder")
    active = getattr(model, "active_edits", ())
    if active and not edited:
        raise DtLensError(
            f"An edit of {active[0].matrix.name} is in force, and would be saved with the model; end it first, or pass "
            "edited=True to save the edited weights."
        )
    config = config_to_hf(model.cfg)
    tensors = hf_from_canonical(model.weights, model.cfg)
    config["dtype"] = str(tensors["encoder.wte.weight"].dtype).removeprefix("torch.")
    # All three are written before the first is replaced, so that a failure leaves an old checkpoint whole.
    with atomic_write(folder / FACTS_FILE) as facts_part:
        facts_part.write_text(_facts(model).to_json() + "\n", encoding="utf-8")
        with atomic_write(folder / "config.json") as config_part:
            config_part.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            with atomic_write(folder / "model.safetensors", SafetensorError) as weights_part:
                save_file(tensors, weights_part, metadata={"format": "pt"})
    return folder


def _facts(model: HookedDecisionTransformer) -> RunFacts:
    """The run facts, with what was assumed among the notes: otherwise the file would state it as known."""
    about = {name: value for name, value in model.facts.about.items() if name != "assumed"}
    return replace(model.facts, about={**about, "assumed": dict(model.assumed)} if model.assumed else about)
