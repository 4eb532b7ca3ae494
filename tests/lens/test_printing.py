"""What is printed of an object is short; what a notebook shows of it is a table in which everything is escaped."""

from __future__ import annotations

import copy
import io
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import dt_lens
from dt_lens.lens.printing import Weights, frame_html, listed, weights_html, weights_text
from dt_lens.study.court.claims import CLAIMS, WAYS
from dt_lens.study.court.result import CourtResult, Ruling
from dt_lens.study.steering.result import SteeringResult

HOSTILE = "<script>alert(1)</script>"


def checked(value: Any, *, lines: int = 8) -> tuple[str, str]:
    """What an object prints and what a notebook shows, which is well-formed, short, and runs nothing."""
    text, page = repr(value), value._repr_html_()
    assert len(text.splitlines()) <= lines and len(text) < 1500, text
    assert "<script" not in page and "tensor(" not in text + page
    ET.fromstring(f"<div>{page}</div>")
    return text, page


@pytest.fixture(scope="module")
def agent(make_dt: Callable[..., Any]) -> Any:
    model = make_dt(0)
    model.facts = replace(model.facts, environment=HOSTILE, target_returns=(90.0, 50.0))
    model.embeddings.relabel("action_out", [HOSTILE, "b", "c"])
    return model


def test_a_decision_transformer_says_its_shape_and_what_it_acts_in(agent: Any) -> None:
    text, page = checked(agent)
    assert "HookedDecisionTransformer: 2 layers x 2 heads, d_model 16, d_mlp 24, context 4" in text
    assert "state        5 numbers" in text and "target returns 90, 50" in text and "action_out" in text
    assert HOSTILE in text and "&lt;script&gt;" in page
    count = sum(parameter.numel() for parameter in agent.parameters())
    assert f"{len(agent.weights)} tensors, {count:,} numbers, float32 on cpu" in text
    assert "in force" not in text
    with dt_lens.SingularEdit(agent, "blocks.0.mlp.W_in", sv=1):
        assert "in force     blocks.0.mlp.W_in sv=[1]" in repr(agent)


def test_a_language_model_says_its_shape_and_counts_tied_weights_once(make_lm: Callable[..., Any]) -> None:
    model = dt_lens.wrap(make_lm("gpt2"), check=False)
    text, _ = checked(model)
    count = sum(parameter.numel() for parameter in model.model.parameters())
    assert "gpt2, 2 layers" in text and "vocabulary 29" in text and "token_in, token_out, position_in" in text
    assert f" {count:,} numbers" in text and "tokens are numbers" in text
    assert repr(model.blocks) == "2 blocks; in each, attn, ln1, ln2, mlp"


def test_weights_print_names_and_shapes_with_those_of_blocks_once(agent: Any) -> None:
    text, page = checked(agent.weights)
    assert "in each block  attn.W_Q [2, 16, 8]" in text and 'weights["blocks.0.mlp.W_in"]' in text
    assert "<td style='text-align:left'>blocks.0-1.mlp.W_in</td><td style='text-align:left'>[16, 24]</td>" in page
    uneven = Weights({"blocks.0.a": torch.zeros(2), "blocks.2.a": torch.zeros(2), "blocks.1.b": torch.zeros(3)})
    assert "in blocks.0,2  a [2]" in repr(uneven) and "in blocks.1    b [3]" in repr(uneven)
    assert "blocks.0,2.a" in weights_html("x", uneven) and weights_text("x", {}).startswith("x: 0 tensors")


def test_saved_weights_load_without_this_package(agent: Any) -> None:
    file = io.BytesIO()
    torch.save(agent.weights, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert list(again) == list(agent.weights) and torch.equal(again["ln_final.w"], agent.weights["ln_final.w"])
    assert list(copy.deepcopy(agent.weights)) == list(again)


def test_decompositions_edits_and_embeddings(agent: Any) -> None:
    svd = dt_lens.WeightSVD(agent, rank=4)
    text, _ = checked(svd)
    assert "18 matrices" not in text and "LayerNorm folded in, the first 4 directions of each" in text
    assert "decomposed     none" in text
    found = svd["blocks.0.mlp.W_in"]
    assert "decomposed     blocks.0.mlp.W_in" in repr(svd) and 'svd["blocks.0.mlp.W_in"]' in repr(svd)
    text, page = checked(found)
    assert "read [16] -> neuron [24], folded" in text and f"{float(found.sigma[0]):.4g}" in page
    edit = dt_lens.SingularEdit(agent, "blocks.0.mlp.W_in", sv=[0, 2], value="zero")
    assert "sv 0, 2" in checked(edit)[1] and "no: with edit" in edit._repr_html_()
    with edit:
        assert "<td style='text-align:left'>yes</td>" in edit._repr_html_()
    assert f"{edit.energy:.4g}" in checked(edit.control(0))[1]
    text, page = checked(agent.embeddings["action_out"])
    assert "Embedding action_out: 3 directions in 16 dimensions" in text and "&lt;script&gt;" in page
    assert (
        "no (a built-in null)" in repr(agent.embeddings["state_out"])
        and "&lt;script&gt;" in checked(agent.embeddings, lines=12)[1]
    )


def test_rulings_and_steering(agent: Any) -> None:
    rulings = [Ruling(c, way, "not applicable", None, float("nan"), HOSTILE) for c in CLAIMS for way in WAYS]
    text, page = checked(CourtResult(rulings, {"model": HOSTILE}), lines=len(CLAIMS) + 2)
    assert f"{len(CLAIMS)} claims" in text and "not applicable" in text and "&lt;script&gt;" in page
    empty = pd.DataFrame()
    shown = SteeringResult(
        "none found", f"Nothing {HOSTILE}.", None, empty, empty, pd.DataFrame({"x": [HOSTILE]}), empty
    )
    text, page = checked(shown)
    assert text.startswith("SteeringResult: none found") and page.count("&lt;script&gt;") == 2


def test_long_tables_and_lists_are_cut(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": range(12), "b": [HOSTILE] * 12})
    page = frame_html(frame, ["b", "missing"], most=3)
    assert page.count("&lt;script&gt;") == 3 and "9 more rows" in page and "<th>a" not in page
    assert listed(map(str, range(5)), 3) == "0, 1, 2, ... (5)"
