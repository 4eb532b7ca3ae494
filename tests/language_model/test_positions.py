"""Positions of padded batches: padding on the left changes no logit, and ids are what Hugging Face makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dt_lens
from dt_lens import DtLensError
from dt_lens.language_model.batch import positions_of

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [28, 7, 18, 2, 8, 1], [11, 12, 13, 14, 15, 16]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]])
IDS = torch.tensor([[0, 0, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 0]])


@pytest.fixture(params=["gpt2", "gpt_neo", "gptj", "llama", "opt", "gemma3", "olmo2"])
def lens(request: pytest.FixtureRequest, make_lm: Any) -> Any:
    return dt_lens.wrap(make_lm(request.param), check=False)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_padding_changes_no_logit_of_a_real_token(lens: Any) -> None:
    with torch.no_grad():
        padded = lens(TOKENS, attention_mask=MASK)
        hooked, cache = lens.run_with_cache(TOKENS, attention_mask=MASK)
        theirs = lens.model(TOKENS, attention_mask=MASK, position_ids=IDS).logits
        for row, real in enumerate(MASK.bool()):
            close(padded[row, real], lens(TOKENS[row, real][None])[0])
            close(hooked[row, real], padded[row, real])
    assert torch.equal(padded, theirs)
    if "hook_pos_embed" in cache:
        assert torch.equal(cache["hook_pos_embed"], lens.weights["pos_embed.W_pos"][IDS])


def test_positions_may_be_given(lens: Any) -> None:
    ids = torch.tensor([[2, 3, 5, 6, 8, 11]])
    with torch.no_grad():
        for given in (ids, ids.expand(3, -1)):
            out = lens(TOKENS, position_ids=given, attention_mask=torch.ones_like(TOKENS))
            assert torch.equal(
                out, lens.model(TOKENS, position_ids=given, attention_mask=torch.ones_like(TOKENS)).logits
            )
            assert (out - lens(TOKENS)).abs().max() > 1e-3
            _, cache = lens.run_with_cache(TOKENS, position_ids=given)
            close(cache["hook_embed"], lens.weights["embed.W_E"][TOKENS] * lens.table_scale)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo"])
def test_a_wrapped_bridge_does_the_same(kind: str, make_lm: Any) -> None:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = make_lm(kind)
    with torch.no_grad():
        wanted = model(TOKENS, attention_mask=MASK, position_ids=IDS).logits
        unpadded = [model(TOKENS[row, real][None]).logits[0] for row, real in enumerate(MASK.bool())]
        lens = dt_lens.wrap(build_bridge_from_module(model, type(model).__name__, hf_config=model.config), check=False)
        padded = lens(TOKENS, attention_mask=MASK)
        close(padded, wanted)
        close(lens(TOKENS, attention_mask=MASK, position_ids=IDS), wanted)
    for row, real in enumerate(MASK.bool()):
        close(padded[row, real], unpadded[row])


def test_positions_are_counted_only_where_padding_shifts_them() -> None:
    found = positions_of(MASK)
    assert found is not None and torch.equal(found, IDS)
    assert positions_of(torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])) is None
    assert positions_of(torch.tensor([[True, False, True]])).tolist() == [[0, 0, 1]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.arange(5), r"shape \[5\]"),
        (torch.arange(6)[None].float(), "float32"),
        (torch.arange(7, 13)[None], "run from 7 to 12; this model's positions are 0 to 11"),
        (torch.arange(6)[None] - 1, "run from -1 to 4"),
        ([0, 1, 2, 3, 4, 5], "position_ids is a list"),
    ],
)
def test_positions_that_do_not_fit(ids: Any, said: str, make_lm: Any) -> None:
    with pytest.raises(DtLensError, match=said):
        dt_lens.wrap(make_lm("gpt2"), check=False)(TOKENS, position_ids=ids)
