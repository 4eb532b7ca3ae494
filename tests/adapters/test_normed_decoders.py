"""What Qwen 3, Gemma and OLMo 2 have beyond Llama: norms of queries and keys, norms behind, norms of scale 1 + w."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dt_lens
from dt_lens import DtLensError, SingularEdit, WeightSVD, collect_activations
from dt_lens.language_model.model import HookedLanguageModel
from dt_lens.lens.hooks import BY_CHOICE
from dt_lens.lens.matrices import MatrixFactors, catalogue, find_matrix, select_matrices
from dt_lens.svd.null_sources import side_covariance

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [28, 7, 18, 2, 8, 1, 8, 0]])
ODD: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"head_dim": 6, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    ("gemma2", {"head_dim": 6, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": False}),
    ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": 2.0, "rms_norm_eps": 1e-3}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": 3.0, "layer_types": ["full_attention"] * 2}),
    ("gemma3", {"head_dim": 6, "num_key_value_heads": 4, "num_hidden_layers": 7, "sliding_window": 2}),
    ("gemma3", {"attention_bias": True, "tie_word_embeddings": False, "hidden_activation": "silu"}),
    ("olmo2", {"head_dim": 6, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("olmo2", {"attention_bias": True, "num_key_value_heads": 4, "hidden_act": "gelu"}),
]
NORMED = ("qwen3", "gemma3", "olmo2")
POST = ("gemma2", "gemma3", "olmo2")


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def spoiled(lens: HookedLanguageModel, name: str) -> HookedLanguageModel:
    """A lens on the same model that shows one weight rolled by one coordinate."""

    class Spoiled(HookedLanguageModel):
        @property
        def weights(self) -> dict[str, Tensor]:
            found = dict(super().weights)
            return {**found, name: found[name].roll(1, -1)}

    return Spoiled(lens.model, lens.family, lens.cfg)


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
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    loaded, opened = dt_lens.load(tmp_path), dt_lens.open_checkpoint(tmp_path)
    close(loaded(TOKENS), wanted)
    assert opened.cfg == loaded.cfg == lens.cfg
    for name, weight in lens.weights.items():
        assert torch.equal(opened.weights[name], weight), name
    assert list(catalogue(opened)) == list(catalogue(lens))
    for name in ("blocks.1.attn.OV.1", "blocks.1.mlp.W_in", "blocks.0.mlp.W_out"):
        close(WeightSVD(opened)[name].sigma, WeightSVD(lens)[name].sigma)
    for matrix in ("blocks.0.attn.W_K", "blocks.1.mlp.W_in", "blocks.1.attn.W_O"):
        with SingularEdit(lens, matrix, sv=0, value="flip"):
            assert (model(TOKENS).logits - wanted).abs().max() > 1e-4
    assert torch.equal(model(TOKENS).logits, wanted)


@pytest.mark.parametrize("kind", NORMED)
def test_a_norm_of_queries_or_keys_that_is_another_is_refused(kind: str, make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm(kind), check=False)
    for name in ("q_norm", "k_norm"):
        with pytest.raises(DtLensError, match=rf"blocks\.1\.attn\.{name} does not reproduce"):
            dt_lens.certify(spoiled(lens, f"blocks.1.attn.{name}.w"))


@pytest.mark.parametrize("kind", NORMED)
def test_there_is_no_qk_circuit_where_queries_and_keys_are_normed(kind: str, make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm(kind), check=False)
    assert not [name for name in catalogue(lens, per_head=True) if ".QK." in name]
    said = r"no circuit '.*QK.*': its queries and keys pass a norm of their own.*use W_Q and W_K"
    for look in (
        lambda: find_matrix(lens, "blocks.1.attn.QK.0"),
        lambda: find_matrix(lens, "blocks.1.attn.QK", head=0),
        lambda: select_matrices(lens, ["*.QK.*"]),
        lambda: WeightSVD(lens)["blocks.1.attn.QK.0"],
        lambda: SingularEdit(lens, "blocks.1.attn.QK.0", side="query"),
    ):
        with pytest.raises(DtLensError, match=said) as caught:
            look()
        assert "\n" not in str(caught.value)


def scale_of(lens: Any, norm: str) -> Tensor:
    """What the original's norm multiplies by, in float64: its output over its input of size one."""
    w: Tensor = lens.weights[f"{norm}.w"].double()
    return 1 + w if lens.cfg.family.startswith("gemma") else w


