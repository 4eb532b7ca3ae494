"""A decision transformer's own embeddings: which rows of which weight, under which names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dt_lens
from dt_lens.decision_transformer.facts import RunFacts


def test_the_seven_embeddings_are_the_weights(make_hf: Any) -> None:
    hf = make_hf()
    lens = dt_lens.wrap(hf)
    theirs = {
        "state_in": hf.embed_state.weight.T,
        "action_in": hf.embed_action.weight.T,
        "reward_in": hf.embed_return.weight.T,
        "timestep_in": hf.embed_timestep.weight,
        "action_out": hf.predict_action[0].weight,
        "state_out": hf.predict_state.weight,
        "reward_out": hf.predict_return.weight,
    }
    assert set(lens.embeddings) == set(theirs)
    for name, weight in theirs.items():
        embedding = lens.embeddings[name]
        assert torch.equal(embedding.directions, weight)
        assert embedding.directions.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        assert embedding.side == name.rsplit("_", 1)[1] and embedding.kind == name.rsplit("_", 1)[0]
        assert len(embedding.labels) == len(weight) and embedding.owner == lens.identity
        norm = hf.embed_ln if embedding.side == "in" else hf.encoder.ln_f
        assert torch.equal(embedding.layernorm, norm.weight)
    # A standard decision transformer trains only its actions.
    assert {name for name in theirs if not lens.embeddings[name].trained} == {"state_out", "reward_out"}
    assert list(lens.embeddings["timestep_in"].labels)[:2] == ["t=0", "t=1"]


def test_labels_come_from_the_facts_or_else_the_environment(make_hf: Any) -> None:
    hf = make_hf(state_dim=4, act_dim=2)
    plain = dt_lens.wrap(hf).embeddings
    assert plain["state_in"].labels[0] == "state 0" and plain["reward_in"].labels == ["return-to-go"]
    named = dt_lens.wrap(hf, environment="CartPole-v1").embeddings
    assert named["state_in"].labels[2] == named["state_out"].labels[2] == "pole angle"
    assert named["action_out"].labels == ["push left", "push right"]
    own = dt_lens.wrap(hf, environment="CartPole-v1", action_labels=["l", "r"]).embeddings
    assert own["action_in"].labels == ["l", "r"] and own["state_in"].labels[0] == "cart position"
    # An environment's labels that do not fit are not used.
    assert dt_lens.wrap(hf, environment="Hopper-v5").embeddings["state_in"].labels[0] == "state 0"


@pytest.mark.parametrize("heads", [("action", "state"), ("action", "return_to_go"), ("action", "reward")])
def test_trained_heads_are_the_facts(make_hf: Any, heads: tuple[str, ...]) -> None:
    lens = dt_lens.wrap(make_hf())
    lens.facts = RunFacts(20, trained_heads=heads)
    trained = {name.removesuffix("_out") for name in ("state_out", "reward_out") if lens.embeddings[name].trained}
    assert trained == {"reward" if head == "return_to_go" else head for head in heads[1:]}
