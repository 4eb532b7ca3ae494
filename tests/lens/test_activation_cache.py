"""TransformerLens's cache of a wrapped model: every sum and every attribution against float64 and the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformer_lens
from torch import Tensor

import dt_lens
from dt_lens import DtLensError

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 18, 2, 8, 1]])
ANSWERS = torch.tensor([11, 23])
KINDS = ("gpt2", "gptj", "gpt_neo", "llama", "gpt_neox", "opt", "bloom", "phi3", "qwen3")


class Ran:
    """A model in float64, with its pass over ``TOKENS``."""

    def __init__(self, model: Any) -> None:
        self.lens = dt_lens.wrap(model, check=False)
        with torch.no_grad():
            self.logits, self.cache = self.lens.run_with_cache(TOKENS)
        self.W = self.lens.weights


@pytest.fixture(scope="module", params=KINDS)
def ran(request: pytest.FixtureRequest, make_lm: Any) -> Ran:
    return Ran(make_lm(request.param).double())


@pytest.fixture(scope="module")
def gpt2(make_lm: Any) -> Ran:
    return Ran(make_lm("gpt2").double())


@pytest.fixture(scope="module")
def agent(make_dt: Any, make_batch: Any) -> tuple[Any, Any, Any]:
    model = make_dt(dtype=torch.float64, discrete_actions=True, action_tanh=False)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in make_batch(model.cfg).items()}
    with torch.no_grad():
        return (model, *model.run_with_cache(**batch))


def same(found: Tensor, wanted: Tensor) -> None:
    # Some classes compute norms in float32, whatever their weights' type.
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-5)


def test_short_names(ran: Ran) -> None:
    cache = ran.cache
    assert isinstance(cache, transformer_lens.ActivationCache) and cache.model is ran.lens
    assert cache["pattern", 0] is cache["blocks.0.attn.hook_pattern"]
    assert cache["resid_post", -1] is cache["blocks.1.hook_resid_post"]
    assert cache["scale", 1, "ln1"] is cache["blocks.1.ln1.hook_scale"]
    assert "hook_embed" in cache and "hook_nothing" not in cache and len(cache) == len(list(cache))
    assert not any(name.endswith("hook_result") for name in cache)


def test_nothing_is_copied(gpt2: Ran) -> None:
    seen: dict[str, int] = {}
    names = ["hook_pos_embed", "blocks.0.hook_resid_post", "blocks.1.attn.hook_z"]
    with gpt2.lens.hooks([(name, lambda x, hook: seen.update({hook.name: x.data_ptr()})) for name in names]):
        _, cache = gpt2.lens.run_with_cache(TOKENS, names_filter=[*names, "hook_embed"], pos_slice=(0, 4))
    assert {name: cache[name].data_ptr() for name in names} == seen and cache["hook_pos_embed"].shape == (2, 4, 16)


def test_the_stream_is_the_sum_of_what_it_is_decomposed_into(ran: Ran) -> None:
    cache, cfg = ran.cache, ran.lens.cfg
    final = cache["resid_post", -1]
    parts, labels = cache.decompose_resid(return_labels=True)
    same(parts.sum(0), final)
    assert labels[:1] + labels[-2:] == ["embed", "1_attn_out", "1_mlp_out"]
    same(cache.decompose_resid(1, pos_slice=-1).sum(0), cache["resid_pre", 1][:, -1])
    heads, names = cache.stack_head_results(return_labels=True)
    assert len(heads) == 2 * cfg.n_heads and names[cfg.n_heads + 1] == "L1H1"
    z, W_O = cache["z", 1], ran.W["blocks.1.attn.W_O"]
    same(heads[cfg.n_heads + 1], z[:, :, 1] @ W_O[1])
    same(cache.stack_head_results(incl_remainder=True).sum(0), final)
    for neurons in (True, False):
        whole, names = cache.get_full_resid_decomposition(expand_neurons=neurons, return_labels=True)
        same(whole.sum(0), final)
        assert len(names) == len(whole) and "bias" in names
    first = 2 * cfg.n_heads + cfg.d_mlp
    same(
        cache.get_full_resid_decomposition()[first + 3],
        cache["post", 1][..., 3, None] * ran.W["blocks.1.mlp.W_out"][3],
    )
    same(cache.accumulated_resid()[-1], final)


def test_attributions_add_up_to_logits(ran: Ran) -> None:
    """Each of them is worked out from the weights; their sum is what the model computed, less what biases give."""
    cache, W = ran.cache, ran.W
    parts = cache.decompose_resid()
    found = cache.logit_attrs(parts, ANSWERS)
    x = cache["resid_post", -1].double()
    rms = ran.lens.structure.rms
    centre = 0.0 if rms else 1.0
    scale = ((x - centre * x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + ran.lens.cfg.eps).sqrt()
    w, W_U = W["ln_final.w"], W["unembed.W_U"]
    for row, token in enumerate(ANSWERS.tolist()):
        bare = (parts[:, row] - centre * parts[:, row].mean(-1, keepdim=True)) / scale[row]
        same(found[:, row], (bare * w) @ W_U[:, token])
        shift = (W["ln_final.b"] @ W_U[:, token] if not rms else 0.0) + ran.lens.b_U[token]
        same(found[:, row].sum(0), ran.logits[row, :, token] - shift)
    less = cache.logit_attrs(parts, ANSWERS, incorrect_tokens=torch.tensor([0, 0]))
    same(less, found - cache.logit_attrs(parts, 0))


def test_norms_of_a_stack(ran: Ran) -> None:
    cache = ran.cache
    for layer in (0, 1):
        parts = cache.decompose_resid(layer, apply_ln=True)
        same(parts.sum(0), cache["normalized", layer, "ln1"])
    if not ran.lens.cfg.parallel:
        parts = cache.decompose_resid(1, mlp_input=True, apply_ln=True)
        same(parts.sum(0), cache["normalized", 1, "ln2"])
    # After the last block the norm's own weights, and statistics of every state.
    stream = cache.accumulated_resid(apply_ln=True)
    same(stream[-1] @ ran.lens.W_U + ran.lens.b_U, ran.logits)
    same(cache.logit_lens(positions=None).values[-1], ran.logits)
    with torch.no_grad():
        same(stream[0], ran.lens.ln_final(cache["resid_pre", 0]))


def test_it_agrees_with_transformer_lens(make_lm: Any) -> None:
    """Its own model of the same weights, with norms folded: attributions of differences, patterns, neurons."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    theirs = make_lm("gpt2")
    bridge = build_bridge_from_module(theirs, type(theirs).__name__, hf_config=theirs.config)
    with torch.no_grad():
        bridge.enable_compatibility_mode()
        _, wanted = bridge.run_with_cache(TOKENS)
        lens = dt_lens.wrap(make_lm("gpt2"), check=False)
        _, cache = lens.run_with_cache(TOKENS)
    for short in (("pattern", 1), ("pre", 0), ("post", 1)):
        torch.testing.assert_close(cache[short], wanted[short], rtol=1e-3, atol=1e-4)
    other = torch.tensor([0, 5])
    for stack in ("decompose_resid", "accumulated_resid"):
        mine, want = getattr(cache, stack)(), getattr(wanted, stack)()
        torch.testing.assert_close(
            cache.logit_attrs(mine, ANSWERS, other), wanted.logit_attrs(want, ANSWERS, other), rtol=1e-3, atol=1e-3
        )


