"""The figures of a search for a steering direction. Pure functions of its result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dt_lens.report.style import BASELINE, EDIT, PALETTE, finish
from dt_lens.study.steering.doses import DOES
from dt_lens.study.steering.result import SteeringResult

__all__ = ["answer_figure", "randoms_figure", "steering_figure"]

COLOURS = {"chosen": EDIT, "random": BASELINE, "points": PALETTE[0]}


def answer_figure(result: SteeringResult) -> go.Figure:
    """Draw the mean outcome by dose, beside the unedited model's; without doses, by point of the curve."""
    n = result.numbers
    point, by_dose = n.get("point"), len(result.table) > 0
    figure = go.Figure()
    rows, x = (result.table, "dose") if by_dose else (result.curve, point)
    _line(figure, rows, str(x), "mean", "chosen" if by_dose else "points", None, legend=False)
    about = f"n = {_counted(rows, n)} · bars: 95 % intervals"
    if by_dose:
        unedited = result.table.loc[result.table["dose"] == 1, "mean"]
        for value in unedited:
            figure.add_hline(y=value, line={"width": 1.2, "color": BASELINE, "dash": "dot"})
        about += " · dotted: unedited"
        if point:
            ends = result.curve["mean"].min(), result.curve["mean"].max()
            figure.add_hrect(*ends, fillcolor=COLOURS["points"], opacity=0.1, line_width=0)
            about += " · band: the curve's range"
    figure.update_xaxes(title_text="dose (sigma is multiplied by it)" if by_dose else point)
    figure.update_yaxes(title_text=f"mean {n.get('outcome', 'outcome')}{_scale(n)}")
    title = f"{result.best.name}, by dose" if result.best is not None and by_dose else f"The unedited model, by {x}"
    return finish(figure, title, about, height=360)


def _counted(rows: pd.DataFrame, numbers: Any) -> str:
    """How many units each row is a mean of."""
    units = str(numbers.get("lasting_unit", "units"))
    return f"{int(rows[units].iloc[0]):,} {units} a point" if units in rows else "unknown"


def _scale(numbers: Any, name: str = "scale") -> str:
    return f" ({numbers[name]})" if numbers.get(name) else ""


def steering_figure(result: SteeringResult) -> go.Figure:
    """Draw the mean outcome by point of the curve, if there is one, and by dose, and what must not rise by dose."""
    n = result.numbers
    point = n.get("point")
    by_dose = len(result.table) > 0
    harm = next((name for name in ("failure_rate", "guard") if name in result.curve), None) if by_dose else None
    titles = [
        *([f"by {point}"] if point else []),
        *(["by dose"] if by_dose else []),
        *([str(n["harm"])] if harm else []),
    ]
    titles = titles or ["the unedited model"]
    figure = make_subplots(1, len(titles), horizontal_spacing=0.11, subplot_titles=titles)
    first = 2 if point else 1
    if point:
        _line(figure, result.curve, point, "mean", "points", 1, legend=False)
        figure.update_xaxes(title_text=point, row=1, col=1)
    if by_dose:
        _line(figure, result.table, "dose", "mean", "chosen", first, legend=False)
        if point:  # after the line: none is drawn over an empty panel
            low, high = result.curve["mean"].min(), result.curve["mean"].max()
            figure.add_hrect(low, high, row=1, col=2, fillcolor=COLOURS["points"], opacity=0.1, line_width=0)
        if harm:
            _line(figure, result.table, "dose", harm, "chosen", first + 1, legend=False)
    ends, room = _range(result.curve, result.table)
    for column in range(1, max(2, first + by_dose)):
        figure.update_yaxes(range=[ends[0] - room, ends[1] + room], row=1, col=column)
    for column in range(1, len(titles) + (not harm)):
        figure.update_yaxes(title_text=f"mean {n.get('outcome', 'outcome')}{_scale(n)}", row=1, col=column)
    if harm == "failure_rate":
        shares = np.linspace(0, 1, 6)
        said = [f"{100 * share:.0f} %" for share in shares]
        figure.update_yaxes(tickvals=shares, ticktext=said, range=[-0.03, 1.03], row=1, col=first + 1)
        figure.update_yaxes(title_text=f"{n.get('lasting_unit', 'units')} that fail", row=1, col=first + 1)
    elif harm:
        figure.update_yaxes(title_text=f"{n['harm']}{_scale(n, 'harm_scale')}", row=1, col=first + 1)
    for column in range(first, len(titles) + 1) if by_dose else ():
        figure.update_xaxes(title_text="dose (sigma times)", row=1, col=column)
    counts = [f"n = {_counted(result.table, n)}" + (" by dose" if point else "")] if by_dose else []
    counts += [f"n = {_counted(result.curve, n)}" + (f" by {point}" if by_dose else "")] if point else []
    band = "; the band is the curve's range" if point and by_dose else ""
    about = f"{', '.join(counts)}; bars: 95 % intervals{band}"
    return finish(figure, "What a dose does" if by_dose else "The curve", about, height=420, wide=230 * len(titles))


