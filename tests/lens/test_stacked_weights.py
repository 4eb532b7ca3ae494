"""The weights of all blocks under TransformerLens's names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dt_lens


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_language_models(kind: str, make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm(kind), check=False)
    for name, where in (("W_in", "mlp"), ("W_out", "mlp"), ("W_Q", "attn"), ("W_K", "attn"), ("W_O", "attn")):
        stacked = getattr(lens, name)
        assert len(stacked) == 2
        for layer in range(2):
            assert torch.equal(stacked[layer], lens.weights[f"blocks.{layer}.{where}.{name}"])
    assert lens.W_in.shape[1] == lens.cfg.d_model and lens.W_U.shape == (lens.cfg.d_model, lens.cfg.d_vocab)
    assert lens.W_E.data_ptr() == lens.weights["embed.W_E"].data_ptr()
    assert hasattr(lens, "W_pos") == (kind == "gpt2") and hasattr(lens, "W_gate") == (kind == "llama")
    with pytest.raises(AttributeError, match="W_nothing"):
        _ = lens.W_nothing


def test_an_agents(make_dt: Any) -> None:
    model = make_dt()
    assert torch.equal(model.W_in[1], model.weights["blocks.1.mlp.W_in"])
    assert model.b_out.shape == (model.cfg.n_layers, model.cfg.d_model) and not hasattr(model, "W_E")
