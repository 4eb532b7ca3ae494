"""While an edit is in force, the wrapped model's own ``save_pretrained`` refuses: the file would hold the edit."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

from dt_lens.errors import DtLensError
from dt_lens.lens.forward_mode import original_at_hand

if TYPE_CHECKING:
    from dt_lens.lens.protocol import Lens

__all__ = ["allow_saving", "refuse_saving"]


def refuse_saving(model: Lens) -> None:
    """Make ``save_pretrained`` of the models that share these weights ask for ``edited=True``."""
    for part in _saving(model):
        _refuse(part)
    when_made = getattr(model, "when_made", [])
    if _refuse not in when_made:  # edits may be nested, and the last one allows it again
        when_made.append(_refuse)


def _refuse(part: Any) -> None:
    # Past nn.Module.__setattr__. A bound method, so that a copy of the model gets one of its own.
    object.__setattr__(part, "save_pretrained", MethodType(save_pretrained, part))


def allow_saving(model: Lens) -> None:
    """Give them their own ``save_pretrained`` again."""
    for part in _saving(model):
        part.__dict__.pop("save_pretrained", None)
    when_made = getattr(model, "when_made", [])
    if _refuse in when_made:
        when_made.remove(_refuse)


def _saving(model: Lens) -> Iterator[Any]:
    for part in (original_at_hand(model), getattr(model, "model", None)):
        if callable(getattr(type(part), "save_pretrained", None)):
            yield part


def save_pretrained(self: Any, *args: Any, edited: bool = False, **options: Any) -> Any:
    """Hugging Face's ``save_pretrained``, if asked for with ``edited=True``.

    Raises:
        DtLensError: otherwise.
    """
    if not edited:
        raise DtLensError(
            "An edit of this model is in force, and would be saved with it; end the edit first, or pass edited=True to "
            "save the edited weights."
        )
    return type(self).save_pretrained(self, *args, **options)
