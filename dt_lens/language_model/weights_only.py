"""A language model's weights without the model: what a scan needs of a checkpoint that is bigger than memory."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import Tensor

from dt_lens.errors import DtLensError
from dt_lens.language_model.config import LanguageModelConfig
from dt_lens.language_model.embeddings import language_model_embeddings
from dt_lens.language_model.family import Family
from dt_lens.language_model.labels import token_labels
from dt_lens.language_model.layout import Stored
from dt_lens.lens.embeddings import EmbeddingRegistry
from dt_lens.lens.matrices import Structure
from dt_lens.lens.placement import Configured
from dt_lens.lens.printing import Printed, Rows
from dt_lens.lens.shards import LazyTensors, Shards

__all__ = ["WeightsOnly"]


class WeightsOnly(Printed, Configured[LanguageModelConfig]):
    """A checkpoint whose weights are read from its files on access; it cannot run.

    ``WeightSVD``, ``scan``, ``top``, token tables and ``compare`` take it like any wrapped model. Its layout is not
    certified, which would take a forward pass; the tests certify tiny models of the same classes.

    Attributes:
        cfg: sizes and options.
        weights: read-only, by canonical name; each is read from its file at every access.
        tokenizer: the one beside the weights, if any.
        identity: unique to this model.

    Raises:
        DtLensError: naming a tensor that is missing, unknown, or of a shape that does not fit the configuration.
    """

    kind = "language model"
    can_run = can_act = False
    original = None
    reference = None

    def __init__(self, family: Family, shards: Shards, tokenizer: Any = None) -> None:
        self.cfg = family.config(shards.config)
        self.shards, self.tokenizer = shards, tokenizer
        self.identity = uuid.uuid4().hex
        layout = family.layout(self.cfg)
        own = layout.require(shards.shapes)
        self._weights = LazyTensors({name: _reader(shards, at, own[at.key]) for name, at in layout.entries.items()})
        self._embeddings: EmbeddingRegistry | None = None
        if not self.first_weight().is_floating_point():
            raise DtLensError(
                f"The weights in {shards.folder} are not floating-point numbers; quantised weights cannot be read."
            )

    def first_weight(self) -> Tensor:
        """A small weight, which stands for all of them."""
        return self._weights[next(name for name in self._weights if name.endswith(".w"))]

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Every weight by its canonical name, as a view of the file."""
        return self._weights

    @property
    def structure(self) -> Structure:
        """Blocks, heads, and which norm stands before which matrix."""
        return self.cfg.structure

    @property
    def embeddings(self) -> EmbeddingRegistry:
        """``token_in``, ``token_out`` and, where positions are learned, ``position_in``; you may add sets."""
        if self._embeddings is None:
            labels = token_labels(self.tokenizer, self.cfg.d_vocab) if self.tokenizer is not None else ()
            self._embeddings = language_model_embeddings(
                self._weights, self.cfg.d_model, self.identity, labels, self.structure
            )
        return self._embeddings

    def _cannot_run(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise DtLensError(
            "This model was opened for its weights only and cannot run; use dt_lens.load for one that can."
        )

    __call__ = probe = run_with_cache = run_with_hooks = hooks = certify = _cannot_run

    def _shown(self) -> tuple[str, Rows]:
        cfg = self.cfg
        title = (
            f"WeightsOnly: {cfg.family}, {cfg.n_layers} layers x {cfg.n_heads} heads, d_model {cfg.d_model}, "
            f"d_mlp {cfg.d_mlp}, vocabulary {cfg.d_vocab:,}; it cannot run"
        )
        read = f"{len(self._weights)} tensors, read at access from {self.shards.folder}"
        return title, [("weights", read), ("next", "dt_lens.WeightSVD(model), dt_lens.compare(model, other)")]


def _reader(shards: Shards, at: Stored, key: str) -> Callable[[], Tensor]:
    return lambda: shards.read(key, lambda file: at.read(file, key))
