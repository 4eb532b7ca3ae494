"""What the tests of all adapters ask: who recognises this, and is a wrong map noticed?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dt_lens.edits.singular import SingularEdit
from dt_lens.errors import DtLensError
from dt_lens.lens.adapters import adapter_names, named_adapter
from dt_lens.lens.checkpoints import Checkpoint


@pytest.fixture
def recognised_by() -> Callable[[Checkpoint | nn.Module], list[str]]:
    """The names of the installed adapters that take a checkpoint or a live model for their own."""
    return lambda source: [name for name in adapter_names() if named_adapter(name).recognises(source)]


@pytest.fixture
def edits_reach() -> Callable[..., None]:
    """Edits through a lens show in the user's own model, as they do in the lens, and are undone to the bit."""

    def check(lens: Any, original: Callable[[], Tensor], lensed: Callable[[], Tensor]) -> None:
        before = original()
        for matrix in ("blocks.0.mlp.W_in", "blocks.1.attn.W_K", "blocks.0.attn.W_O", "blocks.1.attn.OV.1"):
            with SingularEdit(lens, matrix, side="write" if "OV" in matrix else None):
                assert not torch.allclose(original(), before, atol=1e-5)
                torch.testing.assert_close(lensed(), original(), rtol=1e-5, atol=1e-5)
            assert torch.equal(original(), before)

    return check


def _exchanged(weights: dict[str, Tensor], b: str, one: str, other: str) -> None:
    weights[f"{b}.{one}"], weights[f"{b}.{other}"] = weights[f"{b}.{other}"], weights[f"{b}.{one}"]


def _flipped(weights: dict[str, Tensor], name: str) -> None:
    weights[name] = weights[name].flip(0)


def _scaled(weights: dict[str, Tensor], name: str) -> None:
    weights[name] = weights[name] * 1.001


def _transposed(weights: dict[str, Tensor], name: str) -> None:
    weights[name] = weights[name].mT.reshape(weights[name].shape)


MISTAKES: dict[str, tuple[Callable[..., None], tuple[str, ...], str]] = {
    "heads permuted in W_V": (_flipped, ("blocks.1.attn.W_V",), r"blocks\.1\.attn\.W_V"),
    "heads permuted in W_O": (_flipped, ("blocks.0.attn.W_O",), r"blocks\.0\.attn\.W_O"),
    "query and key exchanged": (_exchanged, ("blocks.0", "attn.W_Q", "attn.W_K"), r"blocks\.0\.attn\.W_Q"),
    "W_in read the wrong way": (_transposed, ("blocks.0.mlp.W_in",), r"blocks\.0\.mlp\.W_in"),
    "W_O read the wrong way": (_transposed, ("blocks.1.attn.W_O",), r"blocks\.1\.attn\.W_O"),
    "W_out rescaled": (_scaled, ("blocks.1.mlp.W_out",), r"blocks\.1\.mlp\.W_out"),
    "W_K rescaled": (_scaled, ("blocks.1.attn.W_K",), r"blocks\.1\.attn\.W_K"),
    "LayerNorms exchanged": (_exchanged, ("blocks.1", "ln1.w", "ln2.w"), r"block"),
    "the head rescaled": (_scaled, ("predict.action.W",), r"predict\.action\.W"),
    "the timestep table rescaled": (_scaled, ("embed.timestep.W",), r"embed\.timestep\.W"),
    "the return's embedding rescaled": (_scaled, ("embed.return_to_go.W",), r"embed\.return_to_go\.W"),
}


@pytest.fixture(params=MISTAKES)
def mistaken(request: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[type, Callable[[], Any]], None]:
    """Build a lens through a layout that maps one weight wrongly, which certify must refuse and name."""
    spoil, arguments, named = MISTAKES[request.param]

    def check(layout: Any, build: Callable[[], Any]) -> None:
        right = layout.canonical

        def wrong(self: Any, tensors: Any) -> dict[str, Tensor]:
            weights: dict[str, Tensor] = right(self, tensors)
            spoil(weights, *arguments)
            return weights

        build()
        monkeypatch.setattr(layout, "canonical", wrong)
        with pytest.raises(DtLensError, match=rf"certify: .*{named}.* does not reproduce its activation"):
            build()

    return check
