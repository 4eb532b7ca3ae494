"""The hooks of the hooked model: where they stand, what they hold, and that reading changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dt_lens.decision_transformer.model import HookedDecisionTransformer

Make = Callable[..., HookedDecisionTransformer]
Run = Callable[[HookedDecisionTransformer, dict[str, Tensor]], dict[str, Tensor]]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooking_the_pattern_changes_nothing(
    make: Make, run: Run, make_batch: Any, name: str, padding: str, dtype: torch.dtype
) -> None:
    model = make(name).to(dtype)
    batch = make_batch(model.cfg, padding=padding)
    batch = {key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()}
    plain = run(model, batch)
    with torch.no_grad():
        out, cache = model.run_with_cache(**batch)
        hooked = model.run_with_hooks(**batch, fwd_hooks=[(lambda name: "scores" in name, lambda x, hook: x)])
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for output in plain:
        for other in (out, hooked):
            torch.testing.assert_close(getattr(other, output), plain[output], rtol=tolerance, atol=tolerance)
    for layer in range(model.cfg.n_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"].double()
        assert torch.equal(pattern, pattern.tril()) and (pattern.sum(-1) - 1).abs().max() < 1e-2


def test_layer_norm_with_hooks_is_as_exact_as_without(make: Make) -> None:
    """Mean and variance are taken in single precision; in bfloat16 they would be wrong."""
    norm = make().to(torch.bfloat16).blocks[0].ln1
    x = (40 + torch.randn(50, 8)).bfloat16()
    plain = norm(x)
    norm.hook_scale.add_hook(lambda x, hook: x)
    torch.testing.assert_close(norm(x), plain, rtol=2**-7, atol=1e-3)


def test_every_hook_point_is_alive(make: Make, run: Run, make_batch: Any, name: str) -> None:
    model = make(name)
    batch = make_batch(model.cfg, padding="left")
    plain = run(model, batch)
    model.set_use_attn_result(True)
    model.set_use_attn_in(True)
    model.set_use_hook_mlp_in(True)
    with torch.no_grad():
        _, cache = model.run_with_cache(**batch)
    # The names are TransformerLens's; a hook with a wrong name would be missing from the cache.
    assert set(model.hook_dict) == set(cache)
    for layer in range(model.cfg.n_layers):
        for point in ("hook_q", "hook_k", "hook_v", "hook_attn_scores", "hook_pattern", "hook_z", "hook_result"):
            assert f"blocks.{layer}.attn.{point}" in cache
        streams = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_in", "hook_mlp_in")
        for point in (*streams, "hook_attn_out", "hook_mlp_out"):
            assert f"blocks.{layer}.{point}" in cache
        mlp = {f"blocks.{layer}.mlp.hook_{point}" for point in ("pre", "post", "pre_linear")[: 2 + model.cfg.gated_mlp]}
        assert {point for point in cache if ".mlp." in point and f".{layer}." in point} == mlp
    generator = torch.Generator().manual_seed(1)
    for point in cache:
        shift = torch.randn(cache[point].shape, generator=generator)
        with torch.no_grad():
            changed = model.run_with_hooks(**batch, fwd_hooks=[(point, lambda x, hook, shift=shift: x + shift)])
        moved = max((getattr(changed, output) - plain[output]).abs().max() for output in plain)
        assert moved > 1e-3, f"{point} has no effect"
    after = run(model, batch)  # no hook is left behind
    assert all(torch.equal(after[output], plain[output]) for output in plain)
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_what_the_hooks_hold(make: Make, make_batch: Any) -> None:
    model = make()
    batch = make_batch(model.cfg, padding="left")
    model.set_use_attn_result(True)
    with torch.no_grad():
        _, cache = model.run_with_cache(**batch)
    W = model.weights
    for layer in range(2):
        b = f"blocks.{layer}"
        x = cache[f"{b}.hook_resid_pre"]
        seen = cache[f"{b}.ln1.hook_normalized"] * W[f"{b}.ln1.w"] + W[f"{b}.ln1.b"]
        torch.testing.assert_close(seen, F.layer_norm(x, (8,), W[f"{b}.ln1.w"], W[f"{b}.ln1.b"], model.cfg.eps))
        scores = cache[f"{b}.attn.hook_attn_scores"]
        q, k, v = (cache[f"{b}.attn.hook_{letter}"] for letter in "qkv")
        expected = torch.einsum("nqhe,nkhe->nhqk", q, k) / 2  # the square root of a head's four features
        visible = scores > -torch.inf
        torch.testing.assert_close(scores[visible], expected[visible])
        torch.testing.assert_close(cache[f"{b}.attn.hook_pattern"], scores.softmax(-1))
        z = torch.einsum("nhqk,nkhe->nqhe", cache[f"{b}.attn.hook_pattern"], v)
        torch.testing.assert_close(cache[f"{b}.attn.hook_z"], z)
        result = cache[f"{b}.attn.hook_result"]
        torch.testing.assert_close(result, torch.einsum("nqhe,hed->nqhd", z, W[f"{b}.attn.W_O"]))
        attn_out = cache[f"{b}.hook_attn_out"]
        torch.testing.assert_close(attn_out, result.sum(2) + W[f"{b}.attn.b_O"])
        torch.testing.assert_close(cache[f"{b}.hook_resid_mid"], x + attn_out)
        mlp_out = cache[f"{b}.hook_mlp_out"]
        torch.testing.assert_close(cache[f"{b}.hook_resid_post"], cache[f"{b}.hook_resid_mid"] + mlp_out)


@pytest.mark.parametrize("normalization", ["pre", "post", "none"])
def test_a_head_and_the_mlp_read_what_a_hook_gives_and_the_stream_goes_on(
    make: Make, make_batch: Any, normalization: str
) -> None:
    """What the one head, or the MLP, makes of another stream is taken from a pass whose whole stream is that one."""
    model = make(normalization=normalization)
    batch, b = make_batch(model.cfg, padding="left"), "blocks.1"
    heads, out = [f"{b}.attn.hook_{letter}" for letter in "qkv"], f"{b}.hook_mlp_out"

    def stream(hooks: list[Any], names: Any = f"{b}.hook_resid_post") -> Any:
        with torch.no_grad(), model.hooks(hooks):
            return model.run_with_cache(**batch, names_filter=names)[1]

    plain = stream([], [f"{b}.hook_{name}" for name in ("resid_pre", "resid_mid", "resid_post", "attn_in", "mlp_in")])
    other = torch.randn(plain["resid_pre", 1].shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(plain["attn_in", 1], plain["resid_pre", 1][:, :, None].expand_as(plain["attn_in", 1]))
    assert torch.equal(plain["mlp_in", 1], plain["resid_mid", 1])

    def put(x: Tensor, hook: Any) -> Tensor:
        x[:, :, 1] = other  # in place, as most hooks do
        return x

    there = stream([(f"{b}.hook_resid_pre", lambda x, hook: other)], heads)

    def patch(x: Tensor, hook: Any) -> Tensor:
        x[:, :, 1] = there[hook.name][:, :, 1]
        return x

    found = stream([(f"{b}.hook_attn_in", put)])["resid_post", 1]
    torch.testing.assert_close(found, stream([(name, patch) for name in heads])["resid_post", 1])
    assert (found - plain["resid_post", 1]).abs().max() > 1e-3

    made = stream([(f"{b}.hook_resid_mid", lambda x, hook: other)], out)[out]
    found = stream([(f"{b}.hook_mlp_in", lambda x, hook: x.copy_(other))])["resid_post", 1]
    torch.testing.assert_close(found, stream([(out, lambda x, hook: made)])["resid_post", 1])
    assert (found - plain["resid_post", 1]).abs().max() > 1e-3
