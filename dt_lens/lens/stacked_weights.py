"""The weights of all blocks as one tensor, under TransformerLens's names: ``model.W_in [layer, d_model, d_mlp]``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

__all__ = ["StackedWeights"]

# TransformerLens's names; where in a block they are.
IN_BLOCKS = {
    **dict.fromkeys(("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"), "attn"),
    **dict.fromkeys(("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out"), "mlp"),
}
ALONE = {"W_E": "embed", "W_pos": "pos_embed", "W_U": "unembed", "b_U": "unembed"}


class StackedWeights:
    """Gives a wrapped model ``W_in``, ``W_Q``, ``W_E``, ... as attributes; those that it lacks it does not have.

    Those of blocks are stacked, ``[layer, ...]``, which copies them: writing into one edits nothing. Those outside of
    blocks are the live weights; ``b_U`` is zero where a model with an unembedding has none, as in TransformerLens.
    """

    if TYPE_CHECKING:

        @property
        def weights(self) -> Mapping[str, Tensor]: ...

    def __getattr__(self, name: str) -> Any:
        if name in ALONE or name in IN_BLOCKS:
            weights = self.weights
            if name in ALONE:
                found = weights.get(f"{ALONE[name]}.{name}")
                if found is not None:
                    return found
                if name == "b_U" and "unembed.W_U" in weights:
                    return torch.zeros_like(weights["unembed.W_U"][0])
            else:
                end = f".{IN_BLOCKS[name]}.{name}"
                rows = [weight for key, weight in weights.items() if key.startswith("blocks.") and key.endswith(end)]
                if rows:
                    return torch.stack(rows)
        return super().__getattr__(name)  # type: ignore[misc]
