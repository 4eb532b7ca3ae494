"""How exact certify is: no false alarm from rounding in any precision, and no mistake that hides behind rounding."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import dt_lens
from dt_lens.errors import DtLensError
from dt_lens.lens.certification import TOLERANCE
from dt_lens_adapters import hf_decision_transformer

PARTS = ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out")
NAMES = [f"blocks.0.{part}" for part in PARTS]
SQUARE = {"hidden_size": 12, "n_inner": 12, "n_layer": 2, "n_head": 3, "state_dim": 12, "act_dim": 12}


def wrap_and_certify(make_hf: Any, dtype: torch.dtype, seed: int, size: float) -> None:
    """A model of real size, initialised or moved far away, must raise no false alarm."""
    hf = make_hf(
        seed,
        size,
        state_dim=11,
        hidden_size=128,
        n_layer=3,
        n_head=(1, 2, 4)[seed % 3],
        activation_function=("relu", "gelu", "gelu_new")[seed % 3],
        max_ep_len=1000,
    ).to(dtype)
    certificate = dt_lens.certify(dt_lens.wrap(hf, check=False), seed)
    assert certificate.against == "the original model" and 0 < certificate.worst <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 0.05])
def test_no_false_alarm(make_hf: Any, dtype: torch.dtype, size: float) -> None:
    for seed in range(3):
        wrap_and_certify(make_hf, dtype, seed, size)


def test_errors_do_not_grow_from_block_to_block(make_hf: Any) -> None:
    """Rounding in bfloat16 over 24 blocks would be beyond any tolerance that catches mistakes."""
    certificate = dt_lens.certify(dt_lens.wrap(make_hf(hidden_size=64, n_layer=24).bfloat16()))
    assert certificate.worst < 0.03


def test_padding_is_not_compared(make_hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision Hugging Face's padding may be NaN."""
    lens = dt_lens.wrap(make_hf())
    right = lens.reference.activations
    mask = lens.probe()["attention_mask"].bool()
    assert not mask.all()

    def spoiled(batch: Any) -> dict[str, Tensor]:
        truth = right(batch)
        for name, tensor in truth.items():
            if not name.endswith("hook_pattern"):
                tensor[~mask.repeat_interleave(tensor.shape[1] // mask.shape[1], 1)] = float("nan")
        return truth

    monkeypatch.setattr(lens.reference, "activations", spoiled)
    assert 0 < dt_lens.certify(lens).worst < 2e-5


def test_an_original_that_overflows_is_not_the_adapters_fault(make_hf: Any) -> None:
    hf = make_hf()
    hf.encoder.h[1].mlp.c_fc.weight.data *= 1e5
    hf.half().encoder.h[1].mlp.c_fc.weight.data.clamp_(-60000, 60000)
    with pytest.raises(
        DtLensError, match=r"certify: blocks\.1\.\S+ of the original model is NaN or infinite .*\.float\(\)\.$"
    ):
        dt_lens.wrap(hf)


@pytest.mark.acceptance
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 0.02, 0.1])
def test_no_false_alarm_in_ten(make_hf: Any, dtype: torch.dtype, size: float) -> None:
    for seed in range(10):
        wrap_and_certify(make_hf, dtype, seed, size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_hides_no_mistake(
    monkeypatch: pytest.MonkeyPatch, make_hf: Any, dtype: torch.dtype, name: str
) -> None:
    right = hf_decision_transformer.canonical_from_hf
    hf = make_hf(**SQUARE).to(dtype)
    dt_lens.wrap(hf)

    def wrong(tensors: Any, cfg: Any) -> dict[str, Tensor]:
        weights = right(tensors, cfg)
        weights[name] = weights[name].roll(1, -1)
        return weights

    monkeypatch.setattr(hf_decision_transformer, "canonical_from_hf", wrong)
    with pytest.raises(DtLensError, match=rf"certify: {re.escape(name)} does not"):
        dt_lens.wrap(hf)


@pytest.mark.parametrize("name", NAMES)
def test_float64_hides_no_small_mistake(monkeypatch: pytest.MonkeyPatch, make_hf: Any, name: str) -> None:
    """One in ten million is far beyond rounding in float64, and would be within it in float32."""
    right = hf_decision_transformer.canonical_from_hf
    hf = make_hf(**SQUARE).double()
    assert dt_lens.certify(dt_lens.wrap(hf, check=False)).worst < 1e-9

    def wrong(tensors: Any, cfg: Any) -> dict[str, Tensor]:
        weights = right(tensors, cfg)
        return {**weights, name: weights[name] * (1 + 1e-7)}

    monkeypatch.setattr(hf_decision_transformer, "canonical_from_hf", wrong)
    with pytest.raises(DtLensError, match=rf"certify: {re.escape(name)} does not .*, allowed 1e-09\)"):
        dt_lens.wrap(hf)
