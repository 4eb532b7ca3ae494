"""A TransformerBridge given to wrap: its own memory is edited, and a processed one is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dt_lens
from dt_lens import DtLensError, SingularEdit

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [28, 7, 18, 2, 8, 1, 8, 0]])
KINDS = ("gpt2", "gptj", "gpt_neo", "llama", "mistral", "qwen2")


def bridged(model: Any) -> Any:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bridge_is_certified_edited_and_as_it_was(kind: str, make_lm: Any) -> None:
    model = make_lm(kind)
    wanted = model(TOKENS).logits
    bridge = bridged(model)
    lens = dt_lens.wrap(bridge)
    assert lens.original is bridge
    torch.testing.assert_close(lens(TOKENS), wanted, rtol=1e-4, atol=1e-5)
    before = bridge(TOKENS)
    for matrix, side in (("attn.OV.1", "write"), ("mlp.W_in", None), ("attn.W_K", None)):
        with SingularEdit(lens, f"blocks.1.{matrix}", sv=0, side=side):
            assert (bridge(TOKENS) - before).abs().max() > 1e-4
        assert torch.equal(bridge(TOKENS), before)


def test_no_number_is_copied(make_lm: Any) -> None:
    bridge = bridged(make_lm("gpt2"))
    lens = dt_lens.wrap(bridge, check=False)
    memory = {parameter.untyped_storage().data_ptr() for parameter in bridge.original_model.parameters()}
    assert all(weight.untyped_storage().data_ptr() in memory for weight in lens.weights.values())


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "qwen2"])
def test_processed_weights_are_refused(kind: str, make_lm: Any) -> None:
    bridge = bridged(make_lm(kind))
    bridge.enable_compatibility_mode()
    with pytest.raises(DtLensError, match="compatibility mode"):
        dt_lens.wrap(bridge)


def test_a_bridge_that_was_moved_afterwards(make_lm: Any) -> None:
    bridge = bridged(make_lm("gpt2"))
    lens = dt_lens.wrap(bridge, check=False)
    bridge.original_model.to(torch.float64)
    with (
        pytest.raises(DtLensError, match=r"no longer shares the weight 'blocks\.0\.mlp\.W_in'"),
        SingularEdit(lens, "blocks.0.mlp.W_in", sv=0),
    ):
        pass
