"""A hooked module whose weights are views of the user's own model's, so that both share their memory.

An edit made through the lens is then seen by the user's model, and a training step of the user's model by the lens.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.printing import agent_rows
from dt_lens.errors import DtLensError, nearest
from dt_lens.lens.hooks import HookedModule
from dt_lens.lens.placement import Configured
from dt_lens.lens.printing import Printed, Rows, Weights
from dt_lens.lens.protocol import Reference
from dt_lens.lens.weights import require_computable

__all__ = ["SharingModule"]


class SharingModule(Printed, Configured[HookedDecisionTransformerConfig], HookedModule):
    """A hooked module that may share another model's memory.

    Attributes:
        original: the user's own model if this one shares its memory, so that an edit here is seen there; a bundled
            agent's is made when it is first asked for.
        reference: the original's activations under canonical names, against which ``certify`` checks the weights.
        when_made: called with the original when it is made.
        identity: an id of this model alone, so that embeddings of two models are never mixed.
        assumed: the options and facts that neither the checkpoint nor the user said, and what was taken for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._original: nn.Module | None = None
        self._make_original: Callable[[], nn.Module] | None = None
        self.when_made: list[Callable[[nn.Module], object]] = []
        self.reference: Reference | None = None
        self.identity = uuid.uuid4().hex
        self.assumed: Mapping[str, Any] = {}
        self._original_weights: Callable[[], Mapping[str, Tensor]] | None = None

    def _shown(self) -> tuple[str, Rows]:
        return agent_rows(self)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Every weight by its canonical name, as live tensors: writing into one edits the model."""
        return Weights((name, parameter.detach()) for name, parameter in self.named_parameters())

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Use ``weights`` as this model's own, sharing their memory; every name and shape must fit.

        A weight may be any strided view, such as a transposed matrix of another model, or a part of a fused one.

        Raises:
            DtLensError: naming the first weight that is missing, unknown, of another shape, or not floating-point.
        """
        mine = dict(self.named_parameters())
        for name in weights:
            if name not in mine:
                raise DtLensError(f"The model has no weight {name!r}." + nearest(name, mine))
        for name, parameter in mine.items():
            if name not in weights:
                raise DtLensError(f"The weight {name!r} is missing.")
            if weights[name].shape != parameter.shape:
                raise DtLensError(
                    f"The weight {name!r} has shape {list(weights[name].shape)}; the configuration wants "
                    f"{list(parameter.shape)}."
                )
        require_computable(weights)
        for name, parameter in mine.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, nn.Parameter(weights[name].detach(), parameter.requires_grad))
        self._weights_moved()

    @property
    def original(self) -> nn.Module | None:
        """The user's own model, if this one shares its memory."""
        if self._original is None and self._make_original is not None:
            made = self._make_original()
            # Not registered as a submodule, which would list every weight twice.
            object.__setattr__(self, "_original", made)
            self._make_original = None
            for call in self.when_made:
                call(made)
        return self._original

    def look_at(
        self,
        original: nn.Module | Callable[[], nn.Module],
        weights: Callable[[], Mapping[str, Tensor]],
        reference: Reference | None,
    ) -> None:
        """Share the memory of ``original``. ``weights()`` returns views of its weights under canonical names.

        A function makes the original when it is first asked for.
        """
        self.adopt(weights())
        if isinstance(original, nn.Module):
            object.__setattr__(self, "_original", original)
        else:
            self._make_original = original
        self.reference, self._original_weights = reference, weights

    @contextmanager
    def tell_original(self, call: Callable[[nn.Module], object]) -> Iterator[None]:
        """Call ``call(original)`` now, if there is one, or as soon as it is made inside the context."""
        if self._original is not None:
            call(self._original)
        self.when_made.append(call)
        try:
            yield
        finally:
            self.when_made.remove(call)

    def require_shared(self, names: Sequence[str]) -> None:
        """Check that the original still shares the memory of these weights, so that an edit reaches it.

        Raises:
            DtLensError: naming the first weight that it does not share.
        """
        if self._original_weights is None:
            return
        theirs, mine = self._original_weights(), self.weights
        for name in names:
            if theirs[name].data_ptr() != mine[name].data_ptr():
                raise DtLensError(
                    f"The wrapped model no longer shares the weight {name!r}: it was moved, cast or loaded again after "
                    "dt_lens.wrap; wrap it again."
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharingModule:
        # Moving or casting the lens moves the original, and they still share their memory.
        if self.original is None or self._original_weights is None:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self._weights_moved()
        else:
            self.original._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self.adopt(self._original_weights())
        return self

    def _weights_moved(self) -> None:
        """Called when the weights have new memory."""
