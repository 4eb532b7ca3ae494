"""The figures of an atlas: what removing each direction does, beside what it matches. Pure functions of its tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from dt_lens.behaviour.printing import places
from dt_lens.behaviour.terms import Terms
from dt_lens.report.style import BASELINE, CONTROL, PALETTE, columns_of, empty, finish, natural, plain, ticks

__all__ = ["Panel", "along_the_spectrum", "damage_against", "number_format", "shares", "sizes_against_damage"]

Panel = tuple[str, str]  # a kind of matrix, and the column of its directions' cosines
Array = NDArray[np.float64]
LEAST = 3  # ticks on an axis
DAMAGE = {
    "damage": "",
    "damage_per_energy": " per unit energy",
    "damage_per_output_energy": " per unit output energy",
    "beyond": " beyond the control",
}


def number_format(terms: Terms, *sizes: float) -> str:
    """A format string for outcomes of these sizes: as many decimals as the terms say, else as their size asks for."""
    return f"{{:,.{places(*sizes) if terms.digits is None else terms.digits}f}}"


def damage_against(
    directions: pd.DataFrame,
    panels: Sequence[Panel],
    terms: Terms,
    *,
    response: str = "damage",
    heads: Sequence[str] = (),
    title: str = "Does what a direction matches predict what it does?",
) -> go.Figure:
    """Draw the damage of each removal against the cosine of its best match, in a panel for each kind of matrix.

    Losses span many orders of magnitude and both signs, so the axis is an inverse hyperbolic sine: linear around 0,
    logarithmic further out.

    Args:
        directions: ``Atlas.directions``.
        panels: for each panel the kind of matrix, and the column of cosines, such as ``("W_out", "write action_out")``.
        terms: what was measured, and the words for it.
        response: the column of the damage.
        heads: a line above each panel, such as its rank correlation.
        title: the figure's title.

    Raises:
        DtLensError: for a missing column.
    """
    columns_of(directions, ["kind", "layer", "q_value", response, *(column for _, column in panels)], "The atlas")
    shown = [(kind, column) for kind, column in panels if (directions["kind"] == kind).any()]
    if not shown:
        return empty(title, "No direction was measured.")
    titles = [
        f"<b>{plain(kind)}</b>" + (f"<br><span style='font-size:12px'>{plain(line)}</span>" if line else "")
        for (kind, _), line in zip(shown, [*heads, *[""] * len(shown)], strict=False)
    ]
    figure = make_subplots(1, len(shown), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03)
    scale, values, names = _bent(directions[response].to_numpy(dtype=np.float64))
    layers = sorted(directions["layer"].dropna().unique())
    colour = {layer: PALETTE[number % len(PALETTE)] for number, layer in enumerate(layers)}
    figure.add_hline(y=0, line={"width": 1.5, "color": BASELINE})
    for layer in layers:  # the legend's markers; those of the points are open or filled
        marker = {"color": colour[layer], "size": 9}
        name = f"block {layer}"
        figure.add_scatter(x=[None], y=[None], mode="markers", name=name, legendgroup=name, marker=marker)
    for number, (kind, column) in enumerate(shown, 1):
        for layer in layers:
            rows = directions[(directions["kind"] == kind) & (directions["layer"] == layer)]
            sure = rows["q_value"].to_numpy() < 0.05
            figure.add_scatter(
                x=rows[column],
                y=np.arcsinh(rows[response].to_numpy(dtype=np.float64) / scale),
                mode="markers",
                name=f"block {layer}",
                legendgroup=f"block {layer}",
                showlegend=False,
                marker={
                    "color": [colour[layer] if s else "rgba(0,0,0,0)" for s in sure],
                    "size": [9 if s else 6 for s in sure],
                    "line": {"color": colour[layer], "width": [1.2 if s else 0.8 for s in sure]},
                    "opacity": 0.85,
                },
                customdata=_hover_texts(rows, terms),
                hovertemplate="%{customdata}<extra></extra>",
                row=1,
                col=number,
            )
        side, _, embedding = column.partition(" ")
        about = f"|cosine| with {plain(embedding)}<br>{plain(side)} side"
        figure.update_xaxes(title_text=about, rangemode="tozero", row=1, col=number)
    figure.update_yaxes(tickvals=values, ticktext=names, zeroline=False)
    figure.update_yaxes(title_text=f"{terms.lost}{DAMAGE[response]}" if response in DAMAGE else response, col=1)
    # The legend shows one marker for filled and open points; the subtitle says what they mean.
    about = f"one point for each of {len(directions):,} directions · filled: the {terms.outcome} changes at q < 0.05"
    about += f" · logarithmic beyond ±{scale:g}"
    finished = finish(figure, title, about, height=520, wide=(260 if len(shown) < 4 else 320) * len(shown))
    finished.update_layout(margin_t=130)
    return finished


def _bent(values: Array) -> tuple[float, list[float], list[str]]:
    """The scale of an inverse hyperbolic sine axis, and its ticks: (scale, positions, texts).

    >>> _bent(np.array([-3.0, 1.0, 2.0, 900.0]))[0]
    2.0
    >>> _bent(np.array([-3.0, 1.0, 2.0, 900.0]))[2]
    ['−10', '0', '10', '100', '1,000']
    >>> _bent(np.array([30.0, 80.0, 120.0, 500.0]))[2]
    ['50', '100', '200', '500']
    """
    finite = values[np.isfinite(values)]
    middle = float(np.median(np.abs(finite))) if len(finite) else 1.0
    scale = 10.0 ** math.floor(math.log10(middle)) if middle > 0 else 1.0
    scale *= next(digit for digit in (5, 2, 1) if middle >= digit * scale) if middle > 0 else 1
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    first = math.ceil(math.log10(scale) + 1e-9)
    marks = [0.0]
    for sign, end in ((1, high), (-1, -low)):
        if end > scale:
            last = max(first, math.ceil(math.log10(end) - 0.3))
            marks += [sign * 10.0**power for power in range(first, last + 1)]
    if low < high and sum(low <= mark <= high for mark in marks) < LEAST:
        marks = [float(mark) for mark in _between(low, high, scale)]
    marks.sort()
    names = [f"{mark:,.10g}".replace("-", "−") for mark in marks]
    return scale, [math.asinh(mark / scale) for mark in marks], names


def _between(low: float, high: float, scale: float) -> Array:
    """Marks at 0 and at 1, 2 and 5 times powers of ten; evenly spaced round ones if too few of those are in range.

    >>> _between(30.0, 500.0, 100.0).tolist()
    [50.0, 100.0, 200.0, 500.0]
    >>> _between(310.0, 350.0, 200.0).tolist()
    [310.0, 320.0, 330.0, 340.0, 350.0]
    """
    powers = range(math.floor(math.log10(scale)) - 1, math.ceil(math.log10(max(-low, high, scale))) + 1)
    round_ones = np.array([digit * 10.0**power for power in powers for digit in (1, 2, 5)])
    round_ones = round_ones[round_ones >= scale / 2]  # nearer to 0 they would crowd
    marks = np.concatenate([-round_ones[::-1], [0.0], round_ones])
    marks = marks[(low <= marks) & (marks <= high)]
    if len(marks) >= LEAST:
        return marks
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(digit * power for digit in (5, 2, 1) if (high - low) / 4 >= digit * power)
    return np.asarray(np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step)


def _hover_texts(rows: pd.DataFrame, terms: Terms) -> list[str]:
    form = number_format(terms, *rows[f"mean_{terms.outcome}"]).format
    return [
        _hover_text({str(key): value for key, value in row.items()}, terms, form) for row in rows.to_dict("records")
    ]


def _hover_text(row: dict[str, Any], terms: Terms, form: Callable[[float], str]) -> str:
    happened = terms.lost.split()[1]
    text = f"<b>{plain(row['matrix'])} sv={row['sv']}</b><br>sigma {row['sigma']:.3g} · energy {row['energy']:.3g}"
    mean, damage = form(row[f"mean_{terms.outcome}"]), form(row["damage"])
    text += f"<br>{terms.outcome} {mean} ({happened} {damage}, q = {row['q_value']:.2g})"
    control = row.get("control_damage", float("nan"))
    return text if control != control else f"{text}<br>its control {happened} {form(control)}"


def along_the_spectrum(
    directions: pd.DataFrame,
    mean: float,
    terms: Terms,
    *,
    title: str = "What removing each direction leaves",
    done: str = "removed",
) -> go.Figure:
    """Draw the outcome with each direction edited, by default without it, in a panel for each matrix.

    The largest sigma is on the left.

    Rows are blocks; columns are kinds of matrices, or heads if a kind has several.

    Args:
        directions: ``Atlas.directions``; ``control_damage`` is drawn if known.
        mean: the unedited model's mean outcome.
        terms: what was measured, and the words for it.
        title: the figure's title.
        done: what was done to the directions, in a word.

    Raises:
        DtLensError: for a missing column.
    """
    column = f"mean_{terms.outcome}"
    columns_of(directions, ["matrix", "kind", "layer", "head", "sv", column, "q_value"], "The atlas")
    if directions.empty:
        return empty(title, "No direction was measured.")
    columns = _columns(directions)
    kinds = list(dict.fromkeys(columns))
    layers = sorted(directions["layer"].dropna().unique())
    figure = make_subplots(
        len(layers),
        len(kinds),
        shared_xaxes=True,
        shared_yaxes=True,
        column_titles=[f"<b>{plain(kind)}</b>" for kind in kinds],
        row_titles=[f"block {layer}" for layer in layers],
        horizontal_spacing=0.02,
        vertical_spacing=0.03,
    )
    figure.add_hline(y=mean, line={"width": 1.2, "color": BASELINE, "dash": "dot"})
    named: set[str] = set()

    def draw(name: str, x: Any, y: Any, marker: dict[str, Any], place: tuple[int, int], hover: list[str]) -> None:
        figure.add_scatter(
            x=x,
            y=y,
            mode="markers",
            name=name,
            legendgroup=name,
            showlegend=name not in named,
            marker=marker,
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            row=place[0],
            col=place[1],
        )
        named.add(name)

    for matrix in sorted(dict.fromkeys(directions["matrix"]), key=natural):
        rows = directions[directions["matrix"] == matrix]
        place = (
            layers.index(rows["layer"].iloc[0]) + 1,
            kinds.index(columns[directions["matrix"] == matrix].iloc[0]) + 1,
        )
        if "control_damage" in rows and rows["control_damage"].notna().any():
            control = mean - terms.sign * rows["control_damage"].to_numpy(dtype=np.float64)
            marker = {"color": "rgba(0,0,0,0)", "size": 5, "line": {"color": CONTROL, "width": 0.8}}
            draw("its control", rows["sv"], control, marker, place, _hover_texts(rows, terms))
        for sure, name, colour in ((False, done, "#b98a5e"), (True, f"{done}, q < 0.05", PALETTE[1])):
            part = rows[(rows["q_value"] < 0.05) == sure]
            if len(part):
                marker = {"color": colour, "size": 6 if sure else 4}
                draw(
                    name,
                    part["sv"],
                    part[column],
                    marker,
                    place,
                    _hover_texts(part, terms),
                )
    # Directions are counted: no ticks between them.
    few = {"dtick": 1} if directions["sv"].max() < 8 else {}
    figure.update_xaxes(tickformat=",d", **few)
    figure.update_xaxes(title_text="sv", row=len(layers))
    # From 0 where a share of the mean says something; otherwise what changes would not be seen.
    span = {"rangemode": "tozero"} if terms.large is None else {}
    figure.update_yaxes(title_text=f"mean {terms.outcome}", col=1, **span)
    about = f"{len(directions):,} directions · sv 0 has the largest sigma · dotted: the unedited {terms.actor}"
    finished = finish(figure, title, about, height=180 + 170 * len(layers), wide=230 * len(kinds))
    finished.update_layout(margin_t=110)
    return finished


def _columns(directions: pd.DataFrame) -> pd.Series[str]:
    """Each direction's kind of matrix, with the head if the kind has several."""
    heads = directions.groupby("kind")["head"].transform("nunique")
    kinds = directions["kind"].astype(str)
    return kinds.where(heads < 2, kinds + "." + directions["head"].astype("Int64").astype(str))


