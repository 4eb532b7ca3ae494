"""The identity of a model: hashes of everything that decides what it does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dt_lens.edits.state import state_of
from dt_lens.lens.weights import weight_bytes

__all__ = ["base_and_model_id"]


def base_and_model_id(model: Any) -> tuple[str, str]:
    """Sixteen hexadecimal digits each: of the weights and configuration without edits, and as they are now.

    The first 64 bits of a SHA-256. Without edits in force the two are the same.
    """
    digests = {name: _digest(weight) for name, weight in model.weights.items()}
    untouched = {name: _digest(weight) for name, weight in state_of(model).untouched.items()}
    about = json.dumps(_plain(model.cfg), sort_keys=True)
    return _joined(about, digests | untouched), _joined(about, digests)


def _digest(weight: Tensor) -> bytes:
    digest = hashlib.sha256(f"{weight.dtype} {list(weight.shape)} ".encode())
    digest.update(weight_bytes(weight))
    return digest.digest()


def _joined(about: str, digests: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(digests):
        digest.update(name.encode() + digests[name])
    return digest.hexdigest()[:16]


def _plain(cfg: Any) -> dict[str, Any]:
    """The plain values of a configuration; the text of others, such as functions, holds an address."""
    values = cfg.to_dict() if hasattr(cfg, "to_dict") else vars(cfg)
    return {str(k): v for k, v in values.items() if isinstance(v, str | int | float | bool | list | None)}
