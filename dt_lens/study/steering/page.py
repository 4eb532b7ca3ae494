"""The page and tables of a search for a steering direction: the answer, doses, random directions, what was tried."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dt_lens.arguments import local_path, require_offers
from dt_lens.behaviour.printing import about_interval, places, span
from dt_lens.report.page import Block, Folded, Note, Plot, Section, Table, Words, write_report
from dt_lens.study.result_files import write_csv_and_json
from dt_lens.study.sentences import place
from dt_lens.study.steering.doses import DOES
from dt_lens.study.steering.figures import answer_figure, randoms_figure, steering_figure
from dt_lens.study.steering.result import SteeringResult
from dt_lens.study.steering.verdict import ALPHA

__all__ = ["randoms_figure", "steering_figure", "write_steering"]

# Where the chosen direction puts what it reads, and in what random ones there are like it.
MATCHED = {
    "output energy": "what it {does}, with the same length, so that the output energy is the same",
    "downstream gain": "where it writes, each scaled to the same gain into what reads the stream later",
    "length": "where it writes, with the same length: no later matrix reads that, only the output does",
}


def write_steering(result: SteeringResult, folder: str | Path) -> Path:
    """Write ``steering.html``, ``steering.csv`` and ``steering.json`` into ``folder``; return the page.

    Raises:
        DtLensError: if they cannot be written.
    """
    require_offers(result, "result", "a SteeringResult", "table", "curve", "numbers")
    folder = local_path(folder, "folder")
    write_csv_and_json(folder, "steering", result.table, result.to_dict())
    n = result.numbers
    plain = ("model", "model_id", "environment", "units", "choosing_units", "random_units", "seed")
    shown = [name for name in n if name in plain or name.startswith("operating_") or name == "actions"]
    facts = {
        _fact(name, n): f"{n[name]:g}" if isinstance(n[name], float) else n[name]
        for name in shown
        if n.get(name) is not None
    }
    if len(result.table):
        facts["doses"] = ", ".join(f"{dose:g}" for dose in result.table["dose"])
    if "environment" not in n and n.get("place"):
        facts["readout"] = f"{n.get('outcome')}, {n['place']}"
    return write_report(
        folder / "steering.html",
        f"Can one direction steer {n.get('model', 'the model')}?",
        [_doses(result), *_randoms(result), *_chosen(result), _rules(result)],
        verdict=_answer(result),
        picture=[Plot(answer_figure(result))],
        asked=_asked(result),
        facts=facts,
        command=n.get("command", ""),
    )


def _fact(name: str, numbers: Any) -> str:
    units = numbers.get("lasting_unit", "units")
    named = {
        "units": f"{units} a dose", "choosing_units": f"{units} a dose while choosing",
        "random_units": f"{units} a random direction",
    }  # fmt: skip
    return named.get(name, name.replace("_", " "))


def _answer(result: SteeringResult) -> list[str]:
    """The answer in at most three sentences: how far the doses reach, at what cost, and beside random directions."""
    n, best = result.numbers, result.best
    if best is None or not len(result.table):
        return [f"**{result.verdict.capitalize()}.** {result.sentence}"]
    outcome, harm = n.get("outcome", "outcome"), n.get("harm")
    means = result.table.sort_values("dose")
    k = _digits(means["mean"])
    low, high = (means.iloc[at] for at in (0, -1))
    among = f"the best of {n['candidates']} directions" if n["candidates"] > 1 else "the one direction that was tried"
    numbers = " to ".join(_number(row["mean"], k) for row in (low, high))
    if "point" in n:
        reach = f"**{_percent(n['reach'], n['reach_interval'])}** of what the {n['point']} moves"
    else:
        reach = f"**{n['reach']:+.3f}**{_in(n)} {span(n['reach_interval'], digits=3, sign=True)}"
    against = " (against the sign that it had when it was chosen)" if n["reach"] < 0 else ""
    first = (
        f"**{result.verdict.capitalize()}**: with {among}, {place(best.matrix)} sv {best.sv}, doses of {low['dose']:g} "
        f"to {high['dose']:g} times its sigma move the mean {outcome} from {numbers}, a reach of {reach}{against}."
    )
    said = [first]
    if harm and "rise" in n:
        small = "failure_rate" in result.table
        risen = (
            _percent(n["rise"], n["rise_interval"])
            if small
            else f"{n['rise']:+.3f}{_in(n, 'harm_scale')} {span(n['rise_interval'], digits=3, sign=True)}"
        )
        bound = f"{100 * n['rise_limit']:.0f} %" if small else f"{n['rise_limit']:g}"
        said.append(
            f"{'Failures rise' if small else f'The {harm} rises'} by **{risen}**"
            f"{' on average over the doses' if small else ' at the worst dose'}; the bound is {bound}."
        )
    sides = [
        f"**{n[f'{name}_as_far']} of {n['random_directions']}** reach as far in place of what it {DOES[n[side]]} "
        f"(p = {n[f'{name}_p_value']:.2g})"
        for name, side in (("read", "first_side"), ("put", "put_side"))
    ]
    does = [DOES[n["first_side"]], DOES[n["put_side"]]]
    more = [n[f"{name}_p_value"] <= ALPHA for name in ("read", "put")]
    meaning = {
        (True, True): "so this direction does more than random ones",
        (False, False): "so random directions may do as much",
        (True, False): f"so what it {does[0]} does more than random directions, and what it {does[1]} may not",
        (False, True): f"so what it {does[1]} does more than random directions, and what it {does[0]} may not",
    }[more[0], more[1]]
    return [*said, f"Of random directions {sides[0]} and {sides[1]}, {meaning}."]


def _digits(values: pd.Series[float]) -> int:
    """How many decimals means have: so that what lies between them shows."""
    return max(places(*values), places(float(np.ptp(values))) - 1)


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}".replace("-", "−")


def _in(numbers: Any, name: str = "scale") -> str:
    return f" {numbers[name]}" if numbers.get(name) else ""


def _percent(value: float, interval: Any) -> str:
    return f"{100 * value:+.0f} % {span(interval, percent=True, digits=0, sign=True)}"


def _asked(result: SteeringResult) -> list[Block]:
    """What was asked and done, for a reader who has not read the docs, and what the words mean."""
    n = result.numbers
    outcome, harm, units = n.get("outcome", "outcome"), n.get("harm"), n.get("lasting_unit", "units")
    without = f" without making {'the ' if harm != 'failures' else ''}{harm} worse" if harm else ""
    along = f", as the {n['point']} does that it is given" if "point" in n else ""
    said = (
        f"A matrix of the model is a sum of singular directions. Can making one of them larger or smaller move the "
        f"{outcome}{along},{without or ' and nothing else'}? Each candidate was dosed: its sigma was multiplied by "
        f"several numbers, and everything else stayed. The one with the steepest slope was taken, and measured on "
        f"other {units} beside random directions that were dosed in its place."
    ).replace(",, ", ", ")
    meanings = {
        "direction, sv": (
            "a matrix is a sum of directions, each of which reads one vector, multiplies by its sigma and writes "
            "another; sv numbers them from 0 on, the largest sigma first"
        ),
        "dose": "what sigma is multiplied by; 1 is the unedited model, 0 takes the direction away",
        "slope": f"the change of the {outcome} per unit of dose, by least squares over the doses",
        "reach": (
            "the slope times the range of the doses"
            + (f", as a share of the curve's range: what the {n['point']} moves" if "point" in n else "")
            + "; its sign is that of the slope when the direction was chosen"
        ),
        **(
            {"curve": f"the mean {outcome} of the unedited model at each {n['point']} that it may be given"}
            if "point" in n
            else {}
        ),
        "read and write": (
            "the side on which a direction faces the stream that the blocks share: W_in reads from it, W_out writes to "
            "it, OV does both"
        ),
        "output energy": "the mean square of what a change adds to a matrix's output, on the model's own inputs",
        "set aside": (
            "not taken, however steep, because "
            + " or ".join(
                [
                    *([f"{harm} {'rise' if harm == 'failures' else 'rises'} by more than the bound"] if harm else []),
                    *(["outcomes leave the curve's range"] if "point" in n else []),
                ]
            )
            if harm or "point" in n
            else "not taken, however steep"
        ),
        "p": (
            "one more than the number of random directions that reach as far, divided by one more than all of them: "
            "0.05 at the least with 19"
        ),
        "interval": f"the 95 % bootstrap interval of the mean over {units}",
    }
    return [said, Folded("What the words on this page mean", [Words(meanings)])]


def _shown(frame: pd.DataFrame, result: SteeringResult, caption: str = "") -> Table:
    """A table in which each interval stands below what it is of."""
    n = result.numbers
    harm, outcome = str(n.get("harm", "")), n.get("outcome", "outcome")
    headings = {
        "mean": f"mean {outcome}", "failure_rate": "failed", "guard": harm, "guard_rise": f"rise of {harm}",
        "failure_rise": "rise of failures", "lowest": f"{outcome} at the least dose",
        "highest": f"{outcome} at the largest dose", "set_aside": "set aside",
    }  # fmt: skip
    formats = {name: f",.{_digits(frame[name])}f" for name in ("mean", "guard", "lowest", "highest") if name in frame}
    named = {name: said for name, said in headings.items() if name in frame}
    if "why" in frame:  # while choosing: over all doses
        named |= {"lowest": f"lowest {outcome}", "highest": f"highest {outcome}"}
        named.pop("set_aside", None)
    return Table(frame, caption, named, formats)


def _doses(result: SteeringResult) -> Section:
    n = result.numbers
    units = str(n.get("lasting_unit", "units"))
    of_curve = f"The unedited model at each {n['point']}." if "point" in n else "The unedited model."
    if not len(result.table):
        return Section("The curve", [Plot(steering_figure(result)), _shown(result.curve, result, of_curve)])
    curve = _shown(result.curve, result, of_curve)
    return Section(
        "What a dose does",
        [
            Plot(steering_figure(result)),
            _shown(result.table, result, f"Doses of the chosen direction on fresh {units}; in grey 95 % intervals."),
            *(
                Note(about_interval(f"The interval of {what}", n[name]))
                for name, what in (("reach_note", "the reach"), ("rise_note", f"the rise of {n.get('harm')}"))
                if n.get(name)
            ),
            Folded("The unedited model" + (f" at each {n['point']}" if "point" in n else ""), [curve]),
        ],
    )


def _randoms(result: SteeringResult) -> list[Section]:
    n, harm = result.numbers, result.numbers.get("harm")
    if not len(result.table):
        return []
    both = (
        f"{n['random_directions']} random directions take the place of what the chosen one {DOES[n['first_side']]}, "
        "each scaled to the same output energy on the model's own inputs; as many take the place of "
        f"{MATCHED[n['put_matched']].format(does=DOES[n['put_side']])}. p = 0.05 needs that none of them reaches as "
        f"far{f' without a rise of {harm}' if harm else ''}."
    )
    given = (
        "One direction was given and none chosen here; p is right if it was named before the outcomes of these units "
        "were looked at."
        if n["given"] and n["candidates"] == 1
        else "The chosen direction was the best of those that were tried, and p does not account for that: it is the p "
        "of a direction named beforehand."
    )
    numbers = Folded("The numbers", [_shown(result.randoms, result)])
    return [Section("Is it more than a random direction?", [both, Plot(randoms_figure(result)), numbers, Note(given)])]


def _chosen(result: SteeringResult) -> list[Section]:
    n, harm = result.numbers, result.numbers.get("harm")
    if not len(result.choosing):
        return []
    conditions = [f"under which {harm} hardly {'rise' if harm == 'failures' else 'rises'}"] if harm else []
    conditions += ["whose outcomes stay within the curve's range"] if "range" in n else []
    among = "the candidates" + (" " if conditions else "") + " and ".join(conditions)
    those = " The candidates were given." if n["given"] else ""
    said = f"On other {n.get('lasting_unit', 'units')}: the steepest slope of the {n.get('outcome')} per dose among "
    table = result.choosing
    first = ["matrix", "sv", "set_aside"]  # the table is wide, and this decides
    table = table[[*first, *table.columns.drop(first)]]
    table = table.drop(columns=[name for name in ("cosine",) if table[name].isna().all()])
    return [Section("How the direction was chosen", [f"{said}{among}.{those}", _shown(table, result)])]


def _rules(result: SteeringResult) -> Section:
    """The verdict by the rules that were written down, and what it cannot say."""
    n = result.numbers
    least = n.get("least", math.nan)
    reach = f"{100 * least:.0f} % of the curve's range" if "point" in n else f"{least:.3g}{_in(n)}"
    return Section(
        "What this can and cannot tell",
        [
            (
                "The rules were written down before anything was run (docs/steering_registered.md). The smallest reach "
                f"of interest is {reach}. By these rules:"
            ),
            Note(f"**{result.verdict.capitalize()}.** {result.sentence}"),
            Note(
                "This is one checkpoint in one setting. “None found” is about the directions and doses that were "
                "tried.",
                "warning",
            ),
        ],
    )
