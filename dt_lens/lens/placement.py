"""Where a model's weights are, and in which type: TransformerLens's ``cfg.device`` and ``cfg.dtype``."""

from __future__ import annotations

import copy
import weakref
from typing import Any, Generic, Self, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["Configured", "Placed"]


class Placed:
    """A configuration that says where the model which it is of has its weights, also after ``model.to(...)``."""

    def placed(self, model: Configured[Any]) -> Self:
        """A copy of the configuration that is this model's."""
        found = copy.copy(self)
        object.__setattr__(found, "_model", weakref.ref(model))
        return found

    def owner(self) -> Any:
        """The model that this is the configuration of, or ``None``."""
        found = self.__dict__.get("_model")
        return None if found is None else found()

    @property
    def device(self) -> torch.device | None:
        """Where the model's weights are now; ``None`` for a configuration by itself."""
        model = self.owner()
        return None if model is None else model.first_weight().device

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the model's weights now; ``None`` for a configuration by itself."""
        model = self.owner()
        return None if model is None else model.first_weight().dtype

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_model"}  # a copy is of no model


C = TypeVar("C", bound=Placed)


class Configured(Generic[C]):
    """A model whose configuration says where the model is."""

    @property
    def cfg(self) -> C:
        """Sizes and options; ``cfg.device`` and ``cfg.dtype`` are those of the weights now."""
        if "_cfg" not in self.__dict__:  # not made yet; hasattr must be able to ask
            raise AttributeError("The model has no configuration yet.")
        held = cast(C, self.__dict__["_cfg"])
        if held.owner() is not self:  # a new model, or one that was copied or unpickled
            held = self.__dict__["_cfg"] = held.placed(self)
        return held

    @cfg.setter
    def cfg(self, cfg: C) -> None:
        self.__dict__["_cfg"] = cfg

    def first_weight(self) -> Tensor:
        """A weight that stands for all of them."""
        model: Any = self
        found: Tensor = next(model.parameters())
        return found