def test_the_switches_of_run_with_cache(gpt2: Ran) -> None:
    lens, cache = gpt2.lens, gpt2.cache
    _, plain = lens.run_with_cache(TOKENS[:1], return_cache_object=False, remove_batch_dim=True)
    assert type(plain) is dict and plain["blocks.0.hook_resid_pre"].shape == (6, 16)
    same(plain["blocks.1.attn.hook_pattern"], cache["pattern", 1][0])
    _, alone = lens.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    same(
        alone.logit_attrs(alone.decompose_resid(), 11, has_batch_dim=False),
        cache.logit_attrs(cache.decompose_resid(), 11)[:, 0],
    )
    _, last = lens.run_with_cache(TOKENS, pos_slice=-1)
    assert torch.equal(last["q", 1], cache["q", 1][:, -1]) and torch.equal(last["pre", 0], cache["pre", 0][:, -1])
    assert torch.equal(last["pattern", 1], cache["pattern", 1][:, :, -1])
    with pytest.raises(DtLensError, match=r"Cannot remove batch dimension .* for a batch of one"):
        lens.run_with_cache(TOKENS, remove_batch_dim=True)
    loss, grads = lens.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    assert grads["blocks.0.hook_resid_pre_grad"].shape == (2, 6, 16) and loss.ndim == 0


@pytest.mark.parametrize("stop", [0, 1, 2, -1])
def test_a_pass_that_stops_before_a_layer(ran: Ran, stop: int) -> None:
    layer = stop % 2 if stop < 2 else 2
    wanted = ran.cache.accumulated_resid()[layer]
    with torch.no_grad():
        same(ran.lens(TOKENS, stop_at_layer=stop), wanted)
        out, cache = ran.lens.run_with_cache(TOKENS, stop_at_layer=stop)
        assert ran.lens(TOKENS, return_type=None) is None
        same(ran.lens(TOKENS), ran.logits)
    assert torch.equal(out, wanted)
    assert set(cache) == {
        n
        for n in ran.cache
        if not n.endswith("result")
        and (n.startswith(("hook_embed", "hook_pos", "embed")) or (n.startswith("blocks.") and int(n[7]) < layer))
    }