@pytest.mark.parametrize("kind", POST)
def test_folding_is_what_the_stream_is_read_and_written_through(kind: str, make_lm: Any) -> None:
    """The folded matrix gives the original's own activation up to each token's length: as 1 + w, and behind, too."""
    lens = dt_lens.wrap(make_lm(kind), check=False)
    with torch.no_grad():
        cache = {name: x.double() for name, x in lens.run_with_cache(TOKENS)[1].items()}

    def parallel(found: Tensor, wanted: Tensor) -> None:
        assert torch.cosine_similarity(found, wanted, dim=-1).min() > 1 - 1e-6

    def folded(name: str) -> Tensor:
        return find_matrix(lens, f"blocks.1.{name}").dense(lens)

    z = cache["blocks.1.attn.hook_z"]
    parallel(cache["blocks.1.mlp.hook_post"] @ folded("mlp.W_out"), cache["blocks.1.hook_mlp_out"])
    parallel(z.flatten(2) @ folded("attn.W_O"), cache["blocks.1.hook_attn_out"])
    parallel(sum(z[:, :, h] @ folded(f"attn.W_O.{h}") for h in range(4)), cache["blocks.1.hook_attn_out"])
    gathered = torch.einsum("nhqk,nkd->nhqd", cache["blocks.1.attn.hook_pattern"], cache["blocks.1.hook_resid_pre"])
    if kind == "olmo2":  # attention reads the stream itself
        heads = sum(gathered[:, h] @ folded(f"attn.OV.{h}") for h in range(4))
        parallel(heads, cache["blocks.1.hook_attn_out"])
        close(cache["blocks.1.hook_resid_mid"] @ folded("mlp.W_in"), cache["blocks.1.mlp.hook_pre_linear"])
    else:
        parallel(cache["blocks.1.hook_resid_mid"] @ folded("mlp.W_in"), cache["blocks.1.mlp.hook_pre_linear"])
        parallel(cache["blocks.1.hook_resid_pre"] @ folded("attn.W_Q"), cache["blocks.1.attn.hook_q"].flatten(2))
    out = lens.embeddings["token_out"]
    close(out.effective, scale_of(lens, "ln_final") * out.directions.double())
    for weight, norm in (("mlp.W_out", "ln2_post"), ("attn.W_O", "ln1_post")):
        raw = lens.weights[f"blocks.1.{weight}"].double().flatten(0, -2)
        close(folded(weight), raw * scale_of(lens, f"blocks.1.{norm}"))
    d = WeightSVD(lens)["blocks.1.mlp.W_out"]
    close(d.sigma, torch.linalg.svdvals(folded("mlp.W_out"))[: len(d.sigma)])
    assert d.folded


@pytest.mark.parametrize("kind", POST)
@pytest.mark.parametrize("matrix", ["mlp.W_out", "attn.W_O", "attn.OV.1"])
def test_an_edit_of_what_is_written_is_carried_back_through_the_norm(kind: str, matrix: str, make_lm: Any) -> None:
    model = make_lm(kind)
    lens, name = dt_lens.wrap(model, check=False), f"blocks.1.{matrix}"
    before, plain = find_matrix(lens, name).dense(lens), model(TOKENS).logits
    d = WeightSVD(lens)[name]
    edit = SingularEdit(lens, name, sv=1, side="write", value="flip")
    assert edit.effective_energy == pytest.approx(2 * float(d.sigma[1]), rel=1e-6)
    with edit:
        after = find_matrix(lens, name).dense(lens)
        close(after - before, -2 * d.sigma[1] * torch.outer(d.left[1], d.write[1]))
        assert (model(TOKENS).logits - plain).abs().max() > 1e-4
    assert torch.equal(model(TOKENS).logits, plain)
    norm = f"blocks.1.{'ln2' if 'mlp' in matrix else 'ln1'}_post"
    with torch.no_grad():
        lens.weights[f"{norm}.w"][3] = -1.0 if kind.startswith("gemma") else 0.0
    with pytest.raises(DtLensError, match=rf"{norm} has scale 0 at coordinate 3"):
        SingularEdit(lens, name, side="write")
    SingularEdit(lens, name, side="write", fold_layernorm=False)


