"""The figures of a study: survival, effects beside their controls, damage against cosine. Pure functions of tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go

from dt_lens.behaviour.printing import places
from dt_lens.behaviour.terms import Terms
from dt_lens.errors import DtLensError, nearest
from dt_lens.lens.token_text import spelled
from dt_lens.report.spectra import q_text
from dt_lens.report.style import BASELINE, CONTROL, EDIT, PALETTE, columns_of, empty, finish, kind_of, plain, signed

__all__ = ["damage_against_cosine", "effects", "survival"]

Curve: TypeAlias = Sequence[npt.ArrayLike]  # times, survival, and if known the interval's low and high ends


def survival(
    curves: Mapping[str, Curve],
    *,
    baseline: str | None = None,
    controls: Mapping[str, str] | None = None,
    horizon: float | None = None,
    title: str = "How long the units last",
    step: str = "step",
    units: str = "",
) -> go.Figure:
    """Draw Kaplan-Meier curves (Kaplan and Meier 1958) of the unedited model, edits, and their controls.

    Args:
        curves: for each name ``(times, survival)`` or ``(times, survival, low, high)``, each ``[n]``: times,
            rising; the probability of being alive after them, falling, in [0, 1].
        baseline: the name of the unedited model's curve, drawn thick and grey.
        controls: for each edit's name the name of its control, drawn dotted in the edit's colour.
        horizon: the time limit; every curve is drawn up to it.
        title: the figure's title.
        step: what the times count.
        units: how many units of what a curve is of, such as ``"50 episodes"``.

    Intervals are drawn as bands if given: not the controls', and with more than four edits only the baseline's, since
    bands would hide the curves.

    Raises:
        DtLensError: if the parts of a curve do not fit, or a baseline or control has no curve.
    """
    controls = dict(controls or {})
    for name in ([baseline] if baseline is not None else []) + list(controls) + list(controls.values()):
        if name not in curves:
            raise DtLensError(f"There is no survival curve called {name!r}." + nearest(name, curves))
    if not curves:
        return empty(title, "There are no curves.")
    steps = {name: _steps(name, curve, horizon) for name, curve in curves.items()}
    edits = [name for name in curves if name != baseline and name not in controls.values()]
    beside = [part for edit in edits for part in (edit, controls.get(edit)) if part is not None]
    order = list(dict.fromkeys([*([baseline] if baseline is not None else []), *beside]))
    bands = [name for name in order if name == baseline or (name in edits and len(edits) <= 4)]
    figure = go.Figure()
    for name in order:
        times, alive, low, high = steps[name]
        owner = next((e for e, c in controls.items() if c == name), name)
        colour = BASELINE if name == baseline else PALETTE[edits.index(owner) % len(PALETTE)]
        if name in bands and low is not None and high is not None:
            figure.add_scatter(
                x=np.concatenate([times, times[::-1]]),
                y=np.concatenate([low, high[::-1]]),
                mode="lines",
                line={"width": 0},
                fill="toself",
                fillcolor=_faint(colour),
                hoverinfo="skip",
                showlegend=False,
                legendgroup=owner,
            )
        again = name in edits and edits.index(name) >= len(PALETTE)  # the colours repeat
        dash = "dot" if owner != name else "dash" if again else "solid"
        figure.add_scatter(
            x=times,
            y=alive,
            mode="lines",
            name=plain(name),
            legendgroup=owner,
            line={"color": colour, "width": 4 if name == baseline else 2.2 if owner == name else 1.8, "dash": dash},
            text=[plain(name)] * len(times),
            hovertemplate="%{text}<br>step %{x}: %{y:.1%} running<extra></extra>",
        )
    end = horizon if horizon is not None else max(float(times[-1]) for times, *_ in steps.values())
    figure.update_xaxes(title_text=step, range=[0, end * 1.01])
    figure.update_yaxes(title_text="share still running", range=[-0.02, 1.04], tickformat=".0%")
    figure.update_layout(legend={"tracegroupgap": 4, "groupclick": "togglegroup"})
    kinds = " · ".join(["solid: edits", "dotted: their controls"] if controls else ["Kaplan-Meier estimate"])
    return finish(
        figure,
        title,
        ("thick grey: unedited · " if baseline is not None else "") + kinds + (f" · {units} each" if units else ""),
        height=max(440, 140 + 21 * len(order)),
    )


def effects(
    verdicts: pd.DataFrame,
    terms: Terms,
    *,
    alpha: float = 0.05,
    units: int | None = None,
    links: Sequence[str] | None = None,
    title: str = "What each edit does, beside its control",
) -> go.Figure:
    """Draw each edit's effect on the outcome beside that of its energy-matched control, with intervals.

    Args:
        verdicts: a row per edit with ``matrix sv difference difference_low difference_high control_difference
            control_difference_low control_difference_high``: paired differences of the mean outcome from the
            unedited model and the ends of their intervals. ``role``, ``side``, ``embedding``, ``label``, ``cosine``,
            ``q`` and ``verdict`` are shown if present, and ``change``, what the edit does, where edits are of one
            direction.
        terms: of the evaluations.
        alpha: edits with ``q`` below it have a filled mark, others an open one.
        units: how many units each was measured over.
        links: for each row of ``verdicts`` the id of what a click on it leads to in a page.
        title: the figure's title.

    Raises:
        DtLensError: for a missing column.
    """
    ends = ["difference", "difference_low", "difference_high"]
    columns_of(verdicts, ["matrix", "sv", *ends, *("control_" + e for e in ends)], "The effect plot")
    if verdicts.empty:
        return empty(title, "No edit was measured.")
    rows = verdicts.to_dict("records")
    for row, link in zip(rows, links or [], strict=links is not None):
        row["link"] = link
    if "role" in verdicts:
        rows = [row for role in dict.fromkeys(verdicts["role"]) for row in rows if row["role"] == role]
    real = [bool(row["q"] < alpha) for row in rows] if "q" in verdicts else [True] * len(rows)
    figure = go.Figure()
    for prefix, name, colour, shift, symbol in (
        ("", "edit", EDIT, -0.17, "circle"),
        ("control_", "control of the same energy", CONTROL, 0.17, "diamond"),
    ):
        middle = np.array([row[prefix + "difference"] for row in rows], dtype=np.float64)
        low = np.array([row[prefix + "difference_low"] for row in rows], dtype=np.float64)
        high = np.array([row[prefix + "difference_high"] for row in rows], dtype=np.float64)
        filled = real if not prefix else [True] * len(rows)
        figure.add_scatter(
            x=middle,
            y=(np.arange(len(rows)) + shift).tolist(),  # the page moves them where it is narrow
            mode="markers",
            name=name,
            marker={
                "color": [colour if f else "rgba(0,0,0,0)" for f in filled],
                "size": 11 if not prefix else 9,
                "symbol": symbol,
                "line": {"color": colour, "width": 1.8},
            },
            error_x={
                "type": "data",
                "symmetric": False,
                "array": np.maximum(high - middle, 0),
                "arrayminus": np.maximum(middle - low, 0),
                "color": colour,
                "thickness": 2,
                "width": 4,
            },
            customdata=[_hover_text(row, prefix, terms) for row in rows],
            meta=None if links is None else {"links": [row["link"] for row in rows]},
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.add_vline(x=0, line={"width": 1.5, "color": BASELINE})
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(rows))),
        ticktext=_edit_labels(rows),
        range=[len(rows) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    scale = f", {terms.scale}" if terms.scale else ""
    figure.update_xaxes(title_text=f"change of mean {terms.outcome_name} (paired{scale})", zeroline=False)
    for border in range(1, len(rows)):
        turn = "role" in verdicts and rows[border]["role"] != rows[border - 1]["role"]
        figure.add_hline(
            y=border - 0.5, line={"width": 1.5 if turn else 0.5, "color": BASELINE}, opacity=0.9 if turn else 0.35
        )
    figure.update_layout(legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom"})
    over = f"the same {terms.units}" if units is None else f"the same {units:,} {terms.units}"
    about = f"against the unedited {terms.actor} on {over} · bars: 95 % intervals" + (
        f" · filled circles: unlike the control, q < {alpha:g}" if "q" in verdicts else ""
    )
    return finish(figure, title, about, height=46 * len(rows) + 170, labels_above=True)


def damage_against_cosine(
    verdicts: pd.DataFrame,
    terms: Terms,
    *,
    beyond_control: bool = True,
    spearman: tuple[float, float, float] | None = None,
    title: str = "Does cosine predict damage?",
) -> go.Figure:
    """Draw each edit's damage against the absolute cosine of the edited direction's best match.

    Args:
        verdicts: a row per edit with ``matrix sv cosine`` and either ``damage_beyond_control`` (positive where the edit
            hurts more than its control; ``beyond_low``, ``beyond_high`` are drawn if present) or ``difference``.
        terms: of the evaluations.
        beyond_control: draw ``damage_beyond_control``; otherwise the damage against the unedited model.
        spearman: the rank correlation and the ends of its interval for the title; computed, without an interval, by
            default.
        title: the beginning of the figure's title.

    Raises:
        DtLensError: for a missing column.
    """
    value = "damage_beyond_control" if beyond_control else "difference"
    columns_of(verdicts, ["matrix", "sv", "cosine", value], "Damage against cosine")
    if verdicts.empty:
        return empty(title, "No edit was measured.")
    cosine = verdicts["cosine"].abs().to_numpy(dtype=np.float64)
    damage = verdicts[value].to_numpy(dtype=np.float64) * (1 if beyond_control else -terms.sign)
    ends = ("beyond_low", "beyond_high") if beyond_control else ("difference_high", "difference_low")
    ends = ends if beyond_control or terms.sign > 0 else ends[::-1]
    bars = all(end in verdicts for end in ends)
    low, high = (
        (verdicts[e].to_numpy(dtype=np.float64) * (1 if beyond_control else -terms.sign) for e in ends)
        if bars
        else (damage, damage)
    )
    kinds = [kind_of(str(m))[0] for m in verdicts["matrix"]]
    roles = [str(r) for r in verdicts["role"]] if "role" in verdicts else [""] * len(verdicts)
    figure = go.Figure()
    figure.add_hline(y=0, line={"width": 1.5, "color": BASELINE})
    hover = [_hover_text(row, "", terms) for row in verdicts.to_dict("records")]
    for number, kind in enumerate(dict.fromkeys(kinds)):
        at = np.array([k == kind for k in kinds])
        colour = PALETTE[number % len(PALETTE)]
        figure.add_scatter(
            x=cosine[at],
            y=damage[at],
            mode="markers",
            name=plain(kind),
            marker={
                "color": [colour if r != "weak" else "rgba(0,0,0,0)" for r, a in zip(roles, at, strict=True) if a],
                "size": 11,
                "line": {"color": colour, "width": 1.8},
            },
            error_y={
                "type": "data",
                "symmetric": False,
                "array": np.maximum(high - damage, 0)[at],
                "arrayminus": np.maximum(damage - low, 0)[at],
                "color": colour,
                "thickness": 1.5,
                "width": 3,
                "visible": bars,
            },
            customdata=[text for text, a in zip(hover, at, strict=True) if a],
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.update_xaxes(title_text="|cosine| of the direction's best match", rangemode="tozero")
    scale = f" ({terms.scale})" if terms.scale else ""
    figure.update_yaxes(
        title_text=f"{terms.lost} beyond the control{scale}"
        if beyond_control
        else f"{terms.lost} against the unedited {terms.actor}{scale}",
        zeroline=False,
    )
    figure.update_layout(legend_title_text="matrix", showlegend=True)
    about = f"one point for each of {len(verdicts)} edits" + (" · bars: 95 % intervals" if bars else "")
    about += " · open: contrasts, poor in match" if "weak" in roles else ""
    return finish(figure, f"{title} {_correlation(cosine, damage, spearman)}", about, height=480)


def _steps(name: str, curve: Curve, horizon: float | None) -> tuple[npt.NDArray[np.float64], ...]:
    """The corners of a step curve from (0, 1) to the horizon: times, survival, and low and high or ``None``."""
    parts = [np.asarray(part, dtype=np.float64) for part in curve if part is not None]
    if len(parts) not in (2, 4) or any(part.ndim != 1 or part.shape != parts[0].shape for part in parts):
        raise DtLensError(
            f"The survival curve {name!r} must be (times, survival) or (times, survival, low, high) of one length."
        )
    times = parts[0]
    if (np.diff(times) < 0).any() or (times < 0).any():
        raise DtLensError(f"The times of the survival curve {name!r} must rise from 0 on.")
    end = max(float(times[-1]) if len(times) else 0.0, horizon or 0.0)
    corners = np.concatenate([[0.0], np.repeat(times, 2), [end]])
    out: list[Any] = [corners]
    for part in parts[1:]:
        before = np.concatenate([[1.0], part[:-1]]) if len(part) else part
        out.append(np.concatenate([[1.0], np.stack([before, part], 1).ravel(), part[-1:] if len(part) else [1.0]]))
    return (*out, None, None)[:4]


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def _edit_labels(rows: Sequence[Mapping[Any, Any]]) -> list[str]:
    """A label for each edit; those of one direction also say what each does, or which edit of the list it is."""
    labels = [_edit_label(row) for row in rows]
    for said in ("change", "number"):
        again = [labels.count(label) > 1 for label in labels]
        for at, row in enumerate(rows):
            if again[at] and (said == "number" or _has(row, "change")):
                more = f"edit {at + 1}" if said == "number" else plain(row["change"])
                labels[at] += f"{' · ' if '<br>' in labels[at] else '<br>'}{more}"
    return labels


def _edit_label(row: Mapping[Any, Any]) -> str:
    """An edit in two lines for an axis: its place, and what the direction matched."""
    two_sided = kind_of(str(row["matrix"]))[0] in ("OV", "QK")
    side = f" {plain(row['side'])}" if two_sided and _has(row, "side") else ""
    first = f"<b>{plain(row['matrix'])}</b>{side} · sv {row['sv']}"
    match = f"{row['embedding']} " if _has(row, "embedding") else ""
    match += (
        f"{spelled(str(row['label']))} {signed(row['cosine'])}" if _has(row, "label") and _has(row, "cosine") else ""
    )
    second = ": ".join(part for part in (str(row["role"]) if _has(row, "role") else "", match.strip()) if part)
    return first + (f"<br><i>{plain(_shortened(second))}</i>" if second else "")


def _has(row: Mapping[Any, Any], key: str) -> bool:
    """Whether a row has a value for ``key``."""
    return key in row and not pd.isna(row[key]) and row[key] != ""


def _shortened(text: str, most: int = 44) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _hover_text(row: Mapping[Any, Any], prefix: str, terms: Terms) -> str:
    """What the hover shows of an edit or, with a prefix, of its control."""
    where = f"<b>{plain(row['matrix'])}</b>, sv {row['sv']}" + (f", {plain(row['side'])}" if _has(row, "side") else "")
    lines = [("control of " if prefix else "") + where]
    if _has(row, "label") and _has(row, "cosine"):
        lines.append(
            f"{plain(row.get('embedding', ''))}: {plain(spelled(str(row['label'])))}, cosine {row['cosine']:+.3f}"
        )
    measured = {
        f"change of {terms.outcome_name}": (
            prefix + "difference",
            prefix + "difference_low",
            prefix + "difference_high",
        )
    }
    if not prefix:
        measured[f"{terms.lost} beyond the control"] = ("damage_beyond_control", "beyond_low", "beyond_high")
    for what, (middle, low, high) in measured.items():
        if _has(row, middle):
            sizes = [float(row[name]) for name in (middle, low, high) if _has(row, name)]
            k = places(*sizes) if terms.digits is None else terms.digits
            between = f" [{row[low]:,.{k}f}, {row[high]:,.{k}f}]" if _has(row, low) and _has(row, high) else ""
            lines.append(f"{what} {row[middle]:,.{k}f}{between}")
    if _has(row, prefix + "failure_rate"):
        lines.append(f"failure rate {100 * row[prefix + 'failure_rate']:.0f} %")
    if not prefix and _has(row, "q"):
        lines.append(f"q {q_text(row['q'])}")
    if not prefix and _has(row, "verdict"):
        lines.append(plain(row["verdict"]))
    return "<br>".join(lines)


def _correlation(
    cosine: npt.NDArray[np.float64], damage: npt.NDArray[np.float64], given: tuple[float, float, float] | None
) -> str:
    """Spearman's rank correlation, for the title."""
    if given is not None:
        between = "" if np.isnan(given[1]) else f" [{signed(given[1])}, {signed(given[2])}]"
        return f"Spearman ρ = {signed(given[0])}{between}"
    both = np.isfinite(cosine) & np.isfinite(damage)
    if both.sum() < 3 or np.ptp(cosine[both]) == 0 or np.ptp(damage[both]) == 0:
        return "Too few different edits for a correlation"
    from scipy.stats import spearmanr

    return f"Spearman ρ = {signed(float(spearmanr(cosine[both], damage[both]).statistic))} ({int(both.sum())} edits)"
