"""Small models whose weights are laid out by hand: every singular direction is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.model import HookedDecisionTransformer

D = 64


def frame(first: Any, seed: int) -> np.ndarray[Any, Any]:
    """An orthonormal frame ``[D, D]`` whose first rows are ``first`` made orthonormal, the rest random."""
    given = np.atleast_2d(np.asarray(first, dtype=np.float64)).reshape(-1, D)
    rest = np.random.default_rng(seed).standard_normal((D - len(given), D))
    q, r = np.linalg.qr(np.concatenate([given, rest]).T)
    return (q * np.sign(np.diag(r))).T


@pytest.fixture(scope="session")
def plain() -> Callable[..., HookedDecisionTransformer]:
    """A model without LayerNorms, whose weights determine the directions directly."""

    def make(seed: int = 0, **options: Any) -> HookedDecisionTransformer:
        torch.manual_seed(seed)
        shape: dict[str, Any] = {"d_model": D, "n_layers": 3, "n_heads": 1, "d_mlp": 96, "n_ctx": 3, "max_ep_len": 60}
        shape |= {"normalization": "none", "final_ln": False, "embed_ln": False}
        cfg = HookedDecisionTransformerConfig(11, 3, **(shape | options))
        return HookedDecisionTransformer(cfg).eval()

    return make


@pytest.fixture(scope="session")
def plant() -> Callable[..., None]:
    """Give a matrix chosen singular directions on its stream side, in this order, sigmas falling, then random ones."""

    def put(model: Any, name: str, first: Any, seed: int = 1) -> None:
        weight = model.weights[name]
        directions = frame(first, seed)
        generator = np.random.default_rng(seed + 1000)
        inner = np.linalg.qr(generator.standard_normal((max(weight.shape[-2:]), D)))[0].T[:, : max(weight.shape[-2:])]
        sigma = np.linspace(2.0, 1.0, D)
        made = np.einsum("k,kd,kn->dn", sigma, directions, inner)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(made if name.endswith("W_in") else made.T))

    return put


@pytest.fixture(scope="session")
def units() -> Callable[..., np.ndarray[Any, Any]]:
    """Unit rows of an embedding of a model."""

    def rows(model: Any, name: str) -> np.ndarray[Any, Any]:
        found = model.embeddings[name].directions.detach().double().numpy()
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    return rows
