"""Moments of what matrices read, against a naive float64 sum over all tokens; and the file that holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dt_lens
from dt_lens import Activations, DtLensError, SingularEdit, collect_activations
from dt_lens.lens.activations import Moments
from dt_lens.lens.matrices import catalogue

Make = Callable[..., Any]
SHOWN = {"W_Q": "attn.hook_q", "W_K": "attn.hook_k", "W_V": "attn.hook_v", "W_O": "hook_attn_out"}
SHOWN |= {"W_in": "mlp.hook_pre", "W_gate": "mlp.hook_pre", "W_out": "hook_mlp_out"}


def make_model(kind: str, make_dt: Make, make_lm: Make) -> Any:
    decision_transformers: dict[str, dict[str, Any]] = {
        "pre": {},
        "post": {"normalization": "post"},
        "bare": {"normalization": "none", "final_ln": False},
        "gated": {"gated_mlp": True, "n_heads": 4},
    }
    if kind in decision_transformers:
        return make_dt(dtype=torch.float64, **decision_transformers[kind])
    return dt_lens.wrap(make_lm(kind).double(), check=False)


MODELS = [
    "pre",
    "post",
    "bare",
    "gated",
    "bloom",
    "gpt2",
    "gptj",
    "gpt_neo",
    "gpt_neox",
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "olmo2",
]


def batches_of(model: Any) -> list[dict[str, Any]]:
    """Three batches, the second and later ones of other numbers, one of them with padding."""
    batches = [model.probe(seed) for seed in range(3)]
    if "tokens" in batches[0]:
        mask = torch.ones_like(batches[1]["tokens"])
        mask[0, -2:] = 0
        batches[1]["attention_mask"] = mask
    return batches


def kept(x: Tensor, batch: dict[str, Any]) -> Tensor:
    mask = batch.get("attention_mask")
    if mask is None:
        return x.flatten(0, 1)
    return x[mask.bool().repeat_interleave(x.shape[1] // mask.shape[1], 1)]


def output_of(model: Any, cache: Any, name: str) -> Tensor:
    """What the matrix ``name`` gives, less its bias, read off the forward pass itself: ``[batch, token, d_right]``."""
    matrix, weights = catalogue(model, per_head=True)[name], model.weights
    block = f"blocks.{matrix.layer}"
    attn = f"{block}.attn"
    if matrix.kind == "OV":
        # What the head adds to the stream, less what the value bias adds.
        z, shared = cache[f"{attn}.hook_z"][:, :, matrix.head], matrix.head // model.structure.queries_per_key
        if f"{attn}.b_V" in weights:
            z = z - weights[f"{attn}.b_V"][shared]
        return z @ weights[f"{attn}.W_O"][matrix.head]
    if matrix.kind == "QK":
        q, shared = cache[f"{attn}.hook_q"][:, :, matrix.head], matrix.head // model.structure.queries_per_key
        if f"{attn}.b_Q" in weights:
            q = q - weights[f"{attn}.b_Q"][matrix.head]
        return q @ weights[f"{attn}.W_K"][shared].T
    sublayer, _, leaf = name.removesuffix(f".{matrix.head}").rpartition(".")
    gated = f"{block}.mlp.W_gate" in weights
    shown = "mlp.hook_pre_linear" if gated and leaf == "W_in" else SHOWN[leaf]
    out = cache[f"{block}.{shown}"]
    bias = weights.get(f"{sublayer}.b{leaf[1:]}")
    # A gated MLP without a bias of the gate adds the one bias after the product.
    late = leaf == "W_in" and gated and f"{sublayer}.b_gate" not in weights
    if bias is not None and not late:
        out = out - bias
    if leaf in ("W_Q", "W_K", "W_V"):
        return out.flatten(2) if matrix.head is None else out[:, :, matrix.head]
    if matrix.right_norm is not None:  # the cache holds what the norm behind it gives
        x = cache[f"{block}.mlp.hook_post"] if leaf == "W_out" else cache[f"{attn}.hook_z"].flatten(2)
        out = x @ weights[f"{sublayer}.{leaf}"].flatten(0, -2)
    if leaf == "W_O" and matrix.head is not None:
        return cache[f"{attn}.hook_z"][:, :, matrix.head] @ weights[f"{attn}.W_O"][matrix.head]
    return out


@pytest.mark.parametrize("kind", MODELS)
def test_the_energy_of_every_matrix_is_what_the_forward_pass_shows(kind: str, make_dt: Make, make_lm: Make) -> None:
    """``E ||x @ M||^2 = tr(M^T E[x x^T] M)``, and ``E[x] M`` is the mean output: for every matrix, heads included."""
    model = make_model(kind, make_dt, make_lm)
    batches = batches_of(model)
    acts = collect_activations(model, batches=batches)
    caches = []
    with torch.no_grad():
        for batch in batches:
            caches.append(model.run_with_cache(**batch)[1])
    everything = catalogue(model, per_head=True)
    assert set(acts.inputs) == set(everything)
    for name, matrix in everything.items():
        shown = [kept(output_of(model, c, name), b) for c, b in zip(caches, batches, strict=True)]
        seen = torch.cat(shown).double()
        M, moments = matrix.dense(model, fold_layernorm=False), acts.inputs[name]
        assert moments.count == len(seen)
        torch.testing.assert_close(moments.mean @ M, seen.mean(0), rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(M.T @ moments.second @ M, seen.T @ seen / len(seen), rtol=1e-5, atol=1e-6, msg=name)
        measured = float(seen.square().sum(1).mean().sqrt())
        assert moments.energy((M, torch.eye(M.shape[1]).double())) == pytest.approx(measured, rel=1e-6), name


@pytest.mark.parametrize("kind", ["pre", "gptj"])
def test_moments_are_those_of_a_naive_sum(kind: str, make_dt: Make, make_lm: Make) -> None:
    model = make_model(kind, make_dt, make_lm)
    batches = batches_of(model)
    acts = collect_activations(model, batches=batches)
    rows: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in batches:
            cache = model.run_with_cache(**batch)[1]
            for name in [*acts.stream, "blocks.0.mlp.hook_post"]:
                rows.setdefault(name, []).append(kept(cache[name], batch).double())
    assert set(acts.stream) == {n for n in model.hook_dict if n.rpartition(".")[2].startswith("hook_resid")}
    for name, parts in rows.items():
        x = torch.cat(parts)
        moments = acts.stream[name] if name in acts.stream else acts.inputs["blocks.0.mlp.W_out"]
        torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(moments.second, x.T @ x / len(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(moments.covariance, torch.cov(x.T, correction=0), rtol=1e-7, atol=1e-7)


def test_effective_rank_counts_dimensions_in_use() -> None:
    def of(*variances: float) -> float:
        return Moments(
            9, torch.ones(len(variances)).double(), torch.diag(torch.tensor(variances)).double() + 1
        ).effective_rank

    assert of(1, 1, 1, 0) == pytest.approx(3)
    assert of(5, 0, 0) == pytest.approx(1)
    assert of(0, 0) == 0
    assert 1 < of(4, 1) < 2


def test_only_what_was_asked_for_is_watched(make_dt: Make) -> None:
    model = make_dt()
    acts = collect_activations(model, batches=[model.probe()], matrices=["*.W_in", "blocks.1.attn.OV.0"])
    assert set(acts.inputs) == {"blocks.0.mlp.W_in", "blocks.1.mlp.W_in", "blocks.1.attn.OV.0"}
    with pytest.raises(DtLensError, match=r"do not cover what blocks.0.mlp.W_out reads.*Did you mean"):
        acts.inputs["blocks.0.mlp.W_out"]
    whole = collect_activations(model, batches=[model.probe()])
    for name in acts.inputs:
        # If no hook reads the pattern, the model computes the same attention another way.
        torch.testing.assert_close(acts.inputs[name].second, whole.inputs[name].second, rtol=1e-5, atol=1e-6)


def test_a_file_goes_there_and_back(make_dt: Make, tmp_path: Path) -> None:
    model = make_dt()
    acts = collect_activations(model, batches=[model.probe()])
    file = tmp_path / "deep" / "acts.safetensors"
    acts.save(file)
    assert [f.name for f in file.parent.iterdir()] == [file.name]
    again = Activations.load(file)
    assert again.digest == acts.digest
    assert again.record == acts.record
    assert dict(again.reads) == acts.reads
    assert again.made_of == acts.made_of
    assert repr(again) == repr(acts)
    for name in acts.inputs:
        assert torch.equal(again.inputs[name].second, acts.inputs[name].second)
    assert again.stream["blocks.1.hook_resid_mid"].count == acts.stream["blocks.1.hook_resid_mid"].count
    # Any bit counts.
    other = Activations.load(file)
    other.stream["blocks.0.hook_resid_pre"].mean[0] += 1e-12
    assert other.digest != acts.digest
    assert collect_activations(model, batches=[model.probe(1)]).digest != acts.digest


def test_files_that_are_not_activations_are_refused(make_dt: Make, tmp_path: Path) -> None:
    model = make_dt()
    file = tmp_path / "acts.safetensors"
    collect_activations(model, batches=[model.probe()]).save(file)
    with pytest.raises(DtLensError, match=r"There is no file of activations .*none.safetensors'.* dt-lens activations"):
        Activations.load(tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DtLensError, match="is not a file of activations that can be read"):
        Activations.load(cut)
    whole = file.read_bytes()
    for place in (whole.index(b"model_id") + 20, len(whole) - 9):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        cut.write_bytes(flipped)
        with pytest.raises(DtLensError, match=r"cut\.safetensors is (damaged|not a file of activations)"):
            Activations.load(cut)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, cut)
    with pytest.raises(DtLensError, match=r"is not a file of activations; Activations\.save"):
        Activations.load(cut)
    with pytest.raises(
        DtLensError, match=r"below\.safetensors cannot be written: .*; choose another folder or make room\.$"
    ):
        collect_activations(model, batches=[model.probe()]).save(file / "below.safetensors")


def test_models_and_batches_that_give_no_activations_are_refused(make_dt: Make, make_lm: Make) -> None:
    model, lm = make_dt(), dt_lens.wrap(make_lm("gpt2"), check=False)
    for batches, message in (([], "No token was seen"), ([{"states": torch.zeros(1)}], "cannot run on batch 0")):
        with pytest.raises(DtLensError, match=message):
            collect_activations(model, batches=batches)
    with pytest.raises(DtLensError, match="does not say which environment"):
        collect_activations(model)
    with pytest.raises(DtLensError, match="leave out episodes"):
        collect_activations(lm, episodes=3)
    with pytest.raises(DtLensError, match="no tokenizer"):
        collect_activations(lm)
    with pytest.raises(DtLensError, match=r"takes a wrapped model, not a Linear; call dt_lens\.wrap"):
        collect_activations(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(DtLensError, match="vocabulary"):
        collect_activations(lm, batches=[torch.full((1, 4), 99)])


def test_a_language_model_reads_its_own_text() -> None:
    model = dt_lens.load("tiny-gpt2", check=False)
    acts = collect_activations(model, windows=3, matrices=["*.W_in", "blocks.0.attn.OV.0"])
    assert acts.record["windows"] == 3
    assert acts.record["tokens"] == 3 * 128
    assert acts.record["text"] == "heldout.txt"
    name = "blocks.0.mlp.W_in"
    edit = SingularEdit(model, name, value="zero", activations=acts)
    assert edit.control(0, acts).output_energy(acts) == pytest.approx(edit.output_energy(acts), rel=1e-5)
    again = collect_activations(model, windows=3, matrices=["*.W_in", "blocks.0.attn.OV.0"])
    assert again.digest == acts.digest
