"""The lens shares its memory with the model it wraps, and says so clearly when it no longer does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import dt_lens
from dt_lens import Embedding, SingularEdit
from dt_lens.errors import DtLensError

MATRICES = [f"blocks.{layer}.{part}" for layer in (0, 1) for part in
            ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out")]  # fmt: skip


def predictions(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**batch)
    return torch.cat([out.state_preds, out.action_preds, out.return_preds], -1)


def test_every_weight_is_the_users_own(make_hf: Any, make_batch: Any) -> None:
    hf = make_hf()
    lens = dt_lens.wrap(hf)
    batch = make_batch(hf.config)
    heads = {"embed_return", "embed_state", "embed_action", "predict_state", "predict_action", "predict_return"}
    theirs = {t.untyped_storage().data_ptr() for name, t in hf.state_dict().items() if "wte" not in name}
    mine = {t.untyped_storage().data_ptr() for t in lens.weights.values()}
    assert mine == theirs and len(heads) == 6
    for name, weight in lens.weights.items():
        before = predictions(hf, batch)
        kept = weight.clone()
        weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        after = predictions(hf, batch)
        # A key's bias is the same for all keys of a query, so it has no effect.
        if "b_K" not in name:
            assert not torch.allclose(before, after, atol=1e-5), f"a change of {name} is not seen by the model"
        torch.testing.assert_close(predictions(lens, batch), after, rtol=1e-5, atol=1e-5)
        weight.copy_(kept)
        assert torch.equal(predictions(hf, batch), before)


def test_a_training_step_of_the_users_model_is_seen(make_hf: Any, make_batch: Any) -> None:
    hf = make_hf()
    lens = dt_lens.wrap(hf)
    batch = make_batch(hf.config)
    optimizer = torch.optim.AdamW(hf.parameters(), 0.1)
    hf(**batch).action_preds.pow(2).sum().backward()
    before = predictions(lens, batch)
    optimizer.step()
    assert not torch.allclose(predictions(lens, batch), before)
    torch.testing.assert_close(predictions(lens, batch), predictions(hf, batch), rtol=1e-5, atol=1e-5)
    lens.require_shared(list(lens.weights))


@pytest.mark.parametrize("matrix", MATRICES)
def test_an_edit_through_the_lens_reaches_the_model(make_hf: Any, make_batch: Any, matrix: str) -> None:
    hf = make_hf()
    lens = dt_lens.wrap(hf)
    batch = make_batch(hf.config)
    before = predictions(hf, batch)
    with SingularEdit(lens, matrix, sv=0):
        edited = predictions(hf, batch)
        assert not torch.allclose(edited, before, atol=1e-4)
        torch.testing.assert_close(predictions(lens, batch), edited, rtol=1e-5, atol=1e-5)
    assert torch.equal(predictions(hf, batch), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moving_the_lens_moves_the_model(make_hf: Any, make_batch: Any, dtype: torch.dtype) -> None:
    hf = make_hf()
    lens = dt_lens.wrap(hf)
    lens.to(dtype)
    assert all(t.dtype == dtype for t in hf.parameters()) and all(w.dtype == dtype for w in lens.weights.values())
    lens.require_shared(list(lens.weights))
    dt_lens.certify(lens)
    batch = {k: x.to(dtype) if x.is_floating_point() else x for k, x in make_batch(hf.config).items()}
    before = predictions(hf, batch)
    with SingularEdit(lens, "blocks.1.mlp.W_in"):
        assert not torch.equal(predictions(hf, batch), before)
    assert torch.equal(predictions(hf, batch), before)


@pytest.mark.parametrize("loosen", ["cast", "reload", "replace"])
def test_a_model_that_moved_on_its_own_is_noticed(make_hf: Any, loosen: str) -> None:
    hf = make_hf()
    lens = dt_lens.wrap(hf)
    name = "blocks.0.mlp.W_in"
    if loosen == "cast":
        hf.double()
    elif loosen == "reload":
        hf.load_state_dict({k: v.clone() for k, v in hf.state_dict().items()}, assign=True)
    else:
        layer = hf.encoder.h[0].mlp.c_fc
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    edit = SingularEdit(lens, name)
    with pytest.raises(DtLensError, match=rf"no longer shares the weight '{name}'.*wrap it again\.$"):
        edit.apply()
    if loosen == "replace":  # only that weight is refused
        lens.require_shared(["blocks.1.mlp.W_in"])
    again = dt_lens.wrap(hf)
    with SingularEdit(again, name):
        pass


def test_loading_new_values_in_place_keeps_the_lens(make_hf: Any, make_batch: Any) -> None:
    hf, other = make_hf(), make_hf(1)
    lens = dt_lens.wrap(hf)
    hf.load_state_dict(other.state_dict())
    lens.require_shared(list(lens.weights))
    batch = make_batch(hf.config)
    torch.testing.assert_close(predictions(lens, batch), predictions(other, batch), rtol=1e-5, atol=1e-5)


def test_a_copy_of_the_lens_is_independent_of_the_model(make_hf: Any, make_batch: Any) -> None:
    hf = make_hf()
    lens = dt_lens.wrap(hf)
    copied = copy.deepcopy(lens)
    assert copied.original is None and copied.reference is None
    batch = make_batch(hf.config)
    before = predictions(hf, batch)
    copied.weights["blocks.0.mlp.W_in"].zero_()
    assert torch.equal(predictions(hf, batch), before) and not torch.equal(predictions(copied, batch), before)
    dt_lens.certify(copied)


def test_the_model_is_not_a_submodule_of_the_lens(make_hf: Any) -> None:
    hf = make_hf()
    lens = dt_lens.wrap(hf)
    assert lens.original is hf
    assert not any(module is hf for module in lens.modules())
    assert set(lens.state_dict()) == set(lens.weights)


def test_labelled_directions_follow_the_weights(make_hf: Any) -> None:
    lens = dt_lens.wrap(make_hf())
    lens.embeddings.relabel("action_out", ["left", "right", "jump"])
    lens.embeddings["mine"] = Embedding(torch.eye(16)[:2], ["x", "y"])
    lens.embeddings["state_in"] = Embedding(torch.eye(16)[:1], ["only"])
    lens.to(torch.float64)
    directions = lens.embeddings["action_out"].directions
    assert directions.dtype == torch.float64 and lens.embeddings["action_out"].labels == ["left", "right", "jump"]
    lens.weights["predict.action.W"].fill_(2.0)
    assert torch.equal(directions, torch.full_like(directions, 2.0))
    # The user's own embeddings stay as they are.
    assert lens.embeddings["mine"].labels == ["x", "y"] and lens.embeddings["state_in"].labels == ["only"]
    assert lens.embeddings["reward_in"].directions.dtype == torch.float64


def test_the_training_mode_is_the_models(make_hf: Any) -> None:
    hf = make_hf()
    assert not dt_lens.wrap(hf).training
    lens = dt_lens.wrap(hf.train())
    assert lens.training and hf.training  # certifying leaves both as they were
