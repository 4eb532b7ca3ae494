"""Models of the same shape without learned structure: freshly initialised ones, and shuffled weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dt_lens.lens.embeddings import EmbeddingRegistry
from dt_lens.lens.matrices import Structure, catalogue

__all__ = ["Drawn", "shuffled", "untrained"]


class Drawn(NamedTuple):
    """A model's weights, structure and embeddings, without the model."""

    weights: Mapping[str, Tensor]
    structure: Structure
    embeddings: EmbeddingRegistry


def shuffled(model: Any, registry: EmbeddingRegistry, seed: int) -> Drawn:
    """Put the entries of every catalogued weight in random order; LayerNorms and embeddings are unchanged."""

    def permuted(name: str, weight: Tensor) -> Tensor:
        order = torch.from_numpy(_generator(seed, name).permutation(weight.numel()))
        # The order of entries does not matter here, so the tensor may be flattened.
        return weight.detach().flatten()[order.to(weight.device)].view(weight.shape)

    return Drawn(_Redrawn(model, permuted), model.structure, registry)


def untrained(model: Any, registry: EmbeddingRegistry, seed: int) -> Drawn:
    """A model of the same shape before any training: what its own ``untrained(seed)`` returns, embeddings included.

    For a model without that method: Gaussian entries of each weight's mean and standard deviation, scales of one in the
    LayerNorms, and unchanged embeddings. Embeddings that the user registered are unchanged in either case.
    """
    if not callable(getattr(type(model), "untrained", None)):

        def gaussian(name: str, weight: Tensor) -> Tensor:
            wide = weight.detach().to(torch.float32)
            noise = torch.from_numpy(_generator(seed, name).standard_normal(weight.shape)).to(wide)
            return (wide.mean() + wide.std() * noise).to(weight.dtype)

        return Drawn(_Redrawn(model, gaussian, ones=True), model.structure, registry)
    fresh = model.untrained(seed)
    own = fresh.embeddings
    if registry is model.embeddings:
        registered = own
        for name, embedding in registry.items():
            if name not in registered or registered[name].directions.shape != embedding.directions.shape:
                registered[name] = replace(embedding, owner=None)
    else:
        registered = EmbeddingRegistry(registry.d_model, own.owner)
        for name, embedding in registry.items():
            same = name in own and own[name].directions.shape == embedding.directions.shape
            registered[name] = own[name] if same else replace(embedding, owner=None)
    return Drawn(dict(fresh.weights), fresh.structure, registered)


class _Redrawn(Mapping[str, Tensor]):
    """Weights drawn anew from a model's own when they are read, the last few cached; the same for the same seed."""

    def __init__(self, model: Any, make: Callable[[str, Tensor], Tensor], ones: bool = False) -> None:
        self._weights: Mapping[str, Tensor] = model.weights
        self._make, self._ones = make, ones
        self._scale = 0.0 if model.structure.unit_offset else 1.0  # the weight of a norm that multiplies by one
        self._matrices = {factor.weight for matrix in catalogue(model).values() for factor in matrix.factors}
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._matrices:
            weight = self._weights[name]
            return torch.full_like(weight, self._scale) if self._ones and name.endswith(".w") else weight
        if name not in self._made:
            while len(self._made) >= 6:
                del self._made[next(iter(self._made))]
            self._made[name] = self._make(name, self._weights[name])
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, *hashlib.blake2b(name.encode(), digest_size=8).digest()])
