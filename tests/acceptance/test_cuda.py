"""On a CUDA card: load, certify, scan, edit and evaluate do what they do on the CPU, up to rounding."""

from __future__ import annotations

import pytest
import torch

import dt_lens
from dt_lens import SingularEdit, WeightSVD

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]


@pytest.mark.parametrize("name", ["hopper", "taxi", "tiny-gpt2"])
def test_a_bundled_model_is_certified_and_scanned(name: str) -> None:
    host, card = dt_lens.load(name), dt_lens.load(name).to("cuda")
    assert dt_lens.certify(card).against == "the original model"
    sides = ["blocks.0.mlp.W_in", "blocks.1.mlp.W_out", "blocks.0.attn.OV.0"]
    tables = [WeightSVD(model).scan(sides) for model in (host, card)]
    assert list(tables[0]["matrix"]) == list(tables[1]["matrix"])
    for column in ("sigma", "p_value"):
        torch.testing.assert_close(*(torch.tensor(table[column].to_numpy()) for table in tables), rtol=1e-6, atol=1e-9)


def test_an_edit_is_undone_to_the_bit_and_hurts_as_on_the_cpu() -> None:
    host, card = dt_lens.load("hopper"), dt_lens.load("hopper").to("cuda")
    weight = card.weights["blocks.0.mlp.W_in"].clone()
    kept = {"episodes": 32, "seed": 0, "max_steps": 200}
    results = []
    for model in (host, card):
        before = dt_lens.evaluate(model, **kept)
        with SingularEdit(model, "blocks.0.mlp.W_in", sv=0):
            results.append(dt_lens.evaluate(model, **kept).compare(before).difference)
        assert dt_lens.evaluate(model, **kept).to_frame().equals(before.to_frame())
    assert torch.equal(card.weights["blocks.0.mlp.W_in"], weight)
    # Rounding differs, and an episode may part from its twin: the means stay close.
    assert results[0] < 0 and abs(results[1] - results[0]) < 0.25 * abs(results[0])


def test_several_edits_in_one_batch_agree_with_each_alone() -> None:
    card = dt_lens.load("hopper").to("cuda")
    kept = {"episodes": 8, "seed": 0, "max_steps": 100}
    edits = [SingularEdit(card, "blocks.0.mlp.W_in", sv) for sv in range(3)]
    together = dt_lens.evaluate(card, edits=edits, **kept)
    for edit, evaluation in zip(edits, together, strict=True):
        with edit:
            assert dt_lens.evaluate(card, **kept).to_frame().equals(evaluation.to_frame())
