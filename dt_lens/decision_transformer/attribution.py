"""What an ``ActivationCache`` asks of a decision transformer: outputs are coordinates of the action, or actions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dt_lens.errors import DtLensError, as_written, nearest
from dt_lens.lens.activation_cache import Attribution

__all__ = ["ActionAttribution"]


class ActionAttribution(Attribution):
    """Attributes what the action head reads off each token; actions are predicted from the states' tokens."""

    readout = "predict.action.W"

    @property
    def embeds_plainly(self) -> bool:
        """False: a norm, or a timestep's row, stands between ``hook_embed`` and the first block."""
        return False

    if TYPE_CHECKING:
        cfg: Any

        @property
        def embeddings(self) -> Any: ...

    def not_a_sum(self, heads: bool) -> str | None:
        """Why the stream is not the sum of what sublayers add, if it is not."""
        if self.cfg.normalization != "post":
            return None
        return "This model's blocks normalise each sum, so the stream is not the sum of what its sublayers give"

    def output_ids(self, tokens: Any) -> Any:
        """The number of an action, or of a coordinate of it, given by its label; or of several."""
        labels = list(self.embeddings["action_out"].labels)

        def number(action: Any) -> Any:
            if isinstance(action, str) and action not in labels:
                near = nearest(action, labels) or f" It has {', '.join(map(repr, labels[:8]))}."
                raise DtLensError(f"The model predicts no action {as_written(action)}.{near}")
            return labels.index(action) if isinstance(action, str) else action

        if isinstance(tokens, list | tuple):
            return torch.tensor([number(one) for one in tokens])
        return number(tokens)