def randoms_figure(result: SteeringResult) -> go.Figure:
    """Draw the mean outcomes at the largest dose against those at the least; on the diagonal the reach is 0."""
    table, outcome = result.randoms, result.numbers.get("outcome", "outcome")
    limits = {"failure_rise": 0.0, "guard_rise": result.numbers.get("rise_limit", 0.0)}
    rise = next((name for name in limits if name in table), None)
    sides = list(dict.fromkeys(table["side"]))
    titles = [f"random in place of what it {DOES[side]}" for side in sides]
    figure = make_subplots(1, len(sides), horizontal_spacing=0.09, shared_yaxes=True, subplot_titles=titles)
    # Along a curve the axes show its range; otherwise an interval of one mean would only squeeze the points.
    span, room = _range(*([result.curve] if result.numbers.get("point") else []), table)
    grey = {"color": BASELINE, "dash": "dot", "width": 1.2}
    for column, side in enumerate(sides, 1):
        figure.add_trace(go.Scatter(x=span, y=span, mode="lines", showlegend=False, line=grey), row=1, col=column)
        of_side = table[table["side"] == side]
        chosen = of_side["seed"].isna()
        for name, rows in (("random", of_side[~chosen]), ("chosen", of_side[chosen])):
            marker = {
                "color": COLOURS[name],
                "size": 12 if name == "chosen" else 8,
                "symbol": "circle" if rise is None else ["x" if r > limits[rise] else "circle" for r in rows[rise]],
            }
            points = go.Scatter(
                x=rows["lowest"], y=rows["highest"], mode="markers", name=name, marker=marker, hoverinfo="x+y",
                legendgroup=name, showlegend=column == 1,
            )  # fmt: skip
            figure.add_trace(points, row=1, col=column)
        figure.update_xaxes(title_text=f"mean {outcome}{_scale(result.numbers)} at the least dose", row=1, col=column)
    figure.update_xaxes(range=[span[0] - room, span[1] + room])
    figure.update_yaxes(range=[span[0] - room, span[1] + room])
    figure.update_yaxes(title_text=f"mean {outcome} at the largest dose", row=1, col=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    where = {"downstream gain": ", or gain where they write", "length": ", and length where they write"}
    about = "the same output energy" + where.get(str(result.numbers.get("put_matched")), "")
    about += f"; a cross: more {result.numbers.get('harm')}" if rise else ""
    few, units = result.numbers.get("random_units"), result.numbers.get("lasting_unit", "units")
    about += f"; n = {few:,} {units} a point" if few else ""
    return finish(figure, "Random directions in its place", about, height=440, wide=680)


def _range(*tables: pd.DataFrame) -> tuple[list[float], float]:
    """The least and the largest outcome of tables, ends of intervals included, and some room beyond them."""
    names = ("mean", "mean_low", "mean_high", "lowest", "highest")
    ends = np.concatenate([table[name] for table in tables for name in names if name in table])
    low, high = float(np.nanmin(ends)), float(np.nanmax(ends))  # equal returns have no interval
    return [low, high], 0.05 * (high - low or 1.0)


def _line(
    figure: go.Figure, rows: pd.DataFrame, x: str, y: str, name: str, column: int | None, legend: bool = True
) -> None:
    """Draw the means of ``rows`` with their intervals, in a panel of several where ``column`` is a number."""
    rows = rows.sort_values(x)
    bars: dict[str, Any] = {
        "type": "data",
        "symmetric": False,
        "array": rows[f"{y}_high"] - rows[y],
        "arrayminus": rows[y] - rows[f"{y}_low"],
    }
    line = go.Scatter(
        x=rows[x], y=rows[y], error_y=bars, mode="lines+markers", name=name, showlegend=legend, legendgroup=name,
        line={"color": COLOURS[name]},
    )  # fmt: skip
    figure.add_trace(line, **({} if column is None else {"row": 1, "col": column}))
