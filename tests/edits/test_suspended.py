"""An edit that is applied while others are suspended is in force without them."""

from __future__ import annotations

from typing import Any

import dt_lens
from dt_lens import SingularEdit
from dt_lens.edits import suspended
from dt_lens.lens.weights import weight_bytes

W_IN = "blocks.0.mlp.W_in"


def every_bit(model: Any) -> dict[str, bytes]:
    return {name: weight_bytes(weight) for name, weight in model.weights.items()}


def test_an_edit_inside_suspended_is_in_force_without_them(make_lm: Any) -> None:
    model = dt_lens.wrap(make_lm("gpt2"))
    before, alone = every_bit(model), SingularEdit(model, W_IN, 1)
    first, other = SingularEdit(model, W_IN, 0), SingularEdit(model, "blocks.1.mlp.W_out")
    with alone:
        only = every_bit(model)
    with first, other:
        during = every_bit(model)
        with suspended(model):
            with alone:
                assert every_bit(model) == only
            assert every_bit(model) == before
        assert every_bit(model) == during
        with suspended(model):
            first.undo()
            assert every_bit(model) == before
    assert every_bit(model) == before
