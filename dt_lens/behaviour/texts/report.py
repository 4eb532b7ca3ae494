"""What a report shows of a language model beyond tables: losses by window, KL, tokens that moved, a coloured text."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from dt_lens.behaviour.arms import Arms
from dt_lens.behaviour.texts.moved import Moved, moved_frame
from dt_lens.behaviour.texts.reading import token_losses
from dt_lens.behaviour.texts.windows import Windows
from dt_lens.lens.forward_mode import measuring
from dt_lens.lens.token_text import spelled
from dt_lens.report.page import Folded, Markup, Note, Plot, Section, Table
from dt_lens.report.style import BASELINE, CONTROL, EDIT, finish, plain
from dt_lens.statistics.outcomes import bootstrap_interval

__all__ = ["coloured", "text_sections"]

ORANGE, BLUE = "213,94,0", "0,114,178"
STRONGEST = 0.6  # opacity of the largest change
TOKENS = 10  # of those that moved either way


def text_sections(arms: Arms, windows: Windows) -> list[Section]:
    """The sections, in the order of a report."""
    return [_windows(arms), _moved(arms), *_example(arms, windows)]


def _windows(arms: Arms) -> Section:
    kl = [
        {
            "edit": name,
            "KL": float(edited.columns["kl"].mean()),
            "low": bootstrap_interval(edited.columns["kl"]).low,
            "high": bootstrap_interval(edited.columns["kl"]).high,
            "KL of the control": float(control.columns["kl"].mean()),
            "control_low": bootstrap_interval(control.columns["kl"]).low,
            "control_high": bootstrap_interval(control.columns["kl"]).high,
        }
        for name, edited, control in zip(arms.names, arms.edited, arms.controls, strict=True)
    ]
    return Section(
        "Loss and KL, window by window",
        [
            Plot(_changes(arms), "Every point is one window of text; the box holds the middle half."),
            Plot(_kl(pd.DataFrame(kl))),
            Folded(
                "The numbers",
                [
                    Table(
                        pd.DataFrame(kl),
                        "Mean KL of the edited model from the unedited one, in nats per token, with 95 % intervals.",
                        intervals={"KL": ("low", "high"), "KL of the control": ("control_low", "control_high")},
                    )
                ],
            ),
        ],
    )


def _changes(arms: Arms) -> go.Figure:
    figure = go.Figure()
    for name, group, colour in (("edit", arms.edited, EDIT), ("its control", arms.controls, CONTROL)):
        losses = [arms.damage(arm) for arm in group]
        figure.add_box(
            y=np.repeat([plain(edit) for edit in arms.names], [len(row) for row in losses]),
            x=np.concatenate(losses),
            name=name,
            orientation="h",
            boxpoints="all",
            jitter=0.6,
            pointpos=0,
            marker={"color": colour, "size": 3, "opacity": 0.45},
            line={"color": colour, "width": 1.6},
            fillcolor="rgba(0,0,0,0)",
            hovertemplate="%{y}<br>loss %{x:+.4f}<extra></extra>",
        )
    figure.add_vline(x=0, line={"width": 1.5, "color": BASELINE})
    figure.update_layout(boxmode="group", legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"})
    figure.update_xaxes(title_text="change of loss, nats per token")
    figure.update_yaxes(autorange="reversed")
    height = 170 + 62 * len(arms.names)
    title, about = "Loss per window", "against the unedited model on the same windows"
    return finish(figure, title, about, height=height, labels_above=True)


def _kl(rows: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for column, low, high, name, colour, symbol in (
        ("KL", "low", "high", "edit", EDIT, "circle"),
        ("KL of the control", "control_low", "control_high", "its control", CONTROL, "diamond"),
    ):
        # Equal values have no interval.
        above, below = (rows[high] - rows[column]).fillna(0), (rows[column] - rows[low]).fillna(0)
        figure.add_scatter(
            x=rows[column],
            y=[plain(name) for name in rows["edit"]],
            mode="markers",
            name=name,
            marker={"color": colour, "size": 10, "symbol": symbol},
            error_x={"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": colour},
            hovertemplate="%{y}<br>KL %{x:.4g}<extra></extra>",
        )
    figure.update_xaxes(title_text="KL from the unedited model, nats per token", rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"})
    height = 170 + 40 * len(rows)
    return finish(figure, "KL from the unedited model", "mean over windows", height=height, labels_above=True)


def _moved(arms: Arms) -> Section:
    blocks: list[Any] = [
        "Mean probability over all predicted positions: the tokens that gained and that lost most under each edit."
    ]
    order = list(range(len(arms.names)))
    if arms.worst is not None:
        order.sort(key=lambda number: number != arms.worst)
    for place, number in enumerate(order):
        moved = tuple(Moved(*row) for row in arms.edited[number].details.get("moved", ()))
        table = Table(moved_frame(moved, TOKENS), f"{arms.names[number]}.", formats={"change": "+.2g"})
        blocks.append(table if place == 0 else Folded(arms.names[number], [table]))
    return Section("The tokens that moved", blocks)


def _example(arms: Arms, windows: Windows) -> list[Section]:
    worst = arms.worst
    if worst is None:
        return []
    unit = int(arms.baseline.units[arms.typical(worst)])
    with measuring(arms.model):
        before = token_losses(arms.model, windows, unit)
        with arms.edits[worst]:
            after = token_losses(arms.model, windows, unit)
    words = [arms.model.tokenizer.decode([token]) for token in windows.tokens[unit].tolist()]
    title = f"One window under {arms.names[worst]}"
    about = (
        f"Window {unit} under {arms.names[worst]}, the worst edit: the window in which it does its median damage. "
        "Orange tokens lost probability, blue ones gained; hovering shows the loss before and after. The strongest "
        f"colour is a change of {np.abs(after - before).max():.2f} nats."
    )
    return [Section(title, [Markup(coloured(words, before, after)), Note(about)], picture=True)]


def coloured(words: list[str], before: NDArray[np.float64], after: NDArray[np.float64]) -> str:
    """A text as HTML, each token coloured by its change of loss.

    Args:
        words: every token's text, those that nothing predicts first.
        before, after: ``[predicted]``, the losses of the last tokens, in nats.
    """
    change = after - before
    top = float(np.abs(change).max()) or 1.0
    unpredicted = len(words) - len(change)
    parts = [_token(word, "", "not predicted") for word in words[:unpredicted]]
    for word, one, other, moved in zip(words[unpredicted:], before, after, change, strict=True):
        colour = f"background:rgba({ORANGE if moved > 0 else BLUE},{STRONGEST * abs(moved) / top:.2f})"
        said = f"{spelled(word)}: {one:.3f} to {other:.3f} nats, {moved:+.3f}"
        parts.append(_token(word, colour, said))
    style = "line-height:1.9;white-space:pre-wrap;overflow-wrap:anywhere;font-family:ui-monospace,monospace"
    return f'<div style="{style}">{"".join(parts)}</div>'


def _token(word: str, style: str, title: str) -> str:
    given = f' style="{style};border-radius:3px"' if style else ""
    return f'<span{given} title="{escape(title, quote=True)}">{escape(word)}</span>'
