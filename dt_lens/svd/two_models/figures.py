"""Figures of what changed between two models: pure functions of the comparison's table and spectra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go

from dt_lens.lens.matrices import RESIDUAL
from dt_lens.report.style import PALETTE, columns_of, empty, finish, plain

__all__ = ["angle_heatmap", "change_heatmap", "spectra_shift"]

Array = npt.NDArray[np.float64]
KINDS = ("W_Q", "W_K", "W_V", "W_O", "QK", "OV", "W_gate", "W_in", "W_out")


def change_heatmap(
    table: pd.DataFrame, *, value: str = "relative_change", title: str = "How much every matrix changed"
) -> go.Figure:
    """A heatmap with a cell for each layer and kind of matrix; of several heads, the one that changed most.

    Args:
        table: the comparison's: ``matrix kind layer head`` and the column ``value``.
        value: the column that is shown.
        title: the figure's title.

    Raises:
        DtLensError: for a missing column.
    """
    columns_of(table, ["matrix", "kind", "layer", "head", value], "The heatmap of changes")
    if table.empty:
        return empty(title, "No matrix was compared.")
    cells = []
    for (_, kind), group in table.groupby(["layer", "kind"], sort=False):
        finite = group[np.isfinite(group[value].astype(float))]
        if finite.empty:
            continue
        row = finite.sort_values(value, ascending=False, kind="stable").iloc[0]
        hover = f"{plain(row['matrix'])}<br>{_words(value)} {row[value]:.4g}"
        if len(group) > 1:
            hover += f"<br>largest of {len(group)} heads; their mean is {finite[value].astype(float).mean():.4g}"
        if "change_effective_rank" in row:
            hover += f"<br>effective rank of the change {row['change_effective_rank']:.1f}"
        cells.append((int(row["layer"]), str(kind), float(row[value]), hover))
    heads = int(table["head"].nunique())
    about = f"{_words(value)}, ‖B − A‖ / ‖A‖" if value == "relative_change" else _words(value)
    about += " · of several heads, the largest" if heads > 1 else ""
    return _grid(cells, title, about, _short)


def angle_heatmap(table: pd.DataFrame, *, title: str = "How far the leading subspaces turned") -> go.Figure:
    """A heatmap of the mean principal angle, in degrees, of the leading subspaces, by layer and residual side.

    Of several heads, the one that turned most; hovering shows the angle between two random subspaces.

    Raises:
        DtLensError: for a missing column.
    """
    needed = [f"{side}_{what}" for side in ("left", "right") for what in ("side", "angle", "angle_max", "haar_angle")]
    columns_of(table, ["matrix", "kind", "layer", "k", *needed], "The heatmap of angles")
    best: dict[tuple[int, str], tuple[float, str]] = {}
    for row in table.to_dict("records"):
        for side in ("left", "right"):
            angle = float(row[f"{side}_angle"])
            if row[f"{side}_side"] not in RESIDUAL or np.isnan(angle):
                continue
            place = int(row["layer"]), f"{row['kind']} {row[f'{side}_side']}"
            hover = (
                f"{plain(row['matrix'])}, {row[f'{side}_side']} side, {row['k']} directions<br>principal angles: mean "
                f"{angle:.1f}°, largest {row[f'{side}_angle_max']:.1f}°<br>random subspaces: mean "
                f"{row[f'{side}_haar_angle']:.1f}°"
            )
            if place not in best or angle > best[place][0]:
                best[place] = (angle, hover)
    if not best:
        return empty(title, "No matrix has a side on the residual stream.")
    cells = [(layer, name, angle, hover) for (layer, name), (angle, hover) in best.items()]
    about = "mean principal angle in degrees · 0: the same subspace · 90: nothing shared"
    return _grid(cells, title, about, lambda v: f"{v:.0f}°" if v >= 9.95 else f"{v:.1f}°", high=90.0)


def spectra_shift(
    spectra: Mapping[str, tuple[Array, Array, Array]],
    *,
    names: tuple[str, str] = ("A", "B"),
    most: int = 8,
    title: str = "How the singular values moved",
) -> go.Figure:
    """``(sigma_B - sigma_A) / largest sigma_A`` over the directions, for the ``most`` spectra that changed most.

    Args:
        spectra: for each matrix its singular values in A and in B (and of the change), largest first.
        names: of the two models.
        most: how many matrices at most.
        title: the figure's title.
    """
    sizes = {name: _shift(a, b) for name, (a, b, *_) in spectra.items() if len(a) and a[0] > 0}
    chosen = sorted(sizes, key=lambda name: -float(np.linalg.norm(sizes[name])))[:most]
    chosen = [name for name in chosen if np.abs(sizes[name]).max(initial=0.0) > 0]
    if not chosen:
        return empty(title, "No singular value differs.")
    figure = go.Figure()
    for number, name in enumerate(chosen):
        a, b, *_ = spectra[name]
        figure.add_scatter(
            x=np.arange(len(a)),
            y=sizes[name],
            mode="lines" if len(a) > 1 else "markers",
            line={
                "color": PALETTE[number % len(PALETTE)],
                "width": 1.6,
                "dash": "solid" if number < len(PALETTE) else "dash",
            },
            name=plain(name),
            customdata=np.stack([a, b], 1),
            text=[plain(name)] * len(a),
            hovertemplate="%{text}<br>direction %{x}: σ %{customdata[0]:.4g} → %{customdata[1]:.4g}<extra></extra>",
        )
    figure.update_xaxes(title_text="direction (sv), largest σ first", rangemode="tozero")
    figure.update_yaxes(title_text="change of σ / largest σ", tickformat=".3~g")
    left = len(spectra) - len(chosen)
    about = f"from {plain(names[0])} to {plain(names[1])}" + (f" · the {len(chosen)} most changed" if left else "")
    return finish(figure, title, about, height=440)


def _shift(a: Array, b: Array) -> Array:
    return np.asarray((b - a) / a[0])


def _words(name: str) -> str:
    return name.replace("_", " ")


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e−")


def _grid(
    cells: list[tuple[int, str, float, str]], title: str, about: str, write: Any, high: float | None = None
) -> go.Figure:
    """A heatmap with layers down, kinds across and the numbers in the cells."""
    layers = sorted({layer for layer, *_ in cells})
    order = {kind: i for i, kind in enumerate(KINDS)}
    kinds = sorted({kind for _, kind, *_ in cells}, key=lambda kind: (order.get(kind.split()[0], len(order)), kind))
    grid = np.full((len(layers), len(kinds)), np.nan)
    text, hovers = np.full(grid.shape, "", dtype=object), np.full(grid.shape, "", dtype=object)
    for layer, kind, value, hover in cells:
        at = layers.index(layer), kinds.index(kind)
        grid[at], text[at], hovers[at] = value, write(value), hover
    top = high if high is not None else float(np.nanmax(grid, initial=0.0)) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=grid,
            x=np.arange(len(kinds)),
            y=np.arange(len(layers)),
            text=text,
            texttemplate="%{text}",
            textfont={"size": 11},
            customdata=hovers,
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
            coloraxis="coloraxis",
        )
    )
    figure.update_layout(coloraxis={"cmin": 0.0, "cmax": top, "autocolorscale": True, "showscale": False})
    figure.update_xaxes(
        tickmode="array",
        tickvals=list(range(len(kinds))),
        ticktext=[plain(kind).replace(" ", "<br>") for kind in kinds],
        side="top",
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(layers))),
        ticktext=[f"layer {layer}" for layer in layers],
        range=[len(layers) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    figure.update_layout(margin_b=15)
    return finish(figure, title, about, height=len(layers) * 26 + 140, wide=110 + 52 * len(kinds))
