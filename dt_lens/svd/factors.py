"""Which factors the labels of a model's embeddings have: a checkpoint's own, those of tokens, or a user's table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dt_lens.arguments import local_path, names
from dt_lens.errors import DtLensError, a_type, as_written, because, nearest
from dt_lens.lens.embeddings import Embedding, EmbeddingRegistry
from dt_lens.svd.token_factors import token_factors

__all__ = ["Factors", "checked_level", "factors_of", "read_factors"]

Levels = Sequence[Any]  # one for each label; None where the factor does not apply


class Factors(NamedTuple):
    """The factors of one embedding.

    Attributes:
        tested: for each factor the level of every label.
        strata: likewise, of the factors that are held fixed.
        left_out: why a factor is not tested, by its name.
    """

    tested: dict[str, Levels]
    strata: dict[str, Levels]
    left_out: dict[str, str]


def factors_of(
    model: Any,
    registry: EmbeddingRegistry,
    given: Any = None,
    embeddings: Sequence[str] | str | None = None,
    only: Sequence[str] | str | None = None,
    strata: Sequence[str] | str | None = None,
) -> dict[str, Factors]:
    """The factors of each embedding that has any; ``dt_lens.clusters`` describes the arguments.

    Of an embedding without a factor to test, they say why each is left out.

    Raises:
        DtLensError: for a table that does not fit the labels, an unknown factor, and where there is none.
    """
    if given is None:
        found = _own(model, registry.select(embeddings))
    else:
        found = _of_table(given if isinstance(given, pd.DataFrame) else read_factors(given), registry, embeddings)
    only = None if only is None else _chosen(only, "only")
    strata = [] if strata is None else _chosen(strata, "strata")
    _require_known(found, [*(only or []), *strata])
    made = {name: _sorted_out(name, factors, only, strata, given is not None) for name, factors in found.items()}
    if not any(of.tested for of in made.values()):
        reasons = [reason for of in made.values() for reason in of.left_out.values()]
        raise DtLensError(
            "No factor is left to test" + (f": {reasons[0]}" if reasons else "; name others, or fewer strata.")
        )
    return made


def read_factors(file: Any) -> pd.DataFrame:
    """A table of factors from a .csv file: a column ``label``, and a column for each factor; empty cells do not apply.

    Raises:
        DtLensError: for a file that cannot be read, or that has no column ``label``.
    """
    if not isinstance(file, str | Path):
        raise DtLensError(f"factors is {a_type(file)}; it must be a DataFrame with a row per label, or a .csv file.")
    file = local_path(file, "factors")
    try:
        table = pd.read_csv(file, keep_default_na=False, dtype=str)
    except (OSError, ValueError) as error:
        raise DtLensError(f"The factors in {file} cannot be read: {because(error)}; give a .csv file.") from error
    if "label" not in table:
        raise DtLensError(f"{file} has no column 'label'; it needs one, and a column for each factor.")
    return table.astype(object).where(table != "", None)


def _own(model: Any, chosen: list[Embedding]) -> dict[str, dict[str, Levels]]:
    """The factors that the checkpoint carries, and those of tokens."""
    carried: Mapping[str, Mapping[str, Levels]] = getattr(getattr(model, "facts", None), "factors", None) or {}
    found: dict[str, dict[str, Levels]] = {}
    for embedding in chosen:
        if embedding.name in carried:
            found[embedding.name] = dict(carried[embedding.name])
            for name, levels in found[embedding.name].items():
                if len(levels) != len(embedding):
                    raise DtLensError(
                        f"The model's facts give the factor {name!r} {len(levels)} levels; {embedding.name} has "
                        f"{len(embedding)} labels, and each needs one."
                    )
        elif embedding.kind == "token":
            found[embedding.name] = dict(token_factors(list(embedding.labels)))
    if not found:
        raise DtLensError(
            "Nothing says what the labels of this model consist of; give factors=, a table with a row per label and a "
            "column per factor (on the command line --factors FILE.csv)."
        )
    return found


def _of_table(
    table: pd.DataFrame, registry: EmbeddingRegistry, embeddings: Sequence[str] | str | None
) -> dict[str, dict[str, Levels]]:
    """A user's factors, for every embedding that has exactly the table's labels."""
    by_label = table.set_index("label") if "label" in table else table
    by_label = by_label.set_axis([str(label) for label in by_label.index], axis=0)
    if not len(by_label.columns) or not len(by_label):
        raise DtLensError("The table of factors is empty; it needs a row per label and a column per factor.")
    columns = [str(column) for column in by_label.columns]
    if len(set(columns)) < len(columns):
        raise DtLensError(f"The table of factors has two columns of one name, of {', '.join(columns)}; rename one.")
    by_label = by_label.set_axis(columns, axis=1)
    chosen = registry.select(embeddings)
    if embeddings is None:
        given = set(by_label.index)
        shared = {one.name: len(given & set(one.labels)) for one in chosen}
        most = max(shared.values(), default=0)
        chosen = [one for one in chosen if shared[one.name] == most and most] or chosen[:1]
    return {one.name: _matched(by_label, one) for one in chosen}


def _matched(by_label: pd.DataFrame, embedding: Embedding) -> dict[str, Levels]:
    """The levels of an embedding's labels, in their order."""
    labels, given = list(embedding.labels), list(by_label.index)
    if labels != given:
        known, listed = set(labels), set(given)
        for label in given:
            if label not in known:
                raise DtLensError(f"{embedding.name} has no label {label!r}." + nearest(label, labels))
        missing = [label for label in labels if label not in listed]
        if missing:
            raise DtLensError(
                f"The table of factors lacks {len(missing)} of the {len(labels)} labels of {embedding.name}, such as "
                f"{missing[0]!r}; give a row for each, with empty cells where a factor does not apply."
            )
        if len(listed) < len(given):
            twice = next(label for label in given if given.count(label) > 1)
            raise DtLensError(f"The table of factors has two rows for the label {twice!r}; give one for each label.")
        by_label = by_label.loc[labels]
    return {name: [checked_level(value, name) for value in by_label[name].tolist()] for name in by_label.columns}


