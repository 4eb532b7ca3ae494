"""``cfg.device`` and ``cfg.dtype`` say where a model is now."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import dt_lens
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig


@pytest.fixture(params=["decision transformer", "wrapped", "language model"])
def model(request: pytest.FixtureRequest, make_dt: Any, make_hf: Any, make_lm: Any) -> Any:
    match request.param:
        case "decision transformer":
            return make_dt()
        case "wrapped":
            return dt_lens.wrap(make_hf(), check=False)
    return dt_lens.wrap(make_lm("gpt2"), check=False)


def test_a_model_in_the_making_has_no_configuration(model: Any) -> None:
    assert not hasattr(type(model).__new__(type(model)), "cfg")


def test_they_follow_the_model(model: Any) -> None:
    assert (model.cfg.device, model.cfg.dtype) == (torch.device("cpu"), torch.float32)
    before = model.cfg
    other = copy.deepcopy(model)
    model.to(torch.float64)
    assert model.cfg.dtype == before.dtype == torch.float64 and other.cfg.dtype == torch.float32
    assert other.cfg == model.cfg and hash(other.cfg) == hash(model.cfg)
    assert set(model.cfg.to_dict()) == set(other.cfg.to_dict()) and "dtype" not in model.cfg.to_dict()
    fresh = model.untrained()
    other.to("meta")
    assert other.cfg.device == torch.device("meta") and fresh.cfg.device == torch.device("cpu")


def test_one_configuration_may_serve_several_models(make_dt: Any) -> None:
    model = make_dt()
    again = type(model)(model.cfg)
    again.to(torch.float16)
    assert (model.cfg.dtype, again.cfg.dtype) == (torch.float32, torch.float16)
    read = pickle.loads(pickle.dumps(model))
    again = copy.copy(read).to(torch.float64)
    assert (read.cfg.dtype, again.cfg.dtype, model.cfg.dtype) == (torch.float64, torch.float64, torch.float32)


def test_a_configuration_by_itself_is_nowhere() -> None:
    cfg = HookedDecisionTransformerConfig(state_dim=3, act_dim=2)
    assert cfg.device is None and cfg.dtype is None


def test_weights_alone_have_the_type_of_the_file(make_lm: Any, tmp_path: Path) -> None:
    make_lm("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    opened = dt_lens.open_checkpoint(tmp_path)
    assert (opened.cfg.device, opened.cfg.dtype) == (torch.device("cpu"), torch.bfloat16)
