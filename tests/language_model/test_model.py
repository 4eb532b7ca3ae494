"""Activations under TransformerLens's names: read, replaced, and the model as it was afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import dt_lens
from dt_lens import DtLensError, SingularEdit

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [28, 7, 18, 2, 8, 1, 8, 0]])
KINDS = ("bloom", "gpt2", "gptj", "gpt_neo", "llama", "opt", "gemma3", "olmo2")


@pytest.fixture(params=KINDS)
def lens(request: pytest.FixtureRequest, make_lm: Any) -> Any:
    return dt_lens.wrap(make_lm(request.param), check=False)


def cached(lens: Any, hooks: Any = ()) -> tuple[Tensor, dict[str, Tensor]]:
    with lens.hooks(fwd_hooks=list(hooks)), torch.no_grad():
        out, cache = lens.run_with_cache(TOKENS)
    return out, dict(cache)


def test_hooks_that_return_what_they_got_change_nothing(lens: Any) -> None:
    with torch.no_grad():
        plain = lens.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: True, lambda x, hook: None)])
        same = lens.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: True, lambda x, hook: x)])
        copied = lens.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: True, lambda x, hook: x.clone())])
    assert torch.equal(plain, same)
    torch.testing.assert_close(copied, plain, rtol=1e-4, atol=1e-5)


def test_every_hook_reaches_the_logits(lens: Any) -> None:
    def tilted(x: Tensor, hook: Any) -> Tensor:
        if hook.name.endswith("hook_scale"):
            return x * torch.linspace(0.5, 1.5, x.shape[1])[:, None]
        return x * torch.linspace(0.5, 1.5, x.shape[-1])  # not by one number, which a norm would take back

    with torch.no_grad():
        plain = lens.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: True, lambda x, hook: None)])
        for name in lens.hook_dict:
            changed = lens.run_with_hooks(TOKENS, fwd_hooks=[(name, tilted)])
            assert (changed - plain).abs().max() > 1e-4, name
        assert torch.equal(lens.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: True, lambda x, hook: None)]), plain)


def test_what_is_put_into_the_stream_goes_both_ways(lens: Any) -> None:
    """A change of the stream between attention and MLP is in the stream after the block, and in what the MLP reads."""
    put = {name: torch.randn(2, 8, 16) for name in ("blocks.1.hook_resid_pre", "blocks.0.hook_resid_mid")}
    for name in [name for name in put if name in lens.hook_dict]:
        _, cache = cached(lens, [(name, lambda x, hook: put[hook.name])])
        layer, added = int(name.split(".")[1]), put[name]
        after = added + cache[f"blocks.{layer}.hook_mlp_out"]
        if name.endswith("pre"):
            after = after + cache[f"blocks.{layer}.hook_attn_out"]
        torch.testing.assert_close(cache[f"blocks.{layer}.hook_resid_post"], after, rtol=1e-4, atol=1e-4)


def test_a_pattern_that_is_put_in_its_place_gathers_the_values(lens: Any) -> None:
    name = "blocks.0.attn.hook_pattern"
    uniform = torch.full((8, 8), 1.0).tril() / torch.arange(1, 9)[:, None]
    _, cache = cached(lens, [(name, lambda x, hook: uniform.expand_as(x))])
    v = cache["blocks.0.attn.hook_v"].repeat_interleave(lens.cfg.n_heads // lens.cfg.n_kv_heads, 2)
    gathered = torch.einsum("qk,nkhe->nqhe", uniform, v)
    torch.testing.assert_close(cache["blocks.0.attn.hook_z"], gathered, rtol=1e-4, atol=1e-5)


def test_head_outputs_are_split_as_the_weights_are(lens: Any) -> None:
    _, cache = cached(lens)
    weights = lens.weights
    for letter in "qkv":
        x = cache["blocks.1.hook_resid_pre"]
        if lens.cfg.pre_norm:
            w, b = weights["blocks.1.ln1.w"] + lens.cfg.unit_offset, weights.get("blocks.1.ln1.b", 0)
            x = cache["blocks.1.ln1.hook_normalized"] * w + b
        W, b = weights[f"blocks.1.attn.W_{letter.upper()}"], weights.get(f"blocks.1.attn.b_{letter.upper()}", 0)
        torch.testing.assert_close(
            cache[f"blocks.1.attn.hook_{letter}"], torch.einsum("ntd,hde->nthe", x, W) + b, rtol=1e-4, atol=1e-4
        )


def test_gradients_flow_through_hooks(lens: Any) -> None:
    seen: dict[str, Tensor] = {}
    names = ["blocks.0.hook_resid_pre", "blocks.0.mlp.hook_post", "blocks.1.attn.hook_z"]

    def keep(grad: Tensor, hook: Any) -> None:
        seen[hook.name] = grad

    with lens.hooks(bwd_hooks=[(name, keep) for name in names]):
        lens(TOKENS).sum().backward()
    assert all(seen[name].abs().sum() > 0 for name in names)


def test_an_exception_in_a_hook_leaves_nothing_behind(lens: Any) -> None:
    def fail(x: Tensor, hook: Any) -> None:
        raise RuntimeError("on purpose")

    mode = lens.model.config._attn_implementation
    for name in ("blocks.1.attn.hook_pattern", "blocks.0.hook_resid_pre"):
        with pytest.raises(RuntimeError, match="on purpose"):
            lens.run_with_hooks(TOKENS, fwd_hooks=[(name, fail)])
    assert lens.model.config._attn_implementation == mode
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lens.model.modules())
    assert not any("_attn" in module.__dict__ for module in lens.model.modules())


def test_padding_is_passed_on(lens: Any) -> None:
    mask = torch.ones_like(TOKENS)
    mask[0, 5:] = 0
    torch.testing.assert_close(
        lens(TOKENS, attention_mask=mask), lens.model(TOKENS, attention_mask=mask).logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_on_the_left_is_no_nan_where_hooks_are(lens: Any, dtype: torch.dtype) -> None:
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    lens.to(dtype)
    with torch.no_grad():
        plain = lens(TOKENS, attention_mask=mask)
        out, cache = lens.run_with_cache(TOKENS, attention_mask=mask)
    assert not any(x.isnan().any() for x in cache.values())
    torch.testing.assert_close(out[0, 3:], plain[0, 3:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[1], plain[1], rtol=1e-4, atol=1e-5)


def test_the_mode_is_the_models(make_lm: Any) -> None:
    model = make_lm("gpt2")
    lens = dt_lens.wrap(model, check=False)
    assert not lens.training
    model.train()
    assert lens.training
    dt_lens.certify(lens)
    assert model.training
    lens.eval()
    assert not model.training


def test_moving_the_model_moves_the_lens(make_lm: Any) -> None:
    model = make_lm("llama")
    lens = dt_lens.wrap(model, check=False)
    before = lens.embeddings
    before["mine"] = dt_lens.Embedding(torch.eye(16))
    model.to(torch.float64)
    assert lens.weights["embed.W_E"].dtype == torch.float64
    assert lens.embeddings["token_in"].directions.dtype == torch.float64
    assert "mine" in lens.embeddings
    with SingularEdit(lens, "blocks.0.mlp.W_gate", sv=0):
        pass
    lens.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_copy_is_a_model_of_its_own(make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm("gpt2"), check=False)
    twin = copy.deepcopy(lens)
    before = lens(TOKENS)
    with torch.no_grad():
        twin.weights["blocks.0.mlp.W_in"].zero_()
    assert torch.equal(lens(TOKENS), before)
    assert twin.identity != lens.identity
    assert twin.original is twin.model is not lens.model


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (torch.tensor([1, 2]), "of shape \\[2\\]"),
        (torch.zeros(1, 2), "float32"),
        (torch.zeros(1, 0, dtype=torch.long), "of shape \\[1, 0\\]"),
        (torch.full((1, 2), 29), "run from 29 to 29"),
        (torch.full((1, 2), -1), "run from -1"),
        (torch.zeros(1, 13, dtype=torch.long), "13 tokens do not fit this model's context of 12"),
        ("text", "without a tokenizer"),
    ],
)
def test_tokens_of_another_form(tokens: Any, said: str, make_lm: Any) -> None:
    with pytest.raises(DtLensError, match=said):
        dt_lens.wrap(make_lm("gptj"), check=False)(tokens)


def test_a_mask_of_another_shape(make_lm: Any) -> None:
    with pytest.raises(DtLensError, match="attention_mask has shape"):
        dt_lens.wrap(make_lm("gpt2"), check=False)(TOKENS, attention_mask=torch.ones(2, 3))


def test_attention_that_shows_no_pattern_is_refused(make_lm: Any) -> None:
    model = make_lm("gptj")
    lens = dt_lens.wrap(model, check=False)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(DtLensError, match="attn_implementation='eager'"):
        lens.run_with_cache(TOKENS)


def test_weights_of_two_types_are_refused(make_lm: Any) -> None:
    model = make_lm("gpt2")
    model.transformer.ln_f.half()
    with pytest.raises(DtLensError, match="float16"):
        dt_lens.wrap(model)
