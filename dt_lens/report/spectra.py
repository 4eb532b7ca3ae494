"""Figures of singular values, and of sigma against the best match: pure functions of tables and arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go

from dt_lens.errors import DtLensError
from dt_lens.report.style import BASELINE, PALETTE, columns_of, empty, finish, kind_of, natural, plain, ticks

__all__ = ["best_matches", "q_text", "sigma_against_cosine", "spectrum"]

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def spectrum(
    sigmas: Mapping[str, npt.ArrayLike],
    *,
    scale: Literal["relative", "log", "linear"] = "relative",
    tolerance: float = 1e-6,
    title: str = "Singular spectra",
) -> go.Figure:
    """Singular values, largest first, one line for each matrix, cut at the numerical rank.

    Args:
        sigmas: for each matrix its singular values ``[k]``, in any order.
        scale: ``"relative"`` divides by the largest value and draws logarithmically; ``"log"`` and ``"linear"`` draw
            the values themselves.
        tolerance: values at or below ``tolerance`` times the matrix's largest are beyond the rank and not drawn. The
            default suits float32 weights: a circuit of rank ``d_head`` stored as ``d_model`` values ends at ``d_head``.
        title: the figure's title.

    Colours distinguish kinds of matrices (``W_in``, ``OV``, ...), dashes distinguish layers. A click on a kind in the
    legend hides all its lines.

    Raises:
        DtLensError: if the scale is unknown, or values are negative, not finite or not a vector.
    """
    if scale not in ("relative", "log", "linear"):
        raise DtLensError(f"A spectrum's scale is 'relative', 'log' or 'linear', not {scale!r}.")
    names = sorted(sigmas, key=natural)
    kinds = list(dict.fromkeys(kind_of(name)[0] for name in names))
    layers = sorted({kind_of(name)[1] for name in names} - {""}, key=natural)
    if not names:
        return empty(title, "No matrix was given.")
    figure = go.Figure()
    seen: set[str] = set()
    drawn: list[npt.NDArray[np.float64]] = []
    for name in names:
        values = np.asarray(sigmas[name], dtype=np.float64)
        if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
            raise DtLensError(
                f"The singular values of {name!r} must be a vector of finite numbers that are not negative."
            )
        values = np.sort(values)[::-1]
        stored = len(values)
        values = values[values > tolerance * values[:1].max(initial=0.0)]
        if not len(values):
            continue
        drawn.append(values)
        kind, layer = kind_of(name)
        heights = values / values[0] if scale == "relative" else values
        dash = _DASHES[layers.index(layer) % len(_DASHES)] if layer else "solid"
        shared = {
            "legendgroup": kind,
            "opacity": 0.85,
            "text": [plain(name)] * len(values),
            "hovertemplate": "%{text}<br>direction %{x}, rank "
            + str(len(values))
            + "<br>σ = %{customdata:.4g}<extra></extra>",
        }
        colour = PALETTE[kinds.index(kind) % len(PALETTE)]
        figure.add_scatter(
            x=np.arange(len(values)),
            y=heights,
            customdata=values,
            mode="lines",
            line={"color": colour, "width": 1.6, "dash": dash},
            name=plain(kind),
            showlegend=kind not in seen,
            **shared,
        )
        if len(values) < stored or stored == 1:  # the rank, not the matrix's size, ends the line
            figure.add_scatter(
                x=[len(values) - 1],
                y=heights[-1:],
                customdata=values[-1:],
                mode="markers",
                marker={"color": colour, "size": 7},
                showlegend=False,
                **shared,
            )
        seen.add(kind)
    for number, layer in enumerate(layers[: len(_DASHES)] if 1 < len(layers) <= len(_DASHES) else []):
        figure.add_scatter(  # an entry of the legend for the dashes; draws nothing
            x=[None],
            y=[None],
            mode="lines",
            line={"color": "#808890", "width": 1.6, "dash": _DASHES[number]},
            name=f"layer {layer}",
            legendgroup=f"layer {layer}",
            hoverinfo="skip",
        )
    label = {"relative": "σ / largest σ", "log": "singular value σ", "linear": "singular value σ"}[scale]
    figure.update_xaxes(title_text="direction (sv), largest σ first", rangemode="tozero")
    figure.update_yaxes(title_text=label, rangemode="tozero" if scale == "linear" else "normal")
    if scale != "linear" and drawn:
        low = min(float(v[-1] / v[0]) if scale == "relative" else float(v[-1]) for v in drawn)
        figure.update_yaxes(ticks(low, 1.0 if scale == "relative" else max(float(v[0]) for v in drawn)))
    return finish(figure, title, f"{len(names)} matrices, one line each · a dot: cut at the rank", height=460)


def sigma_against_cosine(
    table: pd.DataFrame,
    *,
    colour: Literal["embedding", "kind"] = "embedding",
    alpha: float = 0.05,
    title: str = "Do strong directions match embeddings?",
) -> go.Figure:
    """Each singular direction's sigma against its best absolute cosine with any label.

    Args:
        table: the scan's rows: ``matrix sv sigma embedding label cosine q_value``, also ``side``.
        colour: by the embedding of the best match, or by the kind of matrix.
        alpha: directions with q below it are filled, others open.
            Those whose best match is with an untrained head, which ``table.attrs["untrained"]`` names, are grey.
        title: the figure's title.

    Raises:
        DtLensError: if a column is missing, or the colour is unknown.
    """
    columns_of(table, ["matrix", "sv", "sigma", "embedding", "label", "cosine", "q_value"], "Sigma against cosine")
    if colour not in ("embedding", "kind"):
        raise DtLensError(f"Colour is by 'embedding' or by 'kind' of matrix, not {colour!r}.")
    if table.empty:
        return empty(title, "The scan has no rows.")
    best = best_matches(table, ["place", "sv"], "cosine", alpha)
    best["kind"] = [kind_of(str(m))[0] for m in best["matrix"]]
    order = (
        list(dict.fromkeys(table["embedding"])) if colour == "embedding" else sorted(best["kind"].unique(), key=natural)
    )
    figure, untrained = go.Figure(), table.attrs.get("untrained", ())
    for number, name in enumerate(order):
        rows = best[best[colour] == name]
        if rows.empty:
            continue
        own = PALETTE[number % len(PALETTE)]
        shades = [BASELINE if embedding in untrained else own for embedding in rows["embedding"]]
        real = (rows["q_value"] < alpha).to_numpy()
        figure.add_scatter(
            x=rows["sigma"],
            y=rows["cosine"].abs(),
            mode="markers",
            name=plain(name) + (" (untrained)" if name in untrained else ""),
            marker={
                "color": [shade if r else "rgba(0,0,0,0)" for r, shade in zip(real, shades, strict=True)],
                "size": 7,
                "opacity": 0.8,
                "line": {"color": shades, "width": 1.2},
                "symbol": "circle" if number < len(PALETTE) else "diamond",
            },
            customdata=[
                f"{plain(r['place'])}, sv {r['sv']}<br>{plain(r['embedding'])}: {plain(r['label'])}"
                f"<br>σ {r['sigma']:.4g}, cosine {r['cosine']:+.3f}, q {q_text(r['q_value'])}"
                for r in rows.to_dict("records")
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
    sigmas = best["sigma"][best["sigma"] > 0]
    figure.update_xaxes(ticks(float(sigmas.min()), float(sigmas.max())), title_text="singular value σ (logarithmic)")
    figure.update_yaxes(title_text="best |cosine| with any label", rangemode="tozero")
    figure.update_layout(legend_title_text="embedding of best match" if colour == "embedding" else "matrix")
    found = int((best["q_value"] < alpha).sum())
    return finish(figure, title, f"one point a direction · filled: q < {alpha:g} ({found} of {len(best)})", height=480)


def best_matches(table: pd.DataFrame, by: Sequence[str], value: str, alpha: float) -> pd.DataFrame:
    """The row of the largest |cosine| (or z) in each group, with the group's smallest q and its count of rows."""
    rows = table.copy()
    rows["place"] = rows["matrix"].astype(str)
    if "side" in rows:
        sides = rows.groupby("matrix")["side"].transform("nunique")
        two = sides > 1
        rows.loc[two, "place"] = rows.loc[two, "matrix"].astype(str) + " · " + rows.loc[two, "side"].astype(str)
    rows["_size"] = rows["cosine"].abs() if value == "cosine" else rows[value]
    groups = rows.groupby(list(by), sort=False)
    rows["smallest_q"] = groups["q_value"].transform("min")
    rows["discoveries"] = (rows["q_value"] < alpha).groupby([rows[b] for b in by], sort=False).transform("sum")
    rows["tested"] = groups["q_value"].transform("size")
    best = rows.sort_values("_size", ascending=False, kind="stable", na_position="last").drop_duplicates(list(by))
    return best.drop(columns="_size").reset_index(drop=True)


def q_text(q: float) -> str:
    """A q value as text."""
    return "< 0.001" if q < 0.001 else f"{q:.3f}"
