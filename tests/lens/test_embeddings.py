"""Labelled directions: what a LayerNorm makes of them, and what a registry refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dt_lens import DtLensError, Embedding

Make = Callable[..., Any]


def test_the_seven_sets_of_a_decision_transformer(make_dt: Make) -> None:
    model = make_dt()
    registry, w = model.embeddings, model.weights
    assert list(registry) == [
        "state_in", "action_in", "reward_in", "timestep_in", "action_out", "state_out", "reward_out",
    ]  # fmt: skip
    assert [len(e) for e in registry.values()] == [5, 3, 1, 30, 3, 5, 1]
    assert torch.equal(registry["state_in"].directions, w["embed.state.W"])
    # Columns of the head [d_model, act_dim] are what it reads, one for each action.
    assert torch.equal(registry["action_out"].directions, w["predict.action.W"].T)
    assert [e.name for e in registry.values() if not e.trained] == ["state_out", "reward_out"]
    assert {e.side for n, e in registry.items() if n.endswith("_out")} == {"out"}
    assert "no (a built-in null)" in repr(registry)
    assert "<table>" in registry._repr_html_()


def test_directions_are_live(make_dt: Make) -> None:
    model = make_dt()
    before = model.embeddings["action_out"].directions.clone()
    model.weights["predict.action.W"].mul_(2)
    assert torch.equal(model.embeddings["action_out"].directions, 2 * before)
    effective = model.embeddings["action_out"].effective.clone()
    model.weights["ln_final.w"].mul_(3)
    torch.testing.assert_close(model.embeddings["action_out"].effective, 3 * effective)


def test_an_input_reaches_the_stream_along_its_effective_direction() -> None:
    """The LayerNorm's derivative at a token, along an input direction, off the token itself."""
    w, b, e = torch.randn(3, 12, dtype=torch.float64)
    effective = Embedding(e[None], side="in", layernorm=w).effective[0]
    token = torch.randn(12, dtype=torch.float64)
    centred = e - e.mean()
    token = token - token.mean() - (token @ centred) / (centred @ centred) * centred + 3.0
    _, moved = torch.func.jvp(lambda x: F.layer_norm(x, (12,), w, b, eps=0.0), (token,), (e,))
    torch.testing.assert_close(moved * token.std(correction=0), effective)


def test_a_head_reads_the_stream_along_its_effective_direction() -> None:
    w, b, e = torch.randn(3, 12, dtype=torch.float64)
    effective = Embedding(e[None], side="out", layernorm=w).effective[0]
    token = torch.randn(12, dtype=torch.float64)
    token = token - token.mean() - (token @ effective) / (effective @ effective) * effective - 2.0
    gradient = torch.func.grad(lambda x: F.layer_norm(x, (12,), w, b, eps=0.0) @ e)(token)
    torch.testing.assert_close(gradient * token.std(correction=0), effective)
    assert not torch.allclose(effective, Embedding(e[None], side="in", layernorm=w).effective[0])


def test_without_a_layernorm_the_effective_directions_are_the_raw_ones(make_dt: Make) -> None:
    model = make_dt(normalization="none", embed_ln=False, final_ln=False)
    for embedding in model.embeddings.values():
        assert torch.equal(embedding.effective, embedding.directions)


def test_a_users_own_set_takes_one_line(make_dt: Make) -> None:
    model = make_dt()
    for n, given in enumerate([torch.eye(16), np.eye(16), np.eye(16, dtype=int).tolist()]):
        model.embeddings[f"mine{n}"] = Embedding(given, [f"axis {i}" for i in range(16)])
        mine = model.embeddings[f"mine{n}"]
        assert torch.equal(mine.directions.double(), torch.eye(16).double())
        assert mine.index("axis 3") == 3
        assert (mine.name, mine.owner) == (f"mine{n}", model.identity)
    del model.embeddings["mine0"]
    assert "mine0" not in model.embeddings
    assert Embedding(torch.eye(2), kind="wheel").labels == ["wheel 0", "wheel 1"]


def test_relabel(make_dt: Make) -> None:
    registry = make_dt().embeddings
    registry.relabel("action_out", ["hip", "knee", "ankle"])
    assert registry["action_out"].labels == ["hip", "knee", "ankle"]
    with pytest.raises(DtLensError, match="2 labels for 3 directions"):
        registry.relabel("action_out", ["hip", "knee"])
    with pytest.raises(DtLensError, match=r"no label 'knie'. Did you mean 'knee'"):
        registry["action_out"].index("knie")


def test_models_are_not_mixed(make_dt: Make) -> None:
    model, other = make_dt(0), make_dt(1)
    with pytest.raises(DtLensError, match="'theirs' belongs to another model"):
        model.embeddings["theirs"] = other.embeddings["state_in"]
    with pytest.raises(DtLensError, match="directions of size 4; this model's stream has 16"):
        model.embeddings["small"] = Embedding(torch.eye(4))
    with pytest.raises(DtLensError, match="LayerNorm scale of shape"):
        model.embeddings["scaled"] = Embedding(torch.eye(16), layernorm=torch.ones(4))
    with pytest.raises(DtLensError, match="not a Tensor"):
        model.embeddings["bare"] = torch.eye(16)
    assert "theirs" not in model.embeddings
    model.embeddings["theirs"] = replace(other.embeddings["state_in"], owner=None)
    assert model.embeddings["theirs"].owner == model.identity


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (torch.zeros(3), {}, r"shape \[3\]; expected \[n, d_model\]"),
        (torch.zeros(0, 3), {}, r"shape \[0, 3\]"),
        (torch.tensor([[1.0, float("nan")]]), {}, "NaN"),
        (torch.eye(2), {"labels": ["a"]}, "1 labels for 2 directions"),
        (torch.eye(2), {"labels": "ab"}, "labels is 'ab'"),
        (torch.eye(2), {"side": "output"}, "side is 'output'"),
        ("nonsense", {}, "must be numbers"),
    ],
)
def test_invalid_embeddings_are_refused(given: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DtLensError, match=message):
        Embedding(given, **options)


def test_names_by_pattern(make_dt: Make) -> None:
    registry = make_dt().embeddings
    assert [e.name for e in registry.select("*_out")] == ["action_out", "state_out", "reward_out"]
    assert [e.name for e in registry.select(["reward_in", "reward_*"])] == ["reward_in", "reward_out"]
    assert len(registry.select()) == 7
    with pytest.raises(DtLensError, match="Did you mean 'action_out'"):
        registry.select(["state_in", "actions_out"])
    with pytest.raises(DtLensError, match="Did you mean 'state_in'"):
        registry["state_inn"]
