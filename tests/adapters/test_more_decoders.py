"""What GPT-NeoX has beyond the first families: fused heads, norms side by side, names of older files."""

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

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [28, 7, 18, 2, 8, 1, 8, 0]])
ODD: list[tuple[str, dict[str, Any]]] = [
    ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 1.0, "tie_word_embeddings": True}),
    ("gpt_neox", {"attention_bias": False, "num_attention_heads": 4, "intermediate_size": 7, "hidden_act": "gelu_new"}),
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
    assert set(cache) == set(lens.hook_dict)
    model.save_pretrained(tmp_path)
    loaded, opened = dt_lens.load(tmp_path), dt_lens.open_checkpoint(tmp_path)
    close(loaded(TOKENS), wanted)
    assert opened.cfg == loaded.cfg == lens.cfg
    for name, weight in lens.weights.items():
        assert torch.equal(opened.weights[name], weight), name
    name = "blocks.1.attn.OV.1"
    close(WeightSVD(opened)[name].read, WeightSVD(lens)[name].read)
    for matrix in ("blocks.0.attn.W_K", "blocks.1.mlp.W_in"):
        with SingularEdit(lens, matrix, sv=0, value="flip"):
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


@pytest.mark.parametrize("kind", ["gpt_neox"])
def test_a_fused_activation_can_be_replaced(kind: str, make_lm: Any) -> None:
    """What a hook returns for one part is what the model goes on with: as if the weight had been another."""
    model = make_lm(kind)
    lens = dt_lens.wrap(model, check=False)
    for name, weight in (("attn.hook_k", "attn.W_K"), ("attn.hook_v", "attn.W_V")):
        bias = lens.weights.get(f"blocks.0.{weight.replace('W', 'b')}")

        def doubled(x: Tensor, hook: Any, bias: Any = bias) -> Tensor:
            return 2 * x if bias is None else 2 * x - bias

        out = lens.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.0.{name}", doubled)])
        with torch.no_grad():
            lens.weights[f"blocks.0.{weight}"].mul_(2)
            close(out, model(TOKENS).logits)
            lens.weights[f"blocks.0.{weight}"].div_(2)
