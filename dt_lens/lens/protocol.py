"""What every wrapped model offers, whichever architecture it has, and the checks that an object is one.

Everything in dt-lens after ``load`` or ``wrap`` uses a model through ``Lens``. What a model does, in units that can be
counted (an agent's episodes, windows of text), does not belong here but to ``dt_lens.behaviour``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from dt_lens.arguments import not_wrapped
from dt_lens.errors import DtLensError, a_type

if TYPE_CHECKING:
    from dt_lens.lens.embeddings import EmbeddingRegistry
    from dt_lens.lens.matrices import Structure


__all__ = [
    "Lens",
    "Reference",
    "is_wrapped",
    "require_agent",
    "require_running",
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
    """A wrapped model.

    Attributes:
        kind: what the model is, such as ``"decision transformer"`` or ``"language model"``: for messages and the heads
            of files. Code does not branch on it.
        can_run: whether it has a forward pass; ``False`` for one that was opened for its weights only.
        can_act: whether it chooses actions in an environment; otherwise it predicts text.
        cfg: sizes and options.
        original: the user's own model where this one shares its memory, or ``None``.
        reference: the original's activations, against which ``certify`` checks the weights, or ``None``.

    A model may have ``assumed`` too: the options that neither the checkpoint nor the user said, and what its adapter
    took for them, as ``dt_lens.lens.Options`` collects them.
    """

    kind: str
    can_run: bool
    can_act: bool
    cfg: Any
    reference: Reference | None

    @property
    def original(self) -> nn.Module | None:
        """See above."""
        ...

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


def is_wrapped(model: object) -> bool:
    """Whether an object is a ``Lens``, by what its class offers: asking the object would compute its properties."""
    return all(hasattr(type(model), name) for name in ("weights", "structure", "embeddings", "probe", "run_with_cache"))


def require_running(model: Any, caller: str) -> None:
    """Raise ``DtLensError`` unless ``model`` is a wrapped model that can run, which ``caller`` needs."""
    if not is_wrapped(model):
        raise not_wrapped(model, caller)
    if not model.can_run:
        raise DtLensError(
            "This model was opened for its weights only and cannot run; use dt_lens.load for one that can."
        )


def require_agent(model: Any, caller: str) -> None:
    """Raise ``DtLensError`` unless ``model`` is a wrapped model that acts in an environment, which ``caller`` needs."""
    wanted = f"{caller} takes a decision transformer from dt_lens.load or dt_lens.wrap"
    if not is_wrapped(model):
        raise DtLensError(f"{wanted}, not {a_type(model)}; wrap it first: dt_lens.wrap(model).")
    if not model.can_act:
        texts = ", and use evaluate for its texts" if model.can_run else ""
        raise DtLensError(f"{wanted}, not a {model.kind}; scan its weights{texts}.")
