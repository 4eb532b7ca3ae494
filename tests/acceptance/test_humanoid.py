"""An agent that other people trained with kzl's code: load it, scan it, run it, edit it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import dt_lens
from dt_lens import SingularEdit, WeightSVD

pytestmark = pytest.mark.acceptance

SEEDS = [0, 1, 2, 3, *range(10, 18)]  # those that the return was measured on
MEASURED = 3826.0  # mean of twelve at target 6,000, from 1,685 to 5,483; a random policy's is 98


def test_a_real_humanoid(real_checkpoints: Callable[[str], Path]) -> None:
    file = real_checkpoints("kzl-humanoid/humanoid.ckpt")
    lens = dt_lens.load(file, n_heads=1, environment="Humanoid-v4", target_returns=[6000.0])
    table = WeightSVD(lens, rank=16).scan()
    assert {"state_in", "action_out"} <= set(table["embedding"])
    assert (table["q_value"] < 0.05).any()
    base = dt_lens.evaluate(lens, episodes=18, seed=0)
    returns = base.to_frame().set_index("seed")["return"]
    # It falls near step 300 or runs to 1,000, so twelve episodes' mean has a standard error near 400.
    assert returns[SEEDS].mean() == pytest.approx(MEASURED, abs=1300)
    with SingularEdit(lens, "blocks.0.mlp.W_in", sv=slice(0, 32), value="zero"):
        edited = dt_lens.evaluate(lens, episodes=4, seed=0)
    again = dt_lens.evaluate(lens, episodes=4, seed=0)
    assert edited.model_id != base.model_id == again.model_id
    assert list(again.to_frame()["return"]) == list(returns.iloc[:4])  # the same to the last bit
    assert edited.to_frame()["return"].mean() < returns.iloc[:4].mean()
