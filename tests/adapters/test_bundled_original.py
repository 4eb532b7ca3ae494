"""Bundled agents: Hugging Face's class is made when it is asked for, and is then what it is for any other agent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dt_lens
from dt_lens import DtLensError, SingularEdit
from dt_lens.lens.forward_mode import evaluating, original_at_hand


def actions(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch).action_preds
    return found[batch["attention_mask"].bool()] if "attention_mask" in batch else found


@pytest.mark.parametrize("name", ["hopper", "taxi", "doorkey", "unlockpickup"])
def test_each_is_certified_against_hugging_faces_class(name: str) -> None:
    agent = dt_lens.load(name)
    assert original_at_hand(agent) is None
    certificate = dt_lens.certify(agent)
    assert certificate.against == "the original model" and certificate.worst < 2e-5
    assert type(agent.original).__name__ == "DecisionTransformerModel" and agent.original is agent.original


def test_it_shares_the_memory_of_the_lens_whenever_it_is_made(tmp_path: Path) -> None:
    agent = dt_lens.load("hopper")
    batch = agent.probe(0)
    before = actions(agent, batch)
    with SingularEdit(agent, "blocks.1.mlp.W_in"):
        assert original_at_hand(agent) is None
        edited = actions(agent.original, batch)
        torch.testing.assert_close(edited, actions(agent, batch), rtol=1e-4, atol=1e-5)
        assert float((edited - before).abs().max()) > 1e-3
        with pytest.raises(DtLensError, match="An edit of this model is in force"):
            agent.original.save_pretrained(tmp_path)
    agent.original.save_pretrained(tmp_path)
    torch.testing.assert_close(actions(agent.original, batch), before, rtol=1e-4, atol=1e-5)
    with SingularEdit(agent, "blocks.1.mlp.W_in"):
        torch.testing.assert_close(actions(agent.original, batch), edited, rtol=1e-4, atol=1e-5)


def test_it_can_be_saved_after_nested_edits(tmp_path: Path) -> None:
    agent = dt_lens.load("hopper", check=False)
    with SingularEdit(agent, "blocks.1.mlp.W_in"), SingularEdit(agent, "blocks.0.mlp.W_in"):
        assert original_at_hand(agent) is None
    agent.original.save_pretrained(tmp_path)


def test_a_lens_that_is_moved_first_takes_it_along() -> None:
    agent = dt_lens.load("hopper").double()
    assert agent.original.dtype == torch.float64 and not agent.original.training
    with SingularEdit(agent, "blocks.0.attn.W_Q.0"):  # a part of a fused weight: refused if it were not shared
        pass
    assert dt_lens.certify(agent).worst < 1e-9


def test_passes_of_it_are_refused_while_there_are_hooks_also_if_it_is_made_there() -> None:
    agent = dt_lens.load("hopper")
    batch = agent.probe(0)
    with agent.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: x)]):
        agent(**batch)
        with pytest.raises(DtLensError, match="Hooks act on the model"):
            agent.original(**batch)
    agent.original(**batch)
    with evaluating(agent):
        assert not agent.original.training
