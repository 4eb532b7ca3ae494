"""Scores and heads' results as hooks, and hooks while the user calls his own model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dt_lens
from dt_lens import DtLensError

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 18, 2, 8, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
KINDS = ("gpt2", "gptj", "gpt_neo", "llama", "bloom", "opt", "gemma2")
SCORES, PATTERN, RESULT = (f"blocks.1.attn.hook_{name}" for name in ("attn_scores", "pattern", "result"))


@pytest.fixture(scope="module", params=KINDS)
def lens(request: pytest.FixtureRequest, make_lm: Any) -> Any:
    return dt_lens.wrap(make_lm(request.param), check=False)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def run(lens: Any, *hooks: Any, **named: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = lens.run_with_hooks(TOKENS, fwd_hooks=hooks, **named)
    return found


def test_scores_are_what_the_pattern_is_the_softmax_of(lens: Any) -> None:
    for named in ({}, {"attention_mask": MASK}):
        with torch.no_grad():
            _, cache = lens.run_with_cache(TOKENS, names_filter=[SCORES, PATTERN], **named)
        scores, real = cache[SCORES], MASK.bool() if named else torch.ones_like(MASK).bool()
        visible = (torch.ones(6, 6).tril().bool() & real[:, None, :])[:, None].expand_as(scores)
        rows = real[:, None, :, None].expand_as(scores)
        if lens.cfg.family not in ("gpt_neo", "gemma2"):  # a window
            assert torch.equal((scores > -torch.inf)[rows], visible[rows])
        close(scores.softmax(-1)[rows], cache[PATTERN][rows])
        close(run(lens, (SCORES, lambda x, hook: x), **named), run(lens, (PATTERN, lambda x, hook: x), **named))
        # What a hook gives is what the softmax is of, also where a padded query sees nothing.
        edited = run(lens, (SCORES, lambda x, hook: x * 2), **named)
        doubled = (scores * 2).softmax(-1).nan_to_num()
        wanted = run(lens, (PATTERN, lambda x, hook, given=doubled: given), **named)
        close(edited[real], wanted[real])
        assert edited.isfinite().all() and (edited - run(lens, **named))[real].abs().max() > 1e-3


def test_results_are_what_each_head_adds(lens: Any) -> None:
    W = lens.weights
    with torch.no_grad():
        _, cache = lens.run_with_cache(TOKENS, names_filter=[RESULT, "blocks.1.attn.hook_z", "blocks.1.hook_attn_out"])
    z, W_O = cache["z", 1], W["blocks.1.attn.W_O"]
    for head in range(lens.cfg.n_heads):
        close(cache[RESULT][:, :, head], z[:, :, head] @ W_O[head])
    if not lens.cfg.post_norm:
        close(cache[RESULT].sum(2) + W.get("blocks.1.attn.b_O", torch.zeros(1)), cache["attn_out", 1])

    def drop(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, :, 1] = 0
        return x

    close(run(lens, (RESULT, drop)), run(lens, ("blocks.1.attn.hook_z", drop)))
    assert (run(lens, (RESULT, drop)) - run(lens)).abs().max() > 1e-3
    lens.set_use_attn_result(True)
    assert RESULT in lens.run_with_cache(TOKENS)[1]
    lens.set_use_attn_result(False)
    assert RESULT not in lens.run_with_cache(TOKENS)[1]


def zero(x: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(x)


@pytest.mark.parametrize("name", ["blocks.0.hook_mlp_out", "blocks.1.attn.hook_pattern"])
def test_hooks_act_in_calls_of_the_users_own_model(lens: Any, name: str) -> None:
    mine = lens.model
    own = mine.config._attn_implementation
    with torch.no_grad():
        plain, wanted = mine(TOKENS).logits, run(lens, (name, zero))
        count: list[str] = []
        with lens.hooks([(name, zero)]):
            close(mine(TOKENS).logits, wanted)
            close(lens(TOKENS), wanted)
            with lens.hooks([("blocks.0.hook_resid_pre", lambda x, hook: count.append(hook.name))]):
                close(mine(TOKENS).logits, wanted)
                assert len(count) == 1
                _, cache = lens.run_with_cache(TOKENS, names_filter="hook_embed")
                close(mine(TOKENS).logits, wanted)
            assert len(count) == 3 and not cache["hook_embed"].eq(0).all()
            close(mine(TOKENS).logits, wanted)
            assert len(count) == 3
        assert torch.equal(mine(TOKENS).logits, plain) and (wanted - plain).abs().max() > 1e-3
    assert mine.config._attn_implementation == own and not lens._open and lens._standing is None


def test_a_model_that_only_shares_its_weights_is_refused(make_hf: Any) -> None:
    mine = make_hf()
    model = dt_lens.wrap(mine, check=False)
    batch = model.probe()
    with model.hooks([("blocks.0.hook_mlp_out", zero)]):
        model(**batch)
        with pytest.raises(DtLensError, match=r"Hooks act on the model that dt_lens.wrap or load gave, not on a Dec"):
            mine(**batch)
    mine(**batch)


def test_a_text_in_a_batch_has_the_activations_that_it_has_alone() -> None:
    named = dt_lens.load("tiny-gpt2", check=False)
    texts = ["Once upon a time there was", "The dog"]
    with torch.no_grad():
        _, cache = named.run_with_cache(texts)
        tokens, mask = named._encoded(texts, padding_side="left")
        left, padded = named.run_with_cache(tokens, attention_mask=mask)
        for row, text in enumerate(texts):
            logits, alone = named.run_with_cache(text)
            n = logits.shape[1]
            for name in ("hook_pos_embed", "blocks.2.hook_resid_post", "blocks.3.mlp.hook_post"):
                torch.testing.assert_close(cache[name][row, :n], alone[name][0], rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(padded[name][row, -n:], alone[name][0], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(
                cache["pattern", 3][row, :, :n, :n], alone["pattern", 3][0], rtol=1e-3, atol=1e-4
            )
            torch.testing.assert_close(left[row, -n:], logits[0], rtol=1e-3, atol=1e-3)
