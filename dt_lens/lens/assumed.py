"""What was assumed of a model because neither its checkpoint nor the user says it.

A wrong assumption gives wrong numbers and no error, so that an adapter lists all of them: in the model's ``repr``, in
``certify``'s result, and on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Options", "assumed_text", "notes"]


class Options(dict[str, Any]):
    """What a file, a live model and the user say of a model; an adapter asks it for everything else by ``assume``.

    Attributes:
        assumed: the options that nobody said, and the values that were taken for them.
    """

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        super().__init__(values or {})
        self.assumed: dict[str, Any] = {}

    def assume(self, name: str, value: Any) -> Any:
        """The value of ``name`` if somebody said it; else ``value``, which is then listed as assumed.

        >>> options = Options({"n_heads": 2})
        >>> options.assume("n_heads", 1), options.assume("act_fn", "relu"), options.assumed
        (2, 'relu', {'act_fn': 'relu'})
        """
        if name not in self:
            self.assumed[name] = value
        return self.get(name, value)

    def over(self, values: Mapping[str, Any]) -> Options:
        """These options, and ``values`` for what they do not say; both have one list of what is assumed."""
        merged = Options({**values, **self})
        merged.assumed = self.assumed
        return merged


def assumed_text(assumed: Mapping[str, Any]) -> str:
    """Assumed options as they would be passed.

    >>> assumed_text({"act_fn": "relu", "context": 20})
    "act_fn='relu', context=20"
    """
    return ", ".join(f"{name}={value!r}" for name, value in assumed.items())


def notes(model: Any) -> tuple[str, ...]:
    """Sentences that everybody who uses this model should know: what was assumed, and what its run facts say of it."""
    said = tuple(getattr(getattr(model, "facts", None), "notes", ()))
    if not getattr(model, "assumed", {}):
        return said
    listed = (
        f"The checkpoint does not say these, so they are assumed: {assumed_text(model.assumed)}; if one is wrong, pass "
        "the right one to load or wrap (-g NAME=VALUE on the command line)."
    )
    return (listed, *said)
