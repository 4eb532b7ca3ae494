"""The check of shapes that ``tests/conftest.py`` puts around the modules that have them in their annotations."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from dt_lens.svd.decomposition import Decomposition, blocks_of


@pytest.mark.parametrize("test", ["the first", "the next"])
def test_a_wrong_shape_is_noticed_in_the_first_calls_of_each_test(test: str) -> None:
    right = torch.tensor([3.0, 1.0])
    assert blocks_of(right, torch.zeros(2)) == ((0, 1), (1, 2))
    for _ in range(19):
        with pytest.raises(TypeCheckError, match="sigma"):
            blocks_of(right[None], torch.zeros(2))


def test_a_wrong_shape_in_a_result_is_noticed() -> None:
    parts = {name: torch.zeros(2, 2, 2) for name in Decomposition.__dataclass_fields__}
    with pytest.raises(TypeCheckError, match="sigma"):
        Decomposition(**parts)  # type: ignore[arg-type]
