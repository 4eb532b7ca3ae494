"""The identity of an agent: a hash of everything that decides what it does."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

from dt_lens.lens.protocol import require_agent

if TYPE_CHECKING:
    from dt_lens.decision_transformer.model import HookedDecisionTransformer

__all__ = ["model_id"]


def model_id(model: HookedDecisionTransformer) -> str:
    """Sixteen hexadecimal digits that change when any weight, the configuration or the run facts change.

    The first 64 bits of a SHA-256; labels and notes among the facts count like the rest. ``failure`` does not: it says
    how episodes are judged, not what the agent does.

    Raises:
        DtLensError: for a model that is not an agent.
    """
    require_agent(model, "model_id")
    facts = model.facts.to_dict()
    facts.pop("failure", None)
    digest = hashlib.sha256(json.dumps([model.cfg.to_dict(), facts], sort_keys=True, default=str).encode())
    for name, weight in sorted(model.weights.items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
