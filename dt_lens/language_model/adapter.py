"""The adapter of a language model, made from a family's declaration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from dt_lens.arguments import refuse_unknown
from dt_lens.language_model.family import Family
from dt_lens.language_model.original import config_values, original
from dt_lens.language_model.tokenizer import tokenizer_in
from dt_lens.lens.checkpoints import Checkpoint

if TYPE_CHECKING:
    from dt_lens.language_model.model import HookedLanguageModel
    from dt_lens.language_model.weights_only import WeightsOnly
    from dt_lens.lens.shards import Shards

__all__ = ["LanguageModelAdapter"]


class LanguageModelAdapter:
    """An adapter made from a family's declaration; a subclass names the family.

    Attributes:
        name: the adapter's name, which ``adapter=`` takes.
        family: the declaration; ``open_checkpoint`` reads weights by it without building a model.
    """

    name: ClassVar[str]
    family: ClassVar[Family]

    def recognises(self, source: Checkpoint | nn.Module) -> bool:
        if isinstance(source, nn.Module):
            return any(base.__name__ in self.family.architectures for base in type(source).__mro__)
        return self.family.recognises(source.config, source.tensors)

    def load(self, checkpoint: Checkpoint, **given: Any) -> HookedLanguageModel:
        """The lens over Hugging Face's own class, filled with the checkpoint's tensors without a copy.

        Args:
            given: ``tokenizer=``; by default the one whose files are in the folder, if any.
        """
        refuse_unknown(given, {"tokenizer"})
        model = original(self.family, checkpoint)
        if "tokenizer" not in given and checkpoint.folder is not None:
            given["tokenizer"] = tokenizer_in(checkpoint.folder)
        return self.wrap(model, **given)

    def open(self, shards: Shards, **given: Any) -> WeightsOnly:
        """The weights alone, each read from its file when it is used.

        Args:
            given: ``tokenizer=``, as for ``load``.
        """
        from dt_lens.language_model.weights_only import WeightsOnly

        refuse_unknown(given, {"tokenizer"})
        tokenizer = given["tokenizer"] if "tokenizer" in given else tokenizer_in(shards.folder)
        return WeightsOnly(self.family, shards, tokenizer)

    def opens(self, shards: Shards) -> bool:
        """Whether these files hold a model of the family."""
        return self.family.recognises(shards.config, shards.files)

    def wrap(self, model: nn.Module, *, tokenizer: Any = None, **given: Any) -> HookedLanguageModel:
        """The lens on a live model, on the model's own memory."""
        from dt_lens.language_model.model import HookedLanguageModel

        refuse_unknown(given, {"tokenizer"})
        cfg = self.family.config(config_values(model))
        return HookedLanguageModel(model, self.family, cfg, tokenizer)
