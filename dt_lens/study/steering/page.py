"""The page and tables of a search for a steering direction: the curve, the doses, and what was tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dt_lens.arguments import local_path, require_offers
from dt_lens.behaviour.printing import about_interval
from dt_lens.report.page import Folded, Note, Plot, Section, Table, write_report
from dt_lens.report.style import finish
from dt_lens.study.result_files import write_csv_and_json
from dt_lens.study.steering.doses import DOES
from dt_lens.study.steering.result import SteeringResult

__all__ = ["randoms_figure", "steering_figure", "write_steering"]

DECIDES = ["matrix", "sv", "set_aside"]  # columns that come first, since the table is wide
# Where the chosen direction puts what it reads, and in what random ones there are like it.
MATCHED = {
    "output energy": "what it {does}, with the same length, so that the output energy is the same",
    "downstream gain": "where it writes, each scaled to the same gain into what reads the stream later",
    "length": "where it writes, with the same length: no later matrix reads that, only the output does",
}
COLOURS = {"chosen": "rgb(31,119,180)", "random": "rgb(140,140,140)", "points": "rgb(214,120,40)"}


def write_steering(result: SteeringResult, folder: str | Path) -> Path:
    """Write ``steering.html``, ``steering.csv`` and ``steering.json`` into ``folder``; return the page.

    Raises:
        DtLensError: if they cannot be written.
    """
    require_offers(result, "result", "a SteeringResult", "table", "curve", "numbers")
    folder = local_path(folder, "folder")
    write_csv_and_json(folder, "steering", result.table, result.to_dict())
    n = result.numbers
    outcome, harm = str(n.get("outcome", "outcome")), str(n.get("harm", ""))
    units = str(n.get("lasting_unit", "units"))

    def shown_table(frame: pd.DataFrame, caption: str = "") -> Table:
        named = {"guard": harm, "guard_rise": f"rise of {harm}"}
        return Table(frame, caption, {name: said for name, said in named.items() if name in frame})

    of_curve = "The unedited model at each point of the curve." if "range" in n else "The unedited model."
    sections = [Section("What a dose does", [Plot(steering_figure(result)), shown_table(result.curve, of_curve)])]
    if len(result.table):
        sections[0] = Section(
            "What a dose does",
            [
                Plot(steering_figure(result)),
                shown_table(result.table, f"Doses of the chosen direction on fresh {units}."),
                *(
                    Note(about_interval(f"The interval of {what}", n[name]))
                    for name, what in (("reach_note", "the reach"), ("rise_note", f"the rise of {harm}"))
                    if n.get(name)
                ),
                shown_table(result.curve, of_curve),
            ],
        )
        sections.append(
            Section(
                "Is it more than a random direction?",
                [
                    (
                        f"{n['random_directions']} random directions take the place of what the chosen one "
                        f"{DOES[n['first_side']]}, each scaled to the same output energy on the model's own inputs; as "
                        f"many take the place of {MATCHED[n['put_matched']].format(does=DOES[n['put_side']])}. p = "
                        f"0.05 needs that none of them reaches as far{f' without a rise of {harm}' if harm else ''}."
                    ),
                    Plot(randoms_figure(result)),
                    Folded("The numbers", [shown_table(result.randoms)]),
                    Note(
                        "One direction was given and none chosen here; p is right if it was named before the outcomes "
                        "of these units were looked at."
                        if n["given"] and n["candidates"] == 1
                        else "The chosen direction was the best of those that were tried, and p does not account for "
                        "that: it is the p of a direction named beforehand."
                    ),
                ],
            )
        )
        conditions = [f"under which {harm} hardly {'rise' if harm == 'failures' else 'rises'}"] if harm else []
        conditions += ["whose outcomes stay within the curve's range"] if "range" in n else []
        among = "the candidates" + (" " if conditions else "") + " and ".join(conditions)
        those = " The candidates were given." if n["given"] else ""
        sections.append(
            Section(
                "How the direction was chosen",
                [
                    (f"On other {units}: the steepest slope of the {outcome} per dose among {among}.{those}"),
                    shown_table(result.choosing[[*DECIDES, *result.choosing.columns.drop(DECIDES)]]),
                ],
            )
        )
    sections.append(
        Section(
            "What this can and cannot tell",
            [
                "The rules were written down before anything was run (docs/steering.md).",
                Note(
                    "This is one checkpoint in one setting. “None found” is about the directions and doses that were "
                    "tried.",
                    "warning",
                ),
            ],
        )
    )
    plain = ("model", "model_id", "units", "choosing_units", "seed")
    shown = [name for name in n if name in plain or name.startswith("operating_") or name in ("environment", "actions")]
    facts = {name.replace("_", " "): n[name] for name in shown if n.get(name) is not None}
    if "environment" not in n and n.get("place"):
        facts["readout"] = f"{outcome}, {n['place']}"
    title = f"Can one direction steer {n.get('model', 'the model')}?"
    verdict = [f"**{result.verdict.capitalize()}.** {result.sentence}"]
    page = folder / "steering.html"
    return write_report(page, title, sections, verdict=verdict, facts=facts, command=n.get("command", ""))


def steering_figure(result: SteeringResult) -> go.Figure:
    """Draw the mean outcome by point of the curve, if there is one, and by dose, and what must not rise by dose."""
    n = result.numbers
    point = n.get("point")
    by_dose = len(result.table) > 0
    harm = next((name for name in ("failure_rate", "guard") if name in result.curve), None)
    titles = [*([f"by {point}"] if point else []), "by dose", *([f"{n.get('harm', harm)} by dose"] if harm else [])]
    figure = make_subplots(1, len(titles), horizontal_spacing=0.11, subplot_titles=titles)
    first = 2 if point else 1
    if point:
        _line(figure, result.curve, point, "mean", f"by {point}", 1, colour="points")
        low, high = result.curve["mean"].min(), result.curve["mean"].max()
        figure.add_hrect(low, high, row=1, col=2, fillcolor=COLOURS["points"], opacity=0.1, line_width=0)
        figure.update_xaxes(title_text=point, row=1, col=1)
    if by_dose:
        _line(figure, result.table, "dose", "mean", "chosen", first)
        if harm:
            _line(figure, result.table, "dose", harm, "chosen", first + 1, legend=False)
    ends, room = _range(result.curve, result.table)
    for column in range(1, first + 1):
        figure.update_yaxes(range=[ends[0] - room, ends[1] + room], row=1, col=column)
    figure.update_yaxes(title_text=f"mean {n.get('outcome', 'outcome')}", row=1, col=1)
    if harm == "failure_rate":
        figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.03], row=1, col=first + 1)
    for column in range(first, len(titles) + 1):
        figure.update_xaxes(title_text="dose (sigma times)", row=1, col=column)
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    chosen = "no direction was chosen" if result.best is None else result.best.name
    band = "; the band is the curve's range" if point else ""
    return finish(figure, "What a dose does", f"{chosen}{band}", height=420, wide=680)


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
    grey = {"color": "rgb(200,200,200)", "dash": "dot"}
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
        figure.update_xaxes(title_text=f"mean {outcome} at the least dose", row=1, col=column)
    figure.update_xaxes(range=[span[0] - room, span[1] + room])
    figure.update_yaxes(range=[span[0] - room, span[1] + room])
    figure.update_yaxes(title_text=f"mean {outcome} at the largest dose", row=1, col=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    where = {"downstream gain": ", or gain where they write", "length": ", and length where they write"}
    about = "the same output energy" + where.get(str(result.numbers.get("put_matched")), "")
    about += f"; a cross: more {result.numbers.get('harm')}" if rise else ""
    return finish(figure, "Random directions in its place", about, height=440, wide=680)


def _range(*tables: pd.DataFrame) -> tuple[list[float], float]:
    """The least and the largest outcome of tables, ends of intervals included, and some room beyond them."""
    names = ("mean", "mean_low", "mean_high", "lowest", "highest")
    ends = np.concatenate([table[name] for table in tables for name in names if name in table])
    low, high = float(np.nanmin(ends)), float(np.nanmax(ends))  # equal returns have no interval
    return [low, high], 0.05 * (high - low or 1.0)


def _line(
    figure: go.Figure, rows: pd.DataFrame, x: str, y: str, name: str, column: int, legend: bool = True, colour: str = ""
) -> None:
    rows = rows.sort_values(x)
    bars: dict[str, Any] = {
        "type": "data",
        "symmetric": False,
        "array": rows[f"{y}_high"] - rows[y],
        "arrayminus": rows[y] - rows[f"{y}_low"],
    }
    figure.add_trace(
        go.Scatter(
            x=rows[x], y=rows[y], error_y=bars, mode="lines+markers", name=name, showlegend=legend, legendgroup=name,
            line={"color": COLOURS[colour or name]},
        ),
        row=1,
        col=column,
    )  # fmt: skip
