"""``hook_attn_in`` and ``hook_mlp_in``: the stream as attention and MLP read it, and hooks that write in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dt_lens
from dt_lens import DtLensError

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 18, 2, 8, 1]])
KINDS = ("gpt2", "gptj", "gpt_neox", "bloom", "opt", "llama", "phi3", "gemma2", "olmo2")
ATTN, MLP = "blocks.1.hook_attn_in", "blocks.1.hook_mlp_in"
QKV = [f"blocks.1.attn.hook_{letter}" for letter in "qkv"]


@pytest.fixture(scope="module", params=KINDS)
def lens(request: pytest.FixtureRequest, make_lm: Any) -> Any:
    return dt_lens.wrap(make_lm(request.param), check=False)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def run(lens: Any, *hooks: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = lens.run_with_hooks(TOKENS, fwd_hooks=hooks)
    return found


def cached_with(lens: Any, name: str, given: Tensor, wanted: list[str]) -> Any:
    with torch.no_grad(), lens.hooks([(name, lambda x, hook: given)]):
        return lens.run_with_cache(TOKENS, names_filter=wanted)[1]


def test_they_are_the_stream_and_cached_by_choice(lens: Any) -> None:
    with torch.no_grad():
        logits, cache = lens.run_with_cache(TOKENS)
    assert ATTN not in cache and MLP not in cache
    lens.set_use_attn_in(True)
    lens.set_use_hook_mlp_in(True)
    with torch.no_grad():
        again, cache = lens.run_with_cache(TOKENS)
    lens.set_use_attn_in(False)
    lens.set_use_hook_mlp_in(False)
    assert torch.equal(again, logits)
    before = cache["resid_pre", 1]
    assert torch.equal(cache["attn_in", 1], before[:, :, None].expand(-1, -1, lens.cfg.n_heads, -1))
    assert torch.equal(cache[MLP], before if lens.cfg.parallel else cache["resid_mid", 1])


def test_heads_read_what_a_hook_gives_and_the_stream_goes_on(lens: Any) -> None:
    """Queries, keys and values of the same heads, from a pass whose whole stream is the other one."""
    torch.manual_seed(0)
    other, group = torch.randn(2, 6, lens.cfg.d_model), lens.cfg.n_heads // lens.cfg.n_kv_heads
    mine = slice(group, 2 * group) if lens.cfg.n_kv_heads > 1 else slice(0, group)
    shared = slice(mine.start // group, mine.stop // group)
    there = cached_with(lens, "blocks.1.hook_resid_pre", other, QKV)

    def put(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, :, mine] = other[:, :, None]
        return x

    def patch(x: Tensor, hook: Any) -> Tensor:
        part = mine if hook.name.endswith("_q") else shared
        x = x.clone()
        x[:, :, part] = there[hook.name][:, :, part]
        return x

    found, wanted = run(lens, (ATTN, put)), run(lens, *((name, patch) for name in QKV))
    close(found, wanted)
    assert (found - run(lens)).abs().max() > 1e-3


def test_the_mlp_reads_what_a_hook_gives_and_the_stream_goes_on(lens: Any) -> None:
    torch.manual_seed(1)
    other, out = torch.randn(2, 6, lens.cfg.d_model), "blocks.1.hook_mlp_out"
    entry = f"blocks.1.hook_resid_{'pre' if lens.cfg.parallel else 'mid'}"
    there = cached_with(lens, entry, other, [out])[out]
    found, wanted = run(lens, (MLP, lambda x, hook: other)), run(lens, (out, lambda x, hook: there))
    close(found, wanted)
    assert (found - run(lens)).abs().max() > 1e-3


def test_hooks_may_write_in_place(lens: Any) -> None:
    """A hook that zeroes a part of its tensor and returns it, as most do, has the effect of one that returns a copy."""
    names = ["attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_result", "mlp.hook_post", "hook_mlp_in"]
    names += ["ln1.hook_normalized"] * lens.cfg.pre_norm + ["hook_attn_in"] * (lens.cfg.n_kv_heads == lens.cfg.n_heads)
    names += [] if lens.cfg.parallel else ["hook_resid_mid"]

    def halve(x: Tensor, hook: Any) -> Tensor:
        x[:, 1:, ..., ::2] *= 0.5
        return x

    def unseen(x: Tensor, hook: Any) -> Tensor:
        x.data[:, 1:, ..., ::2] *= 0.5  # PyTorch does not count it
        return x

    plain = run(lens)
    for name in names:
        place = f"blocks.1.{name}"
        wanted = run(lens, (place, lambda x, hook: halve(x.clone(), hook)))
        close(run(lens, (place, halve)), wanted)
        assert (wanted - plain).abs().max() > 1e-4, name
        close(run(lens, (place, unseen)), wanted)
        with torch.inference_mode():
            close(lens.run_with_hooks(TOKENS, fwd_hooks=[(place, halve)]), wanted)


def test_heads_that_share_keys_are_changed_alike(make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm("llama"), check=False)

    def one(x: Tensor, hook: Any) -> Tensor:
        x[:, :, 1] = 0
        return x

    with pytest.raises(DtLensError, match=r"2 heads share keys and values, so a hook at blocks.1.hook_attn_in must"):
        run(lens, (ATTN, one))


def test_gradients_pass_each_heads_copy(make_lm: Any) -> None:
    """Summed over heads they are what attention gives to the gradient of the stream; the rest goes around it."""
    lens = dt_lens.wrap(make_lm("gpt2"), check=False)
    found: dict[str, Tensor] = {}

    def note(x: Any, hook: Any) -> None:
        found[hook.name] = x

    names = [ATTN, MLP, "blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post"]
    with lens.hooks(bwd_hooks=[(name, note) for name in names]):
        lens(TOKENS, return_type="loss").backward()
    close(found[names[3]], found[MLP] + found[names[4]])
    close(found[names[2]], found[ATTN].sum(2) + found[names[3]])
    assert found[ATTN].abs().max() > 1e-5
