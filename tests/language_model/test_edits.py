"""Edits where norms do not centre, heads share keys and values, MLPs are gated, and queries turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dt_lens
from dt_lens import SingularEdit, WeightSVD
from dt_lens.lens.matrices import find_matrix


def dense(lens: Any, name: str, folded: bool = True) -> torch.Tensor:
    return find_matrix(lens, name).dense(lens, folded)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_only_a_norm_that_centres_makes_a_removal_of_a_constant(kind: str, make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm(kind), check=False)
    name = "blocks.1.mlp.W_in"
    d, before = WeightSVD(lens)[name], dense(lens, name)
    edit = SingularEdit(lens, name, sv=2)
    with edit:
        after = dense(lens, name)
    became = (after - before) @ d.right[2] / d.sigma[2] + d.left[2]  # what the read vector became
    if kind == "gpt2":
        torch.testing.assert_close(became, torch.zeros_like(became), atol=1e-6, rtol=0)
        assert "removes constants" in edit.note
    else:
        torch.testing.assert_close(became, torch.full_like(became, 1 / len(became)), atol=1e-6, rtol=0)
        assert "removes constants" not in edit.note


@pytest.mark.parametrize("side", ["read", "write"])
def test_an_edit_of_one_head_and_of_all_that_share_with_it(side: Any, make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm("llama"), check=False)  # heads 0 and 1 share keys and values, and so do 2 and 3
    before = [dense(lens, f"blocks.0.attn.OV.{head}", False) for head in range(4)]
    edit = SingularEdit(lens, "blocks.0.attn.OV.1", sv=0, side=side, value="zero")
    with edit:
        changed = [not torch.equal(dense(lens, f"blocks.0.attn.OV.{h}", False), before[h]) for h in range(4)]
        left, right = edit.delta
        torch.testing.assert_close(
            dense(lens, "blocks.0.attn.OV.1", False) - before[1], left @ right, atol=1e-6, rtol=0
        )
    # Reading edits land in W_V, which is shared; writing ones in W_O, which is not.
    assert changed == ([True, True, False, False] if side == "read" else [False, True, False, False])
    assert ("Heads 0 to 1 share W_V" in edit.note) == (side == "read")


@pytest.mark.parametrize(("side", "shared"), [("query", False), ("key", True)])
def test_queries_are_a_heads_own_and_keys_are_shared(side: Any, shared: bool, make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm("mistral"), check=False)
    edit = SingularEdit(lens, "blocks.1.attn.QK.3", sv=1, side=side, value=0.5)
    tokens = torch.arange(8)[None]
    before = lens(tokens)
    with edit:
        assert not torch.equal(lens(tokens), before)
    assert torch.equal(lens(tokens), before)
    assert ("Heads 2 to 3 share W_K" in edit.note) == shared


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "gpt_neo", "gpt_neox", "llama", "qwen2", "qwen3", "gemma2", "olmo2"])
@pytest.mark.parametrize("matrix", ["mlp.W_in", "mlp.W_gate", "mlp.W_out", "attn.W_Q", "attn.W_O"])
def test_an_edit_and_its_control_on_every_family(kind: str, matrix: str, make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm(kind), check=False)
    name = f"blocks.0.{matrix}"
    if name not in lens.weights:
        pytest.skip(f"{kind} has no {matrix}")
    tokens = torch.arange(10)[None]
    before = lens.original(tokens).logits
    edit = SingularEdit(lens, name, sv=[0, 1], value="flip")
    for change in (edit, edit.control(1)):
        assert change.energy == pytest.approx(edit.energy, rel=1e-6)
        with change:
            assert not torch.allclose(lens.original(tokens).logits, before, atol=1e-4)  # Hugging Face's own model
        assert torch.equal(lens.original(tokens).logits, before)


def test_directions_behind_an_rmsnorm_live_in_all_dimensions(make_lm: Any) -> None:
    lens = dt_lens.wrap(make_lm("llama"), check=False)
    d = WeightSVD(lens)["blocks.0.mlp.W_gate"]
    assert float(d.read.sum(1).abs().max()) > 0.1  # a LayerNorm's would have no mean
    w = lens.weights["blocks.0.ln2.w"].double()
    expected = torch.linalg.svdvals(w[:, None] * lens.weights["blocks.0.mlp.W_gate"].double())
    torch.testing.assert_close(d.sigma, expected[: len(d.sigma)])
    out = lens.embeddings["token_out"]
    torch.testing.assert_close(out.effective, lens.weights["ln_final.w"].double() * out.directions.double())