def shares(table: pd.DataFrame, terms: Terms, *, title: str = "How many directions matter") -> go.Figure:
    """Draw for each matrix the share of directions whose edit does damage at q < 0.05.

    Args:
        table: ``Atlas.shares``; its rows of single matrices are drawn.
        terms: what was measured, and the words for it.

    Raises:
        DtLensError: for a missing column.
    """
    columns_of(table, ["what", "kind", "share", "hurts", "directions"], "The shares")
    rows = table[table["what"] != table["kind"]]
    if rows.empty:
        return empty(title, "No matrix was measured.")
    rows = rows.iloc[sorted(range(len(rows)), key=lambda i: natural(str(rows["what"].iloc[i])), reverse=True)]
    kinds = list(dict.fromkeys(rows["kind"]))
    figure = go.Figure()
    for kind in kinds:
        part = rows[rows["kind"] == kind]
        figure.add_bar(
            x=part["share"],
            y=part["what"],
            orientation="h",
            name=plain(kind),
            marker_color=PALETTE[kinds.index(kind) % len(PALETTE)],
            customdata=[f"{hurts} of {n}" for hurts, n in zip(part["hurts"], part["directions"], strict=True)],
            hovertemplate="%{y}: %{customdata} directions (%{x:.0%})<extra></extra>",
        )
    figure.update_xaxes(tickformat=".2~%", title_text="share of the matrix's directions", rangemode="tozero")
    figure.update_yaxes(categoryorder="array", categoryarray=list(rows["what"]))
    about = f"{'costs' if terms.sign > 0 else 'raises'} {terms.outcome} at q < 0.05"
    about += f" · {int(rows['directions'].sum()):,} directions of {len(rows)} matrices"
    return finish(figure, title, about, height=140 + 32 * len(rows))


