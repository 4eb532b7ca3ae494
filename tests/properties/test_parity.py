"""The lens computes what Hugging Face's model computes, over random configurations, masks and batch sizes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dt_lens
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.decision_transformer.model import HookedDecisionTransformer

OUTPUTS = ("state_preds", "action_preds", "return_preds")
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.sampled_from([1, 2, 4]))
    width = heads * draw(st.sampled_from([1, 2, 4, 6]))
    return {
        "state_dim": draw(st.integers(1, 9)),
        "act_dim": draw(st.integers(1, 5)),
        "hidden_size": width,
        "n_head": heads,
        "n_layer": draw(st.integers(1, 3)),
        "n_inner": draw(st.sampled_from([None, 1, 7, width, 3 * width])),
        "activation_function": draw(st.sampled_from(["relu", "gelu", "gelu_new", "silu", "tanh"])),
        "action_tanh": draw(st.booleans()),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-12, 1e-2])),
        "scale_attn_weights": draw(st.booleans()),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
        "max_ep_len": draw(st.integers(1, 50)),
        "n_positions": draw(st.sampled_from([1, 2, 60])),
    }


def assert_same(mine: Any, theirs: Any, mask: torch.Tensor | None, **tolerance: float) -> None:
    """Equal predictions at every real step."""
    for name in OUTPUTS:
        a, b = getattr(mine, name), getattr(theirs, name)
        if mask is not None:
            a, b = a[mask.bool()], b[mask.bool()]
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@settings(SETTINGS, max_examples=60)
@given(
    options=configurations(),
    batch=st.integers(1, 5),
    steps=st.integers(1, 7),
    padding=st.sampled_from(["none", "left", "right"]),
    seed=st.integers(0, 2**20),
)
def test_predictions_equal_hugging_faces(
    make_hf: Any, make_batch: Any, options: dict[str, Any], batch: int, steps: int, padding: str, seed: int
) -> None:
    hf = make_hf(seed, **options)
    lens = dt_lens.wrap(hf)  # certifies, so a false alarm fails here too
    inputs = make_batch(hf.config, batch, steps, padding, seed)
    with torch.no_grad():
        assert_same(lens(**inputs), hf(**inputs), inputs.get("attention_mask"), rtol=1e-5, atol=1e-5)


@settings(SETTINGS, max_examples=12)
@given(options=configurations(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 2**20))
def test_what_is_saved_is_read_back(
    make_hf: Any, make_batch: Any, options: dict[str, Any], dtype: torch.dtype, seed: int
) -> None:
    from transformers import DecisionTransformerModel

    hf = make_hf(seed, **options).to(dtype)
    size, actions = hf.config.state_dim, hf.config.act_dim
    facts = {
        "context": 7,
        "environment": "Nowhere-v0",
        "environment_kwargs": {"walls": [1, 2], "wind": 0.5},
        "state_mean": [0.25 * i for i in range(size)],
        "state_std": [1.0 + i for i in range(size)],
        "return_scale": 50.0,
        "target_returns": [300, 20.5],
        "state_labels": [f"s{i}" for i in range(size)],
        "action_labels": [f"a{i}" for i in range(actions)],
        "trained_heads": ["action", "state"],
        "about": {"dataset": "none", "scores": [1, 2.5]},
    }
    lens = dt_lens.wrap(hf, check=False, **facts)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in make_batch(hf.config, seed=seed).items()}
    with tempfile.TemporaryDirectory() as folder:
        dt_lens.save_pretrained(lens, folder)
        theirs = DecisionTransformerModel.from_pretrained(folder).eval()
        mine = dt_lens.load(folder)
        live = dt_lens.wrap(theirs)
        with torch.no_grad():
            assert_same(theirs(**inputs), hf(**inputs), None, rtol=0, atol=0)
            assert_same(mine(**inputs), lens(**inputs), None, rtol=0, atol=0)
        # The facts are found beside a model that from_pretrained read, too.
        for again in (mine, live):
            assert again.facts == lens.facts == RunFacts.from_dict(facts)
            assert again.cfg == lens.cfg


@settings(SETTINGS, max_examples=12)
@given(
    heads=st.sampled_from([1, 2]),
    layers=st.integers(1, 3),
    position=st.sampled_from(["none", "constant"]),
    act_fn=st.sampled_from(["relu", "gelu", "gelu_tanh", "silu", "tanh"]),
    tanh=st.booleans(),
    discrete=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_a_model_trained_here_is_hugging_faces_too(
    make_batch: Any, heads: int, layers: int, position: Any, act_fn: Any, tanh: bool, discrete: bool, seed: int
) -> None:
    from transformers import DecisionTransformerModel

    torch.manual_seed(seed)
    cfg = HookedDecisionTransformerConfig(
        4, 2, d_model=8, n_layers=layers, n_heads=heads, d_mlp=12, n_ctx=5, max_ep_len=30, act_fn=act_fn,
        action_tanh=tanh, discrete_actions=discrete, position=position, n_position=3,
    )  # fmt: skip
    model = HookedDecisionTransformer(cfg)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    inputs = make_batch(cfg, seed=seed)
    for _ in range(5):
        out = model(**inputs)
        loss = sum(getattr(out, name).pow(2).mean() for name in OUTPUTS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        dt_lens.save_pretrained(model, folder)
        theirs = DecisionTransformerModel.from_pretrained(folder).eval()
        mine = dt_lens.load(folder)
    with torch.no_grad():
        assert_same(theirs(**inputs), model(**inputs), None, rtol=1e-5, atol=1e-5)
        assert_same(mine(**inputs), model(**inputs), None, rtol=1e-6, atol=1e-6)
    assert mine.facts == model.facts
    kept = {"position", "n_position"} if position == "none" else set()
    before, after = asdict(cfg), asdict(mine.cfg)
    assert {k: v for k, v in before.items() if k not in kept} == {k: v for k, v in after.items() if k not in kept}


@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "gelu_fast", "swish"])
def test_activations_have_several_names(
    make_hf: Callable[..., Any], make_batch: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    hf = make_hf(activation_function=name)
    inputs = make_batch(hf.config)
    with torch.no_grad():
        assert_same(dt_lens.wrap(hf)(**inputs), hf(**inputs), None, rtol=1e-5, atol=1e-5)