def test_an_agents(agent: tuple[Any, Any, Any]) -> None:
    model, out, cache = agent
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels[0] == "embed" and "pos_embed" not in labels
    same(parts.sum(0), cache["resid_post", -1])
    same(cache.stack_head_results(incl_remainder=True).sum(0), cache["resid_post", -1])
    same(cache.get_full_resid_decomposition().sum(0), cache["resid_post", -1])
    assert cache["pattern", 0].shape[1] == 2 and cache["resid_pre", 1].shape == cache["hook_embed"].shape
    W = model.weights
    for action in (0, 2):
        found = cache.logit_attrs(parts, action).sum(0)[:, 1::3]  # read off the states' tokens
        shift = W["ln_final.b"] @ W["predict.action.W"][:, action] + W["predict.action.b"][action]
        same(found, out.action_preds[..., action] - shift)
    label = model.embeddings["action_out"].labels[2]
    same(cache.logit_attrs(parts, label), cache.logit_attrs(parts, 2))
    parts = cache.decompose_resid(1, apply_ln=True)
    same(parts.sum(0), cache["normalized", 1, "ln1"])


def test_an_agents_pass_that_stops(agent: tuple[Any, Any, Any]) -> None:
    model, _, whole = agent
    with torch.no_grad():
        out, cache = model.run_with_cache(
            **{k: v.double() if v.is_floating_point() else v for k, v in model.probe().items()}, stop_at_layer=1
        )
    assert torch.equal(out, cache["resid_post", 0]) and "blocks.1.hook_resid_pre" not in cache and len(cache)
    assert "hook_final" in whole and "hook_final" not in cache


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, c: c["blocks.0.attn.hook_patern"], "no activation 'blocks.0.attn.hook_patern'. Did you mean"),
        (lambda m, c: c["pattern", 7], "no activation 'blocks.7.attn.hook_pattern'"),
        (lambda m, c: c[3], "no activation 3"),
        (
            lambda m, c: c.logit_attrs(c.decompose_resid(), 29),
            "tokens run from 29 to 29; this model's outputs are 0 to 28",
        ),
        (lambda m, c: c.logit_attrs(c.decompose_resid(), 0.5), "must be whole numbers"),
        (lambda m, c: c.logit_attrs(c.decompose_resid(), "a"), "wrapped without a tokenizer"),
        (lambda m, c: m.run_with_cache(TOKENS, names_filter="hook_embed")[1].decompose_resid(), "names_filter or stop"),
        (lambda m, c: m.run_with_cache(TOKENS, stop_at_layer=3), "stop_at_layer is 3"),
        (lambda m, c: m(TOKENS, stop_at_layer=1, return_type="loss"), "has no logits"),
        (
            lambda m, c: m.run_with_cache(TOKENS, stop_at_layer=1, names_filter="blocks.1.hook_resid_pre"),
            "stop_at_layer=1 does not reach 'blocks.1.hook_resid_pre'; stop later, or leave it out",
        ),
        (lambda m, c: m.set_use_attn_result("yes"), "use_attn_result is 'yes'"),
    ],
)
def test_mistakes_are_one_sentence(gpt2: Ran, call: Any, said: str) -> None:
    with pytest.raises(DtLensError, match=said):
        call(gpt2.lens, gpt2.cache)


def test_what_is_not_true_of_a_model_is_refused(make_dt: Any, make_lm: Any) -> None:
    post = make_dt(normalization="post")
    _, cache = post.run_with_cache(**post.probe())
    for method in (cache.decompose_resid, cache.stack_head_results, cache.get_full_resid_decomposition):
        with pytest.raises(DtLensError, match="normalise each sum, so the stream is not the sum"):
            method()
    assert cache.accumulated_resid().shape[0] == 3
    with pytest.raises(DtLensError, match="logit_lens reads a vocabulary"):
        cache.logit_lens()
    with pytest.raises(DtLensError, match="predicts no action 'nowhere'"):
        cache.logit_attrs(cache.accumulated_resid(), "nowhere")
    parallel = Ran(make_lm("gptj"))
    with pytest.raises(DtLensError, match="MLP reads the same stream as attention"):
        parallel.cache.decompose_resid(1, mlp_input=True)
    bare = make_dt(normalization="none", final_ln=False, dtype=torch.float64)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in bare.probe().items()}
    _, cache = bare.run_with_cache(**batch)
    parts = cache.decompose_resid()
    assert torch.equal(cache.apply_ln_to_stack(parts), parts) and torch.equal(cache.apply_ln_to_stack(parts, 1), parts)
