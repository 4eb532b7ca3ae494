"""TODO docstring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from dt_lens.lens.embeddings import EmbeddingRegistry
    from dt_lens.lens.matrices import Structure


__all__ = [
    "Reference",
    "Lens",
]


@runtime_checkable
class Reference(Protocol):
    """The original model's own activations, so that ``certify`` proves the adapter and not merely the copy."""

    def activations(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """One forward pass of the original model: its activations under canonical hook names, heads split.

        ``certify`` wants, for every block, ``hook_resid_pre`` (and for the last ``hook_resid_post``), ``attn.hook_q``,
        ``hook_k``, ``hook_v``, ``hook_pattern``, ``hook_z``, ``hook_attn_out``, ``hook_resid_mid``, ``mlp.hook_pre``,
        ``hook_post`` and ``hook_mlp_out``; where there are LayerNorms, their outputs as ``blocks.{l}.attn_in`` and
        ``mlp_in``; and the embeddings and outputs that there are.
        """
        ...


@runtime_checkable
class Lens(Protocol):
    """A wrapped model. Everything in dt-lens after ``load`` or ``wrap`` uses these and nothing else of it."""

    cfg: Any
    original: nn.Module | None
    reference: Reference | None

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Live weights by canonical name, ``y = x @ W + b``; writing into one edits the model."""
        ...

    @property
    def structure(self) -> Structure:
        """Blocks, heads, and which LayerNorm stands before which matrix."""
        ...

    @property
    def embeddings(self) -> EmbeddingRegistry:
        """Named sets of labelled directions in the residual stream."""
        ...

    def probe(self, seed: int = 0) -> dict[str, Any]:
        """A small random batch that exercises every part of the model."""
        ...

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's ``run_with_cache``."""
        ...

    def hooks(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's context manager for hooks."""
        ...