@pytest.mark.parametrize("kind", POST)
def test_directions_by_real_outputs_and_nulls_know_the_norm_behind(kind: str, make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm(kind).double(), check=False)
    name, batches = "blocks.1.mlp.W_out", [{"tokens": TOKENS}]
    acts = collect_activations(lens, batches=batches)
    d = WeightSVD(lens, activations=acts)[name]
    with torch.no_grad():
        post = lens.run_with_cache(TOKENS)[1]["blocks.1.mlp.hook_post"].flatten(0, 1)
    written = post @ find_matrix(lens, name).dense(lens)
    spread = torch.cov(written.T, correction=0)
    close(d.right @ spread @ d.right.T, torch.diag(d.sigma.square()))
    factors = [MatrixFactors.of(lens, find_matrix(lens, name), fold) for fold in (True, False)]
    folded, raw = (torch.as_tensor(side_covariance(f, "write", acts)) for f in factors)
    close(folded, raw)  # the stream's own, which what is written joins behind the norm
    for place, wanted in ((name, True), ("blocks.1.attn.OV.1", True), ("blocks.1.mlp.W_in", False)):
        side = "write" if place.endswith("OV.1") else None
        control = SingularEdit(lens, place, sv=0, side=side).control(0, activations=acts)
        assert ("equal before blocks.1.ln" in control.note) == wanted


@pytest.mark.parametrize("kind", POST)
def test_what_is_declared_wrongly_about_norms_scales_and_caps_is_refused(kind: str, make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm(kind), check=False)

    def refused(said: str, **changes: Any) -> None:
        with pytest.raises(DtLensError, match=said) as caught:
            dt_lens.certify(HookedLanguageModel(lens.model, lens.family, lens.cfg.replace(**changes)))
        assert "\n" not in str(caught.value)

    refused(r"blocks\.0\.(ln1|attn\.q_norm)", unit_offset=not lens.cfg.unit_offset)
    refused("no place for", post_norm=False)
    refused("attention scale of block 0", attn_softcap=0.5)
    for norm in ("ln1_post", "ln2_post"):
        with pytest.raises(DtLensError, match=rf"blocks\.1\.{norm} does not reproduce"):
            dt_lens.certify(spoiled(lens, f"blocks.1.{norm}.w"))
    if kind.startswith("gemma"):
        refused(r"multiplies its token embeddings by 4, .* says 1;", embed_scale=1.0)


def test_the_scale_of_gemmas_embeddings_is_its_own_and_moves_no_direction(make_lm: Any) -> None:
    model = make_lm("gemma2", hidden_size=24, num_attention_heads=4).bfloat16().float()  # sqrt(24) as bfloat16 has it
    lens = dt_lens.wrap(model)
    _, cache = lens.run_with_cache(TOKENS)
    rows = lens.embeddings["token_in"].directions[TOKENS]
    assert lens.cfg.embed_scale == pytest.approx(24**0.5)
    assert float(lens.table_scale) != pytest.approx(24**0.5, rel=1e-5)
    close(cache["hook_embed"], rows * float(lens.table_scale))
    close(cache["blocks.0.hook_resid_pre"], cache["hook_embed"])


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ],
)
def test_options_that_have_no_place_are_refused_by_name(
    kind: str, options: dict[str, Any], said: str, make_lm: Any, tmp_path: Path
) -> None:
    model = make_lm(kind, **options)
    model.save_pretrained(tmp_path)
    for read in (
        lambda: dt_lens.wrap(model),
        lambda: dt_lens.load(tmp_path),
        lambda: dt_lens.open_checkpoint(tmp_path),
    ):
        with pytest.raises(DtLensError, match=said) as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", POST)
def test_the_caches_sums_and_directions_know_the_norms(kind: str, make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm(kind, attention_bias=True), check=False)
    with torch.no_grad():
        _, cache = lens.run_with_cache(TOKENS)
        close(cache.decompose_resid().sum(0), cache["resid_post", -1])
        # The logit before any soft-capping, read off the stream over its size.
        along = cache["resid_post", -1] / cache["ln_final.hook_scale"] @ lens.tokens_to_residual_directions(7)
        close(along, lens.unembed(cache["hook_final"])[..., 7])
    for method in (cache.stack_head_results, cache.get_full_resid_decomposition, lambda: cache.stack_neuron_results(1)):
        with pytest.raises(DtLensError, match="passes a norm of their sum before it joins the stream"):
            method()
    with pytest.raises(DtLensError, match="accumulated_bias has no value"):
        lens.accumulated_bias(1)
    if lens.cfg.logit_softcap is not None:
        with pytest.raises(DtLensError, match="would leave out this model's soft cap"):
            cache.logit_lens()
