"""Figures of what directions gather: which factor, and where on a world's grid."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from dt_lens.arguments import is_finite_number, require_offers, whole_number
from dt_lens.errors import DtLensError, as_written
from dt_lens.lens.matrices import SideName
from dt_lens.report.factors import factor_heatmap, grid_panels
from dt_lens.report.options import require_level, sized, titled
from dt_lens.svd.factors import checked_level

if TYPE_CHECKING:
    import pandas as pd

    from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["plot_factors", "plot_grid"]

PANELS = 60  # at most


def plot_factors(
    table: pd.DataFrame,
    *,
    alpha: float = 0.05,
    most: int = 40,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
) -> go.Figure:
    """Which directions sort labels by which factors.

    Args:
        table: what ``clusters`` returned, or some of its rows.
        alpha: the false discovery rate up to which a direction has a dot, at its factor.
        most: how many directions to show at most, those of smallest p.
        title: of the figure, in place of its own.
        width, height: of the figure in pixels, in place of its own; a figure without a width is as wide as the page.

    Returns:
        a plotly ``Figure``: a row per direction, a column per factor, coloured by the factor's own p.

    Raises:
        DtLensError: for something that is not the table of ``clusters``, or an option out of range.
    """
    require_offers(table, "table", "the table of clusters", "columns", "groupby")
    require_level(alpha)
    most = whole_number(most, "most", 1)
    missing = [
        name for name in ("matrix", "side", "sv", "embedding", "factor", "p_value", "q_value") if name not in table
    ]
    if missing:
        raise DtLensError(f"table has no column {missing[0]!r}; give the table of clusters.")
    known = [str(name) for name in table.columns]
    factors = [name.removeprefix("effect_") for name in known if name.startswith("effect_")]
    factors = [name for name in factors if f"p_{name}" in known]
    title = titled(title, "By which factor does a direction sort labels?")
    return sized(factor_heatmap(table, factors, alpha=alpha, most=most, title=title), width, height)


def plot_grid(
    svd: WeightSVD,
    matrix: str,
    sv: int = 0,
    side: SideName | None = None,
    *,
    embedding: str = "state_in",
    factors: Mapping[str, Sequence[Any]] | None = None,
    limit: float | None = None,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
) -> go.Figure:
    """A direction's cosines with states, each at its place in the world.

    The grid is that of the factors ``row`` and ``column``, with one panel for each level of the others: for a taxi 5 x
    5 places, by passenger and destination. Where states are what is seen in the cells of a view (``cell``, as in
    MiniGrid), the grid is the view, with the agent below its middle, looking up, and one panel for each thing that may
    be seen.

    Args:
        svd: the decompositions.
        matrix: its name.
        sv: the direction.
        side: by default the one the embedding is compared with in ``scan``.
        embedding: its name.
        factors: for each factor, its level for every label; by default the model's own.
        limit: the colours range from ``-limit`` to ``limit``; by default to the largest |cosine|. Give the same limit
            to figures that will be compared.
        title: of the figure, in place of its own.
        width, height: of the figure in pixels, in place of its own; a figure without a width is as wide as the page.

    Returns:
        a plotly ``Figure``.

    Raises:
        DtLensError: as ``WeightSVD.cosines`` does; if there are no such factors, or they are not of these labels; or
            for an option out of range.
    """
    require_offers(svd, "svd", "a WeightSVD", "cosines", "registry", "scan")
    sv = whole_number(sv, "sv", 0)
    if limit is not None and not (is_finite_number(limit) and limit > 0):
        raise DtLensError(f"limit is {as_written(limit)}; it must be a number above 0, or None.")
    cosines = svd.cosines(matrix, embedding, side, sv + 1)
    if len(cosines) <= sv:
        raise DtLensError(f"{matrix} has {len(cosines)} directions and none with sv={sv}; give a smaller sv.")
    labels = [str(label) for label in cosines.columns]
    rows, columns, panels = _places(_levels(svd, embedding, factors, len(labels)))
    title = titled(title, f"{matrix} sv {sv} × {embedding}")
    figure = grid_panels(
        cosines.iloc[sv].to_numpy(),
        rows,
        columns,
        panels,
        labels=labels,
        limit=limit,
        title=title,
        subtitle="cosine of the direction with each state, at its place",
    )
    return sized(figure, width, height)


def _levels(svd: WeightSVD, embedding: str, factors: Any, count: int) -> dict[str, list[Any]]:
    """The factors of an embedding's labels, checked."""
    if factors is None:
        factors = (getattr(getattr(svd.model, "facts", None), "factors", None) or {}).get(embedding)
        if factors is None:
            raise DtLensError(
                f"The model does not say what the labels of {embedding} consist of; give factors, such as "
                "{'row': [...], 'column': [...]}, a level for every label."
            )
    if not isinstance(factors, Mapping) or not all(isinstance(name, str) for name in factors):
        raise DtLensError(f"factors is {as_written(factors)}; it must be a dictionary of levels by factor.")
    found: dict[str, list[Any]] = {}
    for name, levels in factors.items():
        listed = list(levels) if isinstance(levels, Sequence) and not isinstance(levels, str) else None
        if listed is None or len(listed) != count:
            size = "no list" if listed is None else f"{len(listed)} levels"
            raise DtLensError(f"The factor {name!r} has {size}; {embedding} has {count} labels, so give one for each.")
        found[name] = [checked_level(level, name) for level in listed]
    return found


def _places(factors: Mapping[str, Sequence[Any]]) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
    """Each label's row and column, and what the panels are of."""
    if {"row", "column"} <= set(factors):
        others = {name: list(levels) for name, levels in factors.items() if name not in ("row", "column")}
        # Levels that a place decides, such as what a tile is, would make a panel with holes of each.
        at = list(zip(factors["row"], factors["column"], strict=True))
        others = {name: levels for name, levels in others.items() if not _decided(at, levels)}
        rows, columns = list(factors["row"]), list(factors["column"])
    elif "cell" in factors:
        cells = [re.fullmatch(r"\((\d+), (\d+)\)", str(cell)) for cell in factors["cell"]]
        columns = [None if cell is None else int(cell[1]) for cell in cells]
        rows = [None if cell is None else int(cell[2]) for cell in cells]
        seen = [name for name in factors if name != "cell"]
        what = [
            next((f"{name} {factors[name][i]}" for name in seen if factors[name][i] is not None), None)
            for i in range(len(rows))
        ]
        others = {"": what} if seen else {}
    else:
        raise DtLensError(
            f"The factors are {', '.join(factors) or 'none'}; a grid needs row and column, or cell as '(x, y)'."
        )
    if len(others) > 2:
        joined = zip(*others.values(), strict=True)
        others = {"": [", ".join(f"{n} {level}" for n, level in zip(others, row, strict=True)) for row in joined]}
    count = 1
    for levels in others.values():
        count *= len(set(levels) - {None})
    if count > PANELS:
        raise DtLensError(f"These factors make {count:,} panels; leave out some, so that there are at most {PANELS}.")
    return rows, columns, others


def _decided(places: Sequence[Any], levels: Sequence[Any]) -> bool:
    known: dict[Any, Any] = {}
    return all(known.setdefault(place, level) == level for place, level in zip(places, levels, strict=True))
