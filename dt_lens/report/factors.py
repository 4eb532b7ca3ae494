"""Figures of factors: which directions sort labels by which factor, and a direction's cosines laid out on a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dt_lens.report.heatmaps import label_axis, room_for
from dt_lens.report.spectra import q_text
from dt_lens.report.style import empty, finish, plain

__all__ = ["factor_heatmap", "grid_panels"]

CELL = 18  # pixels of a row of the heatmap
PIXELS = 20  # of a place on the grid
TITLE = 150  # that a panel's title takes


def factor_heatmap(
    table: pd.DataFrame, factors: Sequence[str], *, alpha: float = 0.05, most: int = 40, title: str = ""
) -> go.Figure:
    """How surely each direction sorts labels by each factor.

    The colour is the factor's own p on a logarithmic scale, since effects of factors with different numbers of levels
    are of different size by chance. A dot marks the factor of a direction with q up to ``alpha``.

    Args:
        table: of ``clusters``: ``matrix side sv embedding factor q_value``, and ``effect_F``, ``p_F`` for a factor F.
        factors: the factors, a column each.
        alpha: the false discovery rate at which a direction is marked.
        most: how many directions at most, those with the smallest p, in the table's order.
        title: the figure's.
    """
    if table.empty or not factors:
        return empty(title, "There are no directions to show.")
    table = table.reset_index(drop=True)  # rows of several tables may share a number
    kept = table.loc[table["p_value"].sort_values(kind="stable").index[:most].sort_values()]
    several = kept["embedding"].nunique() > 1
    names = [
        f"{row['matrix']} {row['side']} sv {row['sv']}" + (f" × {row['embedding']}" if several else "")
        for row in kept.to_dict("records")
    ]
    p = kept[[f"p_{name}" for name in factors]].to_numpy(dtype=np.float64)
    effects = kept[[f"effect_{name}" for name in factors]].to_numpy(dtype=np.float64)
    marked = np.array(
        [[row["q_value"] <= alpha and row["factor"] == name for name in factors] for row in kept.to_dict("records")]
    )
    hover = np.array(
        [
            [
                f"{plain(names[i])}<br>{plain(factor)}: effect {effects[i, j]:.2f}, p {q_text(p[i, j])}<br>"
                f"q of the direction {q_text(float(kept['q_value'].iloc[i]))}"
                for j, factor in enumerate(factors)
            ]
            for i in range(len(kept))
        ],
        dtype=object,
    )
    strength = -np.log10(p)
    figure = go.Figure(
        go.Heatmap(
            z=strength,
            x=np.arange(len(factors)),
            y=np.arange(len(kept)),
            text=np.where(marked, "●", ""),
            texttemplate="%{text}",
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
            coloraxis="coloraxis",
        )
    )
    highest = max(1.0, float(np.nanmax(strength, initial=0.0)))
    powers = range(int(highest) + 1)
    figure.update_layout(
        coloraxis={
            "cmin": 0.0, "cmax": highest, "autocolorscale": True,
            "colorbar": {
                "title": {"text": "p of the factor", "side": "right"},
                "tickvals": list(powers), "ticktext": [f"{10.0**-power:g}" for power in powers],
            },
        }
    )  # fmt: skip
    labels = [plain(name) for name in factors]
    figure.update_xaxes(label_axis(labels), title_text="factor")
    figure.update_yaxes(
        tickmode="array", tickvals=list(range(len(names))), ticktext=[plain(name) for name in names],
        range=[len(names) - 0.5, -0.5], showgrid=False, zeroline=False,
    )  # fmt: skip
    found = int((table["q_value"] <= alpha).sum())
    shown = f"the {len(kept)} of smallest p of {len(table):,} rows" if len(kept) < len(table) else f"{len(table)} rows"
    return finish(
        figure,
        title,
        f"{shown} · ● the factor of a row with q ≤ {alpha:g}: {found:,} of all",
        height=len(kept) * CELL + 130 + room_for(labels),
        wide=330 + 40 * len(factors),
    )


def grid_panels(
    values: npt.ArrayLike,
    rows: Sequence[Any],
    columns: Sequence[Any],
    panels: Mapping[str, Sequence[Any]],
    *,
    labels: Sequence[str],
    value: str = "cosine",
    limit: float | None = None,
    title: str = "",
    subtitle: str = "",
) -> go.Figure:
    """One number per label, each at its place on a grid, one panel for every combination of further factors.

    Args:
        values: ``[labels]``.
        rows, columns: each label's row and column on the grid, row 0 on top; ``None`` leaves a label out.
        panels: further factors with the level of each label: none, one (panels side by side), or two (the first from
            left to right, the second from top to bottom).
        labels: for the hover texts.
        value: what the numbers are.
        limit: colours range from ``-limit`` to ``limit``; by default the largest size.
        title, subtitle: the figure's.
    """
    numbers = np.asarray(values, dtype=np.float64)
    placed = [i for i in range(len(numbers)) if rows[i] is not None and columns[i] is not None]
    names = list(panels)[:2]
    levels = {
        name: list(dict.fromkeys(panels[name][i] for i in placed if panels[name][i] is not None)) for name in names
    }
    across: list[Any] = levels[names[0]] if names else [None]
    down: list[Any] = levels[names[1]] if len(names) > 1 else [None]
    heights = _in_order({rows[i] for i in placed})
    widths = _in_order({columns[i] for i in placed})
    if not placed or not across or not down:
        return empty(title, "No label has a place on a grid.")
    wrap = len(down) == 1 and len(across) > 6  # many panels of one factor: several lines of them
    per_line = 6 if wrap else len(across)
    lines = -(-len(across) // per_line) if wrap else len(down)
    titles = [_panel(names, (a, d)) for d in down for a in across]
    figure = make_subplots(
        lines, per_line, subplot_titles=titles, horizontal_spacing=0.02, vertical_spacing=0.28 / lines
    )
    top = limit if limit is not None else max(1e-9, float(np.abs(numbers[placed]).max()))
    for number, (a, d) in enumerate((a, d) for d in down for a in across):
        cells = np.full((len(heights), len(widths)), np.nan)
        hover = np.full(cells.shape, "", dtype=object)
        for i in placed:
            if all(panels[name][i] == level for name, level in zip(names, (a, d), strict=False)):
                at = heights.index(rows[i]), widths.index(columns[i])
                cells[at] = numbers[i]
                hover[at] = f"{plain(labels[i])}<br>{value} {numbers[i]:+.3f}"
        figure.add_trace(
            go.Heatmap(
                z=cells, x=[str(x) for x in widths], y=[str(y) for y in heights], customdata=hover,
                hovertemplate="%{customdata}<extra></extra>", hoverongaps=False, coloraxis="coloraxis",
            ),
            row=number // per_line + 1,
            col=number % per_line + 1,
        )  # fmt: skip
    figure.update_xaxes(type="category", showgrid=False, showticklabels=False, ticks="")
    figure.update_yaxes(type="category", showgrid=False, showticklabels=False, ticks="", autorange="reversed")
    figure.update_annotations(font_size=11)
    figure.update_layout(
        coloraxis={
            "cmin": -top, "cmax": top, "autocolorscale": True, "colorbar": {"title": {"text": value, "side": "right"}}
        }
    )  # fmt: skip
    # Square cells, so that places look as near to each other as they are.
    for axis in figure.select_yaxes():
        axis.update(scaleanchor=axis.anchor, constrain="domain")
    figure.update_xaxes(constrain="domain")
    figure.update_layout(margin_t=105)
    side = PIXELS * max(len(heights), 5)
    wide = per_line * max(TITLE, PIXELS * len(widths) + 12) + 120
    return finish(figure, title, subtitle, height=int(lines * side / (1 - 0.28 * (lines - 1) / lines)) + 150, wide=wide)


def _in_order(levels: set[Any]) -> list[Any]:
    """Levels from the smallest on; those of different types by the type's name first."""
    try:
        return sorted(levels)
    except TypeError:
        types = {type(level).__name__ for level in levels}
        if len(types) == 1:
            return sorted(levels, key=repr)
        return [x for name in sorted(types) for x in _in_order({y for y in levels if type(y).__name__ == name})]


def _panel(names: Sequence[str], levels: Sequence[Any]) -> str:
    return plain(", ".join(f"{name} {level}" for name, level in zip(names, levels, strict=False)))
