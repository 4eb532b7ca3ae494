"""What Bloom, GPT-NeoX, OPT and Phi-3 have beyond the first families, alone or each in its own way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dt_lens
from dt_lens import DtLensError, SingularEdit, WeightSVD
from dt_lens.language_model.model import HookedLanguageModel
from dt_lens.lens.hooks import BY_CHOICE

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [28, 7, 18, 2, 8, 1, 8, 0]])
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0], "rope_theta": 1e4}
SMALL = {"num_key_value_heads": 1, "intermediate_size": 7, "sliding_window": 3, "tie_word_embeddings": True}
ODD: list[tuple[str, dict[str, Any]]] = [
    (
        "bloom",
        {"n_head": 6, "hidden_size": 24, "layer_norm_epsilon": 1e-3, "pretraining_tp": 2, "tie_word_embeddings": False},
    ),
    ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 1.0, "tie_word_embeddings": True}),
    ("gpt_neox", {"attention_bias": False, "num_attention_heads": 4, "intermediate_size": 7, "hidden_act": "gelu_new"}),
    ("opt", {"enable_bias": False, "tie_word_embeddings": False, "ffn_dim": 7, "activation_function": "gelu"}),
    ("phi3", {"head_dim": 6, "partial_rotary_factor": 0.5, "num_key_value_heads": None, "hidden_act": "gelu"}),
    ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 4, **SMALL}),
]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), ODD, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(ODD)])
def test_odd_configurations_live_from_a_file_and_in_place(
    kind: str, options: dict[str, Any], make_lm: Any, tmp_path: Path
) -> None:
    model = make_lm(kind, **options)
    wanted = model(TOKENS).logits
    lens = dt_lens.wrap(model)
    out, cache = lens.run_with_cache(TOKENS)
    close(out, wanted)
    # What each head writes is cached when it is asked for.
    assert set(cache) == {name for name in lens.hook_dict if not name.endswith(BY_CHOICE)}
    model.save_pretrained(tmp_path)
    loaded, opened = dt_lens.load(tmp_path), dt_lens.open_checkpoint(tmp_path)
    close(loaded(TOKENS), wanted)
    assert opened.cfg == loaded.cfg == lens.cfg
    for name, weight in lens.weights.items():
        assert torch.equal(opened.weights[name], weight), name
    name = "blocks.1.attn.OV.1"
    close(WeightSVD(opened)[name].read, WeightSVD(lens)[name].read)
    with SingularEdit(lens, "blocks.0.attn.W_K", sv=0, value="flip"):
        assert (model(TOKENS).logits - wanted).abs().max() > 1e-4
    assert torch.equal(model(TOKENS).logits, wanted)


@pytest.mark.parametrize("parallel", [True, False])
def test_an_mlp_beside_attention_taken_for_one_after_it_is_refused(parallel: bool, make_lm: Any) -> None:
    """The matrices reproduce their activations either way; only the sum can tell."""
    model = make_lm("gpt_neox", use_parallel_residual=parallel)
    lens = dt_lens.wrap(model)
    assert ("blocks.0.hook_resid_mid" in lens.hook_dict) != parallel
    assert lens.structure.mlp_norm == ("blocks.0.ln2", "blocks.1.ln2")
    wrong = lens.cfg.replace(parallel=not parallel, own_mlp_norm=not parallel)
    with pytest.raises(DtLensError, match="parallel wrongly"):
        dt_lens.certify(HookedLanguageModel(model, lens.family, wrong))


def test_the_hubs_files_of_pythia(make_lm: Any, tmp_path: Path) -> None:
    """The unembedding has another name there, and masks and frequencies are among the tensors."""
    model = make_lm("gpt_neox")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors.pop("embed_out.weight" if "embed_out.weight" in tensors else "lm_head.weight")
    for layer in range(2):
        attention = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{attention}.bias"] = torch.ones(1, 1, 12, 12, dtype=torch.bool)
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{attention}.rotary_emb.inv_freq"] = torch.ones(1)
    for name in ("embed_out.weight", "lm_head.weight"):
        save_file({**tensors, name: head}, tmp_path / "model.safetensors")
        close(dt_lens.load(tmp_path)(TOKENS), model(TOKENS).logits)
        assert torch.equal(dt_lens.open_checkpoint(tmp_path).weights["unembed.W_U"], head.T)
    save_file({**tensors, "embed_out.weight": head, "lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    with pytest.raises(DtLensError, match=r"two names of one tensor"):
        dt_lens.load(tmp_path)


def test_writing_into_a_part_of_a_fused_weight_leaves_the_other_parts(make_lm: Any) -> None:
    model = make_lm("gpt_neox")
    lens, fused = dt_lens.wrap(model, check=False), model.gpt_neox.layers[1].attention.query_key_value
    before, keys = fused.weight.detach().clone(), lens.weights["blocks.1.attn.W_K"]
    with torch.no_grad():
        keys[1] += 1  # of the second head, whose rows begin at 24: queries, keys, values of 8 rows each
        changed = (fused.weight - before).any(1).nonzero().flatten()
    assert changed.tolist() == list(range(32, 40))
    model = make_lm("phi3")
    lens, fused = dt_lens.wrap(model, check=False), model.model.layers[1].mlp.gate_up_proj
    before = fused.weight.detach().clone()
    with torch.no_grad():
        lens.weights["blocks.1.mlp.W_in"][:, 2] += 1
        changed = (fused.weight - before).any(1).nonzero().flatten()
    assert changed.tolist() == [24 + 2]  # the inputs follow 24 gates


@pytest.mark.parametrize("kind", ["bloom", "gpt_neox", "phi3"])
def test_a_fused_activation_can_be_replaced(kind: str, make_lm: Any) -> None:
    """What a hook returns for one part is what the model goes on with: as if the weight had been another."""
    model = make_lm(kind)
    lens = dt_lens.wrap(model, check=False)
    parts = [("attn.hook_k", "attn.W_K"), ("attn.hook_v", "attn.W_V")]
    parts += [("mlp.hook_pre", "mlp.W_gate"), ("mlp.hook_pre_linear", "mlp.W_in")] * lens.cfg.gated
    for name, weight in parts:
        bias = lens.weights.get(f"blocks.0.{weight.replace('W', 'b')}")

        def doubled(x: Tensor, hook: Any, bias: Any = bias) -> Tensor:
            return 2 * x if bias is None else 2 * x - bias

        out = lens.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.0.{name}", doubled)])
        with torch.no_grad():
            lens.weights[f"blocks.0.{weight}"].mul_(2)
            close(out, model(TOKENS).logits)
            lens.weights[f"blocks.0.{weight}"].div_(2)


OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is false"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm is true"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is false"),
    ("opt", {"word_embed_proj_dim": 8}, "word_embed_proj_dim is 8"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "residual_connection_post_layernorm is true"),
    ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact is true"),
]


@pytest.mark.parametrize(("kind", "options", "said"), OPTIONS, ids=[said for _, _, said in OPTIONS])
def test_an_option_that_cannot_be_represented_is_named(
    kind: str, options: dict[str, Any], said: str, make_lm: Any, tmp_path: Path
) -> None:
    model = make_lm(kind, **options)
    model.save_pretrained(tmp_path)
    for take in (
        lambda: dt_lens.wrap(model),
        lambda: dt_lens.load(tmp_path),
        lambda: dt_lens.open_checkpoint(tmp_path),
    ):
        with pytest.raises(DtLensError, match=said) as caught:
            take()
        assert "\n" not in str(caught.value)


def test_the_rows_of_opts_positions_that_padding_reads_are_not_positions(make_lm: Any) -> None:
    model = make_lm("opt")
    lens, table = dt_lens.wrap(model, check=False), model.model.decoder.embed_positions.weight
    assert torch.equal(lens.weights["pos_embed.W_pos"], table[2:])
    assert len(lens.embeddings["position_in"]) == lens.cfg.n_ctx == 12
    _, cache = lens.run_with_cache(TOKENS)
    assert torch.equal(cache["hook_pos_embed"][0], table[2:10])
    assert cache["blocks.0.mlp.hook_pre"].shape == (2, 8, 24)


def test_what_alibi_adds_to_the_scores_is_proven(make_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_lm("bloom", n_head=6, hidden_size=24)  # no power of two
    lens = dt_lens.wrap(model)
    assert lens.structure.alibi[:4] == pytest.approx((1 / 4, 1 / 16, 1 / 64, 1 / 256))
    assert lens.structure.alibi[4:] == pytest.approx((1 / 2, 1 / 8))
    with pytest.raises(DtLensError, match="hook_pos_embed"):
        dt_lens.certify(HookedLanguageModel(model, lens.family, lens.cfg.replace(position="learned")))
    monkeypatch.setattr(
        "dt_lens.language_model.config.alibi_slopes", lambda n: (1 / 4, 1 / 16, 1 / 64, 1 / 256, 0.5, 0.25)
    )
    with pytest.raises(DtLensError, match=r"of block 0 or the slope of ALiBi of its head 5 does not"):
        dt_lens.certify(HookedLanguageModel(model, lens.family, lens.cfg))


def test_blooms_distances_follow_the_mask_and_positions_are_refused(make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm("bloom"), check=False)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    with torch.no_grad():
        close(lens(TOKENS, attention_mask=mask)[0, 3:], lens(TOKENS[:1, 3:])[0])
        close(lens.run_with_cache(TOKENS, attention_mask=mask)[0][0, 3:], lens(TOKENS[:1, 3:])[0])
    with pytest.raises(DtLensError, match="position_ids have no meaning for this model"):
        lens(TOKENS, position_ids=torch.arange(8)[None])


def test_blooms_tokens_pass_a_layernorm(make_lm: Any) -> None:
    """What a token puts into the stream is its row behind the LayerNorm, up to length and a constant."""
    lens = dt_lens.wrap(make_lm("bloom"), check=False)
    token_in, weights = lens.embeddings["token_in"], lens.weights
    _, cache = lens.run_with_cache(TOKENS)
    assert torch.equal(cache["hook_embed"], weights["embed.W_E"][TOKENS])
    put = cache["blocks.0.hook_resid_pre"] - weights["embed_ln.b"]
    close(
        torch.nn.functional.normalize(put, dim=-1),
        torch.nn.functional.normalize(token_in.effective, dim=-1)[TOKENS].float(),
    )