def sizes_against_damage(
    directions: pd.DataFrame,
    predictors: Sequence[str],
    terms: Terms,
    *,
    title: str = "Does size predict what a direction does?",
) -> go.Figure:
    """Draw the damage against sigma, and against the output energy on real inputs, in a panel for each.

    Args:
        directions: ``Atlas.directions``.
        predictors: columns, such as ``["sigma", "output_energy"]``.
        terms: what was measured, and the words for it.

    Raises:
        DtLensError: for a missing column.
    """
    columns_of(directions, ["kind", "damage", "q_value", *predictors], "The atlas")
    if directions.empty or not predictors:
        return empty(title, "No direction was measured.")
    figure = make_subplots(1, len(predictors), shared_yaxes=True, horizontal_spacing=0.03)
    scale, values, names = _bent(directions["damage"].to_numpy(dtype=np.float64))
    figure.add_hline(y=0, line={"width": 1.5, "color": BASELINE})
    kinds = list(dict.fromkeys(directions["kind"]))
    for kind in kinds:
        marker = {"color": PALETTE[kinds.index(kind) % len(PALETTE)], "size": 9}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=plain(kind), legendgroup=kind, marker=marker)
    for number, predictor in enumerate(predictors, 1):
        positive = directions[directions[predictor] > 0]
        for kind in kinds:
            rows = positive[positive["kind"] == kind]
            colour = PALETTE[kinds.index(kind) % len(PALETTE)]
            sure = rows["q_value"].to_numpy() < 0.05
            figure.add_scatter(
                x=rows[predictor],
                y=np.arcsinh(rows["damage"].to_numpy(dtype=np.float64) / scale),
                mode="markers",
                name=plain(kind),
                legendgroup=kind,
                showlegend=False,
                marker={
                    "color": [colour if s else "rgba(0,0,0,0)" for s in sure],
                    "size": [8 if s else 5 for s in sure],
                    "line": {"color": colour, "width": 0.9},
                },
                customdata=_hover_texts(rows, terms),
                hovertemplate="%{customdata}<extra></extra>",
                row=1,
                col=number,
            )
        if len(positive):
            axis = ticks(float(positive[predictor].min()), float(positive[predictor].max()))
            figure.update_xaxes(title_text=predictor.replace("_", " "), row=1, col=number, **axis)
    figure.update_yaxes(tickvals=values, ticktext=names, zeroline=False)
    figure.update_yaxes(title_text=terms.lost, col=1)
    about = f"one point for each of {len(directions):,} directions · filled: q < 0.05 · logarithmic beyond ±{scale:g}"
    return finish(figure, title, about, height=460, wide=330 * len(predictors))
