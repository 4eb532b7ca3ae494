"""The court's page and tables: the verdicts, both ways side by side, and what each claim rests on."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

import pandas as pd
import plotly.graph_objects as go

from dt_lens.arguments import local_path, require_offers
from dt_lens.report.page import Block, Chip, Folded, Note, Plot, Section, Table, Words, write_report
from dt_lens.report.style import finish, plain
from dt_lens.study.court.claims import CLAIMS, WAYS, Claim, Verdict, Way
from dt_lens.study.court.result import CourtResult, Ruling
from dt_lens.study.result_files import write_csv_and_json

__all__ = ["effects_figure", "sentences", "write_court"]

NAMES: dict[Way, str] = {"proper": "as it should be", "note": "as the note's code computed it"}
KINDS: dict[Verdict, Literal["yes", "no", "open", "none"]] = {
    "supported": "yes", "not supported": "no", "undecided": "open", "not applicable": "none",
}  # fmt: skip
WORDS = {
    "the note": (
        "the text that this project grew from. It took the singular value decomposition of one decision transformer's "
        "weights, compared singular vectors with the model's embeddings by eye, and edited some. Claims 1 to 7 are its"
    ),
    "K and V": "the note's names for the two matrices of an MLP: K is `W_in`, which reads, and V is `W_out`",
    "OV": "what an attention head reads and writes, as one matrix",
    "statistic, chance": "the number that a claim is about, and what it is where directions are turned at random",
    "margin": "the smallest effect that is of interest, fixed before any claim was tried",
    "control, quiet": "a case in which there should be nothing to find; it is quiet where nothing is found",
    "p (Holm)": "how often chance alone gives an effect as large, corrected for the number of claims",
    "as the note's code computed it": "the same claim with the steps, and the mistakes, of the note's code",
}
FARTHEST = 6.0  # margins that the figure shows
NOTES = 7  # claims up to this number are the note's


def sentences(result: CourtResult) -> list[str]:
    """One line per claim: its verdict and the numbers behind it."""
    return [
        f"**{claim.number}. {claim.title}: {result.ruling(claim.number).verdict}.** "
        f"{_finding(result.ruling(claim.number))}"
        for claim in _claims(result)
    ]


def _finding(ruling: Ruling) -> str:
    """The finding in a sentence, as it follows the verdict."""
    said = ruling.sentence.removeprefix("Not applicable: ")
    return said[:1].upper() + said[1:]


def _counted(result: CourtResult) -> str:
    """How many claims got which verdict."""
    verdicts = [result.ruling(claim.number).verdict for claim in CLAIMS]
    parts = [f"**{verdicts.count(verdict)}** {verdict}" for verdict in KINDS if verdict in verdicts]
    return (
        f"Of {len(verdicts)} claims about singular directions, {', '.join(parts)}, by rules that were written down "
        "before any was tried."
    )


def _chips(result: CourtResult) -> list[Chip]:
    return [
        Chip(
            f"{claim.number}. {claim.title}",
            result.ruling(claim.number).verdict,
            KINDS[result.ruling(claim.number).verdict],
            f"section-{place}",
        )
        for place, claim in enumerate(_claims(result), 2)
    ]


def write_court(result: CourtResult, folder: str | Path) -> Path:
    """Write ``court.html``, ``court.csv`` and ``court.json`` into ``folder``; return the page.

    Raises:
        DtLensError: if they cannot be written.
    """
    require_offers(result, "result", "a CourtResult", "table", "facts", "ruling")
    folder = local_path(folder, "folder")
    write_csv_and_json(folder, "court", result.table, result.to_dict())
    shown = {name: value for name, value in result.facts.items() if name != "command" and value is not None}
    return write_report(
        folder / "court.html",
        f"The court: claims about singular directions, tried on {result.facts.get('model', 'the model')}",
        [_verdicts(result), *(_claim(result, claim.number) for claim in CLAIMS), _rules(result)],
        verdict=[_counted(result)],
        chips=_chips(result),
        asked=[
            "Each claim was tried twice: as it should be computed, and as the code of the note computed it.",
            Folded("What the words on this page mean", [Words(WORDS)]),
        ],
        facts={name.replace("_", " "): value for name, value in shown.items()},
        command=str(result.facts.get("command", "")),
    )


def _claims(result: CourtResult) -> list[Claim]:
    """The claims in the words of the model that they were tried on."""
    return [result.ruling(claim.number).claim for claim in CLAIMS]


def _verdicts(result: CourtResult) -> Section:
    table = result.table
    columns = {
        "claim": "", "title": "claim", "verdict": "verdict", "effect": "effect", "margin": "margin",
        "p_value": "p (Holm)", "note_verdict": "note's way: verdict", "note_effect": "note's way: effect",
        "note_p_value": "note's way: p (Holm)",
    }  # fmt: skip
    return Section(
        "Verdicts",
        [
            Plot(effects_figure(result)),
            Table(
                table[list(columns)],
                "Each claim's effect is in the unit of its own statistic, given below.",
                headings=columns,
            ),
        ],
    )


def effects_figure(result: CourtResult) -> go.Figure:
    """Draw every claim's effect in units of its margin, both ways, with the null's range about 0 or its interval."""
    figure = go.Figure()
    for place, way in enumerate(WAYS):
        x, y, low, high, text, cut = [], [], [], [], [], 0
        for claim in _claims(result):
            found = result.ruling(claim.number, way).found
            if found is None or not math.isfinite(found.effect) or not found.margin > 0:
                continue
            shift = found.statistic - found.effect  # the null's mean; 0 for behaviour
            ends = [(end - shift) / found.margin for end in (found.low, found.high)]
            value = found.effect / found.margin
            cut += abs(value) > FARTHEST
            x.append(max(-FARTHEST, min(FARTHEST, value)))
            y.append(claim.number + (0.16 if place else -0.16))
            low.append(max(-FARTHEST, ends[0]))
            high.append(min(FARTHEST, ends[1]))
            text.append(
                f"{plain(claim.title)}<br>{NAMES[way]}: {result.ruling(claim.number, way).verdict}<br>"
                f"{value:+.2f} margins"
            )
        for i in range(len(x)):
            figure.add_trace(
                go.Scatter(
                    x=[low[i], high[i]], y=[y[i], y[i]], mode="lines", showlegend=False, hoverinfo="skip",
                    line={"width": 5, "color": ("rgba(31,119,180,0.3)", "rgba(214,120,40,0.3)")[place]},
                )
            )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=x, y=y, mode="markers", name=NAMES[way], text=text, hovertemplate="%{text}<extra></extra>",
                marker={"size": 10, "symbol": ("circle", "diamond-open")[place],
                        "color": ("rgb(31,119,180)", "rgb(214,120,40)")[place]},
            )
        )  # fmt: skip
    figure.add_vline(x=0, line_width=1)
    figure.add_vline(x=1, line_width=1, line_dash="dot")
    figure.update_xaxes(title_text="effect, in units of the margin", range=[-FARTHEST - 0.3, FARTHEST + 0.3])
    figure.update_yaxes(
        tickvals=[claim.number for claim in CLAIMS],
        ticktext=[f"{claim.number}. {plain(claim.title)}" for claim in _claims(result)],
        range=[len(CLAIMS) + 0.6, 0.4],
        automargin=True,
    )
    figure.update_layout(legend={"orientation": "h", "y": -0.18})
    subtitle = (
        "bars: for 1, 2, 4, 5, 6, 8 the central 95 % of chance, for 3 and 7 the effect's 95 % interval; dotted: the "
        f"margin; effects beyond {FARTHEST:g} margins are drawn at the edge"
    )
    return finish(figure, "How large each claim's effect is", subtitle, height=460, labels_above=True)


def _claim(result: CourtResult, number: int) -> Section:
    rulings = [result.ruling(number, way) for way in WAYS]
    claim = rulings[0].claim
    rows = [_row(ruling) for ruling in rulings]
    whose = "" if claim.number > NOTES else "The note says, in short: "
    blocks: list[Block] = [f"{whose}{_explained(claim.words)} The statistic: {claim.statistic}."]
    if all(ruling.found is None for ruling in rulings) and len({ruling.reason for ruling in rulings}) == 1:
        blocks.append(f"**{rulings[0].verdict.capitalize()}.** {_finding(rulings[0])}")
    else:
        blocks += [f"**{NAMES[r.way].capitalize()}: {r.verdict}.** {_finding(r)}" for r in rulings]
    if any(ruling.found is not None for ruling in rulings):
        range_of = "the central 95 % of chance" if claim.about == "weights" else "the statistic's 95 % interval"
        blocks.append(Table(pd.DataFrame(rows), f"The range beside a statistic is {range_of}."))
    if any(ruling.found is not None and not ruling.found.quiet for ruling in rulings):
        blocks.append(Note("The control was not quiet, so the verdict cannot be “supported”.", "warning"))
    return Section(f"Claim {number}: {claim.title}", blocks)


def _explained(words: str) -> str:
    """The note's words, with its names of matrices explained.

    >>> _explained("Editing K has a very significant effect; smaller for V.")
    'Editing K (`W_in`) has a very significant effect; smaller for V (`W_out`).'
    """
    words = re.sub(r"\bK\b", "K (`W_in`)", words, count=1)
    return re.sub(r"\bV\b", "V (`W_out`)", words, count=1)


def _row(ruling: Ruling) -> dict[str, object]:
    found = ruling.found
    names = ("statistic", "low", "high", "effect", "margin", "critical")
    numbers = {name: math.nan if found is None else float(getattr(found, name)) for name in names}
    return {
        "computed": NAMES[ruling.way],
        "statistic": numbers["statistic"],
        "statistic_low": numbers["low"],
        "statistic_high": numbers["high"],
        "effect": numbers["effect"],
        "margin": numbers["margin"],
        "critical effect": numbers["critical"],
        "p_value": math.nan if found is None else found.p_value,
        "holm_p": ruling.p_value,
        "control": "–" if found is None else "quiet" if found.quiet else "not quiet",
        "verdict": ruling.verdict,
    }


def _rules(result: CourtResult) -> Section:
    return Section(
        "How verdicts are made",
        [
            (
                "Statistic, null, control, margin and the rule of every claim were written down before any was tried "
                "(docs/court.md). p is one-sided, and Holm's correction runs over the applicable claims of each way."
            ),
            (
                "A claim about weights is supported where its excess over chance reaches the margin, p is below 0.05 "
                "and the control is quiet; it is not supported where the excess stays below the margin and the test "
                "would have seen an excess of that size. A claim about behaviour is supported where its interval lies "
                "above zero, p is below 0.05 and the control is quiet; it is not supported where its interval ends "
                "below the margin. Everything else is undecided."
            ),
            Note(
                "This is one checkpoint and, for claims about behaviour, one setting of its task. A verdict is about "
                "the stated statistic; “supported” does not say that a direction means its label.",
                "warning",
            ),
        ],
    )
