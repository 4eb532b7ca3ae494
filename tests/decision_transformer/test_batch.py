"""A batch that does not fit is refused in one sentence, whichever tensor is wrong; a random batch fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dt_lens.decision_transformer.batch import random_batch, require_batch
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.errors import DtLensError

CFG = HookedDecisionTransformerConfig(5, 3, d_model=8, n_heads=2, n_layers=1, d_mlp=8, n_ctx=4, max_ep_len=20)


def good() -> dict[str, Any]:
    return random_batch(CFG, (5,), torch.zeros(1), 0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("states", torch.zeros(4, 4, 6), r"states has shape \[4, 4, 6\]; .* wants \[4, 4, 5\]"),
        ("states", torch.zeros(4, 5), r"states has shape \[4, 5\]"),
        ("states", torch.zeros(4, 4, 5, dtype=torch.long), r"states has shape .* wants \[4, 4\]"),
        ("states", torch.full((4, 4), 5), r"state ids run from 5 to 5; this model has rows 0 to 4 for them\.$"),
        ("actions", torch.zeros(4, 4), r"actions has shape \[4, 4\]; .* wants \[4, 4, 3\]"),
        ("actions", torch.zeros(4, 4, 3, dtype=torch.long), r"actions has shape .* wants \[4, 4\]"),
        ("actions", torch.full((4, 4), 3), r"action ids run from 3 to 3; this model has rows 0 to 2 for them\.$"),
        ("returns_to_go", torch.zeros(4, 4), r"wants \[4, 4, 1\]"),
        ("timesteps", torch.zeros(4, dtype=torch.long), r"timesteps has shape \[4\]; this model wants \[batch, step\]"),
        ("timesteps", torch.zeros(4, 4), r"timesteps are float32; they must be whole numbers\.$"),
        ("timesteps", torch.full((4, 4), 20), r"timesteps run from 20 to 20; this model has rows 0 to 19 for them\.$"),
        ("timesteps", torch.full((4, 4), -1), r"timesteps run from -1 to -1"),
        ("actions", torch.zeros(4, 2, 3), r"actions has shape \[4, 2, 3\]; .* wants \[4, 4, 3\]"),
        ("actions", torch.zeros(4, 4, 4), r"actions has shape \[4, 4, 4\]"),
        ("attention_mask", torch.ones(4, 5), r"attention_mask has shape \[4, 5\]; .* wants \[4, 4\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, value: torch.Tensor, message: str) -> None:
    require_batch(CFG, **good())
    with pytest.raises(DtLensError, match=message):
        require_batch(CFG, **{**good(), name: value})


def test_a_padding_action_is_one_more_id_or_one_more_column() -> None:
    cfg = replace(CFG, action_padding=True)
    for actions in (torch.full((4, 4), 3), torch.zeros(4, 4, 4), torch.zeros(4, 4, 3), torch.zeros(4, 3, 4)):
        require_batch(cfg, **{**good(), "actions": actions})
    with pytest.raises(DtLensError, match="action ids run from 4 to 4; this model has rows 0 to 3"):
        require_batch(cfg, **{**good(), "actions": torch.full((4, 4), 4)})


def test_what_may_be_missing() -> None:
    """The last action, the mask, all rows, and states that a state encoder checks: accepted, and the model runs."""
    model, batch = HookedDecisionTransformer(CFG), good()
    short = {**batch, "actions": batch["actions"][:, :-1]}
    no_mask = {name: x for name, x in batch.items() if name != "attention_mask"}
    for accepted in (short, no_mask, {name: x[:0] for name, x in batch.items()}):
        require_batch(CFG, **accepted)
        assert model(**accepted).action_preds.shape == (len(accepted["timesteps"]), 4, 3)
    pictures = {**batch, "states": torch.zeros(4, 4, 1, 2, 2)}
    with pytest.raises(DtLensError, match="states has shape"):
        require_batch(CFG, **pictures)
    require_batch(CFG, **{**pictures, "states": None})


@settings(deadline=None)
@given(
    n_ctx=st.integers(1, 12),
    max_ep_len=st.integers(1, 12),
    n_position=st.integers(2, 40),
    position=st.sampled_from(["none", "constant", "learned", "step"]),
    discrete=st.booleans(),
    padding=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_random_batch_fits(
    n_ctx: int, max_ep_len: int, n_position: int, position: Any, discrete: bool, padding: bool, seed: int
) -> None:
    cfg = HookedDecisionTransformerConfig(
        2, 3, d_model=4, n_layers=1, d_mlp=4, n_ctx=n_ctx, max_ep_len=max_ep_len, position=position,
        n_position=n_position, discrete_actions=discrete, action_padding=padding,
    )  # fmt: skip
    batch = random_batch(cfg, (2,), torch.zeros(1, dtype=torch.float16), seed)
    require_batch(cfg, **batch)
    steps = batch["timesteps"].shape[1]
    acted = batch["actions"].shape[1]
    assert steps - acted in (0, 1) and 1 <= steps <= n_ctx
    assert position != "learned" or 2 * steps + acted <= n_position
    assert position != "step" or steps <= n_position
    assert acted == steps or (position == "learned" and n_position in (2, 5, 8))
    assert batch["states"].dtype == torch.float16 and batch["actions"].shape[2] == 3 + padding
    assert ("attention_mask" in batch) == (acted == steps)
    assert acted < steps or batch["attention_mask"].sum(1).min() > 0
    again = random_batch(cfg, (2,), torch.zeros(1, dtype=torch.float16), seed)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
