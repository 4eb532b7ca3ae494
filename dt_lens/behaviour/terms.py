"""``Terms``: what a task measures of each unit, and the words for it. Results need nothing else of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
from numpy.typing import DTypeLike, NDArray

from dt_lens.arguments import is_finite_number
from dt_lens.errors import DtLensError, nearest

__all__ = ["FailureRule", "Measure", "Terms", "with_article"]

Measure = Literal["real", "integer", "boolean"]
FailureRule = str | float | Callable[[pd.DataFrame], Any]
KINDS: dict[str, DTypeLike] = {"real": np.float64, "integer": np.int64, "boolean": np.bool_}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is measured of a unit, which way is better, what pairs two results, and what all of it is called.

    Plain values: a file keeps them, and whoever reads the file needs neither the task nor its model.

    Attributes:
        task: the task's name; results of one task only are paired.
        measures: the columns of a unit, in order, with their kinds: ``real``, ``integer`` or ``boolean``.
        outcome: which of them is compared, such as ``"return"``; a real one.
        better: whether ``"more"`` or ``"less"`` of it is better.
        unit: what one unit is called, such as ``"episode"``; the plural adds an ``s``.
        size: how large a unit is, in words after its plural, such as ``"of up to 128 tokens"``; may be empty.
        index: what a unit's number is called, such as ``"seed"``.
        scale: what the outcome is measured in, such as ``"nats per token"``; may be empty.
        digits: decimals to print the outcome with; ``None`` for as many as its size asks for.
        large: what counts as a large loss of outcome, in its own units; ``None`` for a tenth of the unedited model's
            mean, where shares of that mean say something.
        setting: what the measures depend on besides the model and the unit, as JSON values. Two results are paired
            only where it is equal.
        titles: words for names in ``setting``, for messages; by default the names with spaces.
        place: where the units come from, in words, for titles.
        actor: what is measured, in a word: ``"agent"``, ``"model"``.
        failures: the boolean measures that may count as failing, each with words for it.
        failure: what counts as failing: one of ``failures``, a number that the outcome is worse than, or a function of
            a result's ``to_frame()``; ``None`` if failing has no meaning here.
        failure_note: what to say where that rule is a guess; empty if it is not one.
        lasts: (the integer measure of how long a unit went on, the boolean one that says whether it ended of itself),
            for survival curves; ``None`` if units do not end.
        limit: how long a unit can go on; ``None`` without ``lasts``.
        step: what ``lasts`` counts, such as ``"step"``.

    Raises:
        DtLensError: for terms that do not fit together.
    """

    task: str
    measures: Mapping[str, Measure]
    outcome: str
    better: Literal["more", "less"] = "more"
    unit: str = "unit"
    size: str = ""
    index: str = "index"
    scale: str = ""
    digits: int | None = None
    large: float | None = None
    setting: Mapping[str, Any] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=dict)
    place: str = ""
    actor: str = "model"
    failures: Mapping[str, str] = field(default_factory=dict)
    failure: FailureRule | None = None
    failure_note: str = ""
    lasts: tuple[str, str] | None = None
    limit: int | None = None
    step: str = "step"

    def __post_init__(self) -> None:
        kinds = dict(self.measures)
        for name, kind in kinds.items():
            if not (isinstance(name, str) and name.isidentifier() and kind in KINDS):
                raise DtLensError(
                    f"The task {self.task!r} measures {name!r} of kind {kind!r}; a measure has a name without spaces "
                    f"and is one of {', '.join(KINDS)}."
                )
        if kinds.get(self.outcome) != "real":
            raise DtLensError(
                f"The task {self.task!r} compares {self.outcome!r}; its outcome must be one of its real measures: "
                f"{', '.join(name for name, kind in kinds.items() if kind == 'real') or 'it has none'}."
            )
        if self.large is not None and not (is_finite_number(self.large) and self.large > 0):
            raise DtLensError(
                f"large is {self.large!r} in the task {self.task!r}; it must be a number above 0, or None for a tenth "
                "of the unedited mean."
            )
        if self.better not in ("more", "less"):
            raise DtLensError(f"better is {self.better!r}; it must be 'more' or 'less'.")
        needed: dict[str, Measure] = dict.fromkeys(self.failures, "boolean")
        if self.lasts is not None:
            needed |= {self.lasts[0]: "integer", self.lasts[1]: "boolean"}
        for name, kind in needed.items():
            if kinds.get(name) != kind:
                raise DtLensError(f"The task {self.task!r} needs a {kind} measure called {name!r}; it has none.")
        if self.failure is not None:
            self.rule(self.failure)

    @property
    def units(self) -> str:
        """The plural of ``unit``."""
        return f"{self.unit}s"

    @property
    def outcomes(self) -> str:
        """The plural of ``outcome``.

        >>> Terms(task="text", measures={"loss": "real"}, outcome="loss").outcomes
        'losses'
        """
        return f"{self.outcome_name}{'es' if self.outcome.endswith('s') else 's'}"

    @property
    def outcome_name(self) -> str:
        """``outcome`` in words: without underscores."""
        return self.outcome.replace("_", " ")

    @property
    def lost(self) -> str:
        """Damage in two words: ``"return lost"``, ``"loss gained"``."""
        return f"{self.outcome_name} {'lost' if self.better == 'more' else 'gained'}"

    @property
    def indices(self) -> str:
        """The plural of ``index``.

        >>> Terms(task="text", measures={"loss": "real"}, outcome="loss").indices
        'indices'
        """
        return "indices" if self.index == "index" else f"{self.index}s"

    @property
    def sign(self) -> int:
        """1 where more of the outcome is better, -1 where less is: damage is ``sign`` times what was lost."""
        return 1 if self.better == "more" else -1

    @property
    def in_scale(self) -> str:
        """``scale`` as it follows a number, with a space before it; empty where it has no name."""
        return f" {self.scale}" if self.scale else ""

    @property
    def of_size(self) -> str:
        """``size`` as it follows the units, with a space before it; empty if there is none."""
        return f" {self.size}" if self.size else ""

    def arrays(self, columns: Mapping[str, Any] | pd.DataFrame, count: int) -> dict[str, NDArray[Any]]:
        """The measures in their order and types, ``[count]`` each.

        Raises:
            DtLensError: for a measure that is missing, or of another length.
        """
        found: dict[str, NDArray[Any]] = {}
        for name in self.measures:
            if name not in columns:
                raise DtLensError(f"The task {self.task!r} did not measure {name!r}, which its terms name.")
            column = np.asarray(columns[name])
            if column.shape != (count,):
                raise DtLensError(
                    f"The task {self.task!r} gave {list(column.shape)} values of {name!r}; it must give one for each "
                    f"of the {count} {self.units}."
                )
            found[name] = column.astype(self.dtype(name))
        return found

    def dtype(self, measure: str) -> DTypeLike:
        """The type of a measure's column."""
        return KINDS[self.measures[measure]]

    def named(self, setting: str) -> str:
        """The words for a name in ``setting``."""
        return self.titles.get(setting, setting.replace("_", " "))

    def rule(self, failure: Any) -> FailureRule:
        """``failure``, with a number as a ``float``, which files can keep.

        Raises:
            DtLensError: unless it is a failure rule of this task.
        """
        if callable(failure) or (isinstance(failure, str) and failure in self.failures):
            return cast("FailureRule", failure)
        if is_finite_number(failure):
            return float(failure)
        words = [repr(name) for name in self.failures]
        side = "fall below" if self.better == "more" else "rise above"
        raise DtLensError(
            f"failure is {failure!r}; it must be {', '.join([*words, f'{with_article(self.outcome)} to {side}'])}, "
            "or a function of the frame." + nearest(failure, self.failures)
        )

    @property
    def failure_rule(self) -> str:
        """The rule ``failure`` in words; empty if failing has no meaning."""
        if self.failure is None:
            return ""
        if callable(self.failure):
            return str(getattr(self.failure, "__name__", "a function"))
        if isinstance(self.failure, str):
            return self.failures[self.failure]
        return f"{self.outcome_name} {'below' if self.better == 'more' else 'above'} {self.failure:g}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a failure function is left out."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["failure"] = None if callable(self.failure) else self.failure
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Terms:
        """The inverse of ``to_dict``.

        Raises:
            DtLensError: for values that are not terms.
        """
        try:
            known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
            if known.get("lasts") is not None:
                first, second = known["lasts"]
                known["lasts"] = (str(first), str(second))
            for name in ("measures", "setting", "titles", "failures"):
                known[name] = dict(known.get(name) or {})
            return cls(**known)
        except (KeyError, TypeError, ValueError) as error:
            raise DtLensError(f"These are not the terms of a task: {error!r}.") from error


def with_article(word: str) -> str:
    """A word with its article.

    >>> with_article("episode"), with_article("window")
    ('an episode', 'a window')
    """
    return f"{'an' if word[:1] in 'aeiou' else 'a'} {word}"