def checked_level(value: Any, factor: str) -> Any:
    """A level as it is; ``None`` for a missing one.

    Raises:
        DtLensError: for what cannot be told apart from other levels by ``==`` and a hash, such as a list or an array.
    """
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    try:
        if hasattr(value, "__array__") and not isinstance(value, np.generic):
            raise TypeError
        hash(value)
        return None if value != value else value
    except (TypeError, ValueError):
        raise DtLensError(
            f"The factor {factor!r} has the level {as_written(value)}; a level must be text, a number or another plain "
            "value, and None where the factor does not apply."
        ) from None


def _chosen(value: Any, argument: str) -> list[str]:
    return list(dict.fromkeys(names(value, argument)))


def _require_known(found: Mapping[str, Mapping[str, Levels]], wanted: Iterable[str]) -> None:
    known = list(dict.fromkeys(name for factors in found.values() for name in factors))
    for name in wanted:
        factor, level = _parts(known, name)
        if level is None and factor in known:
            continue
        if level is None:
            factor = name.partition("=")[0]
            raise DtLensError(f"There is no factor {factor!r}; there are {', '.join(known)}." + nearest(factor, known))
        levels = sorted({str(one) for factors in found.values() for one in factors.get(factor, ()) if one is not None})
        if level not in levels:
            raise DtLensError(
                f"The factor {factor!r} has no level {level!r}; it has {', '.join(levels[:20])}."
                + nearest(level, levels)
            )


def _sorted_out(
    embedding: str, factors: Mapping[str, Levels], only: list[str] | None, strata: list[str], strict: bool
) -> Factors:
    """The factors that are tested, and why others are not; with ``strict`` one that cannot be is an error."""
    held = {name: _of_name(factors, name) for name in strata if _parts(factors, name)[0] in factors}
    if len(held) < len(strata):
        lacking = " and ".join(repr(_parts(factors, name)[0]) for name in strata if name not in held)
        why = f"The labels of {embedding} have no factor {lacking}, which is held fixed; they are not tested."
        return Factors({}, {}, dict.fromkeys(factors, why))
    tested: dict[str, Levels] = {}
    left_out: dict[str, str] = {}
    for name in list(factors) if only is None else only:
        if _parts(factors, name)[0] not in factors or name in held:
            continue
        levels = _of_name(factors, name)
        wrong = _fault(name, levels, held)
        if wrong and (only is not None or (strict and not held)):
            raise DtLensError(wrong)
        if wrong:
            left_out[name] = wrong
        else:
            tested[name] = levels
    return Factors(tested, held, left_out)


def _parts(factors: Iterable[str], name: str) -> tuple[str, str | None]:
    """The factor and the level of ``factor=level``; no level for a factor (its own name may hold ``=``), or neither."""
    known = list(factors)
    if name in known:
        return name, None
    factor = max((one for one in known if name.startswith(f"{one}=")), key=len, default=None)
    return (name, None) if factor is None else (factor, name[len(factor) + 1 :])


def _of_name(factors: Mapping[str, Levels], name: str) -> Levels:
    """A factor, or for ``factor=level`` whether a label has this level."""
    factor, level = _parts(factors, name)
    if level is None:
        return factors[factor]
    return [None if one is None else str(one) == level for one in factors[factor]]


def _fault(name: str, levels: Levels, strata: Mapping[str, Levels]) -> str:
    """Why a factor cannot be tested; an empty text if it can."""
    counts: dict[Any, int] = {}
    for level in levels:
        if level is not None:
            counts[level] = counts.get(level, 0) + 1
    if not counts:
        return f"The factor {name!r} applies to no label; give each label that it applies to a level."
    if len(counts) == 1:
        rest = len(levels) - sum(counts.values())
        all_of = (
            f"and {rest} without; give those another level, such as 'other'" if rest else "and no other; leave it out"
        )
        return f"The factor {name!r} has one level, {next(iter(counts))!r}, {all_of}."
    if len(counts) == sum(counts.values()):
        return f"The factor {name!r} has a level of its own for each label, so it gathers none; leave it out."
    if len(counts) == 2 and min(counts.values()) < 2:
        lone = min(counts, key=lambda level: counts[level])
        return f"Only one label has the level {lone!r} of the factor {name!r}; a cluster needs two."
    if strata:
        within: dict[tuple[Any, ...], set[Any]] = {}
        for level, *where in zip(levels, *strata.values(), strict=True):
            if level is not None and None not in where:
                within.setdefault(tuple(where), set()).add(level)
        if not any(len(found) > 1 for found in within.values()):
            return f"The factor {name!r} has one level in each stratum of {', '.join(strata)}; leave it out."
    return ""
