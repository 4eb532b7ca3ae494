"""The report of a study: its page and its tables."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dt_lens.arguments import atomic_write, local_path
from dt_lens.behaviour.printing import about_interval, decimals
from dt_lens.edits.edit import Edit
from dt_lens.lens.token_text import spelled
from dt_lens.report.page import Block, Folded, Markup, Note, Plot, Section, Table, Words, write_report
from dt_lens.report.tables import anchor_of
from dt_lens.statistics.outcomes import interval_note
from dt_lens.study import figures
from dt_lens.study.clusters import cluster_section
from dt_lens.study.matches import match_section, spelled_labels
from dt_lens.study.result import StudyResult
from dt_lens.study.sentences import DOES, correlation, sentences, unchanged
from dt_lens.study.words import words_of
from dt_lens.svd.token_page import token_html
from dt_lens.version import __version__

__all__ = ["sentences", "write_study"]

MANY = 64  # labels of an embedding from which on both ends of each edited direction are shown in words
ROLES = {"strong": "best match", "weak": "contrast", "first": "first direction", "given": ""}
MANY_KINDS = 5  # of edits, from which on they are not listed
LASTING = 0.9  # of the units of every arm: then survival is said, and its curves are folded away


def write_study(result: StudyResult, folder: str | Path) -> Path:
    """Write ``report.html``, ``scan.csv``, ``verdicts.csv`` and, if any, ``clusters.csv``; return the page.

    Raises:
        DtLensError: if they cannot be written.
    """
    folder = local_path(folder, "folder")
    for name, table in (("scan", result.table), ("verdicts", result.verdicts), ("clusters", result.clusters)):
        if not isinstance(table, pd.DataFrame):
            continue
        with atomic_write(folder / f"{name}.csv") as part:
            table.to_csv(part, index=False)
    base, facts = result.baseline, result.facts
    model = facts.get("model", "the model")
    picture = next((section for section in result.sections if section.picture), None)
    return write_report(
        folder / "report.html",
        f"What the weights of {model} do",
        [
            _effects(result),
            _matches(result),
            *_labels(result),
            *([] if result.clusters is None else [cluster_section(result.clusters, result.svd)]),
            *_survival(result),
            *(section for section in result.sections if section is not picture),
            _unedited(result),
            _method(result),
        ],
        verdict=sentences(result),
        picture=[] if picture is None else picture.blocks,
        below=[] if unchanged(result) else [_forest(result)],
        asked=_asked(result),
        facts={
            "model": model,
            **{
                base.terms.named(name): f"{value:g}" if isinstance(value, float) else value
                for name, value in base.terms.setting.items()
                if isinstance(value, str | int | float)
            },
            f"{base.terms.units} per arm": len(base),
            "arms": 1 + 2 * len(result.edits),
            "seed": facts.get("seed"),
            "edit": _what_edits_do(result.edits),
            "versions": f"dt-lens {__version__}, {_versions(facts.get('software', ()))}",
            **({"note": " ".join(base.notes)} if base.notes else {}),
        },
        command=facts.get("command", ""),
    )


def _versions(software: Any) -> str:
    from importlib.metadata import version

    packages = (f"{name} {version(name)}" for name in software)
    return ", ".join([f"Python {platform.python_version()}", *packages])


def _what_edits_do(edits: Sequence[Edit]) -> str:
    """What becomes of the directions, in words: of a user's own edits each may do something else."""
    found: dict[str, None] = {}
    for edit in edits:
        value = getattr(edit, "value", None)
        if isinstance(value, int | float):
            found[f"sigma is multiplied by {value:g}"] = None
        elif isinstance(value, str | Mapping):
            found[f"the singular vector becomes {value!r}"] = None
        else:
            found["a vector that was given" if isinstance(value, list) else f"a {type(edit).__name__}"] = None
    return "; ".join(found) if len(found) < MANY_KINDS else "differs from edit to edit"


def _asked(result: StudyResult) -> list[Block]:
    """What was asked and done, for a reader who has not read the docs."""
    terms, roles = result.baseline.terms, result.verdicts["role"]
    counts = {role: int((roles == role).sum()) for role in ROLES}
    chosen = [
        f"{counts[role]} {one if counts[role] == 1 else many}"
        for role, one, many in (
            ("strong", "direction that matches a label best", "directions that match a label best"),
            (
                "weak",
                "contrast in the same matrix, which matches nothing well",
                "contrasts in the same matrices, which match nothing well",
            ),
            (
                "first",
                "direction that is the largest of its kind of matrix",
                "directions that are the largest of their kind of matrix",
            ),
            ("given", "edit that was given", "edits that were given"),
        )
        if counts[role]
    ]
    took, how = ("took", "") if counts["given"] else ("chose", ", by a rule that looks at the weights alone")
    return [
        (
            "A matrix of the model is a sum of singular directions, and some of them match what the model puts out or "
            f"is given. Does the model need those more than others? The study {took} {_listed(chosen)}{how}, changed "
            f"each, and measured the {terms.outcome_name} of the same {len(result.baseline)} "
            f"{terms.units} unedited, under each edit, and under a random change of the same size in the same place. "
            "That change is the control: it shows what any damage of this size does there."
        ),
        Folded("What the words on this page mean", [Words(words_of(terms))]),
    ]


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _unedited(result: StudyResult) -> Section:
    base, terms = result.baseline, result.baseline.terms
    summary = base.summary()
    k = decimals(*base.outcomes) if terms.digits is None else terms.digits
    scale = f" ({terms.scale})" if terms.scale else ""
    rows = [
        (f"mean {terms.outcome_name}{scale}", f"{summary['mean']:,.{k}f}", _interval(summary["mean_interval"], k)),
        ("interquartile mean", f"{summary['iqm']:,.{k}f}", _interval(summary["iqm_interval"], k)),
        (f"standard deviation of {terms.outcomes}", f"{summary['std']:,.{k}f}", ""),
    ]
    if terms.lasts is not None:
        rows.append((f"mean length ({terms.step}s)", f"{summary['mean_length']:,.1f}", ""))
    if terms.failure is not None:
        failed = f"failed ({summary['failure_rule']})"
        rows.append((failed, f"{100 * summary['failure_rate']:.1f} %", _interval(summary["failure_interval"], None)))
    for name, said in base.more_rows(summary):
        value, _, interval = said.partition("  ")
        rows.append((name, value, interval.strip("[]").replace(", ", " to ")))
    frame = pd.DataFrame(rows, columns=[f"unedited {terms.actor}", "value", "95 % interval"])
    first, last = base.units[0], base.units[-1]
    return Section(
        f"The unedited {terms.actor}",
        [
            Table(frame, f"{terms.place}: {len(base)} {terms.units}{terms.of_size}, {terms.index} {first} to {last}."),
            *(Note(f"Failures: {note}.", "warning") for note in [terms.failure_note] if note),
            *(Note(said) for said in [about_interval("The mean's interval", summary["interval_note"])] if said),
        ],
    )


def _interval(ends: tuple[float, float], digits: int | None) -> str:
    """In words; as percentages without ``digits``."""
    low, high = ends
    if np.isnan(low) or np.isnan(high):
        return "none: what it is of does not vary"
    return f"{100 * low:.1f} % to {100 * high:.1f} %" if digits is None else f"{low:,.{digits}f} to {high:,.{digits}f}"


def _matches(result: StudyResult) -> Section:
    return match_section(result)


def _labels(result: StudyResult) -> list[Section]:
    """The labels at both ends of every edited direction, where an embedding has too many for a heatmap."""
    # Rows that say where a token stands are numbers, which say nothing in words.
    many = [
        name
        for name, found in result.svd.model.embeddings.items()
        if found.trained and len(found) > MANY and found.kind not in ("timestep", "position")
    ]
    if not many:
        return []
    edited = result.verdicts[["matrix", "side", "sv"]].drop_duplicates()
    parts: list[Any] = []
    counted: dict[str, tuple[int, int]] = {}
    for matrix, rows in edited.groupby("matrix", sort=False):
        found = result.svd.tokens(str(matrix), many, int(rows["sv"].max()) + 1, 6)
        counted |= found.shown
        parts.append(found.rows.merge(rows, on=["matrix", "side", "sv"]))
    table = result.table.merge(edited, on=["matrix", "side", "sv"])
    columns = ["matrix", "side", "sv", "embedding", "label", "cosine", "z", "p_value", "q_value"]
    return [
        Section(
            "The labels at both ends of the edited directions",
            [
                (
                    "The labels nearest to each edited direction and to its opposite. A direction's sign is a "
                    "convention. Nearest labels always look like something; whether the nearest is nearer than chance "
                    "is what q says."
                ),
                Markup(token_html(pd.concat(parts), counted)),
                Table(spelled_labels(table[columns]), "The best match of each edited direction with each embedding."),
            ],
        )
    ]


def _forest(result: StudyResult) -> Plot:
    table = result.verdicts.assign(
        role=[ROLES.get(str(role), str(role)) for role in result.verdicts["role"]],
        change=[_what_edits_do([edit]) for edit in result.edits],
    )
    figure = figures.effects(table, result.baseline.terms, units=len(result.baseline), links=_anchors(table))
    return Plot(figure, "A click on an edit leads to its row in the table.")


def _anchors(verdicts: pd.DataFrame) -> list[str]:
    """An id for each edit's row; edits of one direction with several values are numbered."""
    found = [anchor_of("edit", row["matrix"], row["side"], row["sv"]) for row in verdicts.to_dict("records")]
    return [f"{name}-{number}" if name in found[:number] else name for number, name in enumerate(found)]


def _edits(result: StudyResult) -> Table:
    """A row for each edit: what it is of, what was found, and the numbers."""
    verdicts, terms = result.verdicts, result.baseline.terms
    rows = verdicts.to_dict("records")
    frame = pd.DataFrame(
        {
            "matrix": [_where(row, edit) for row, edit in zip(rows, result.edits, strict=True)],
            "label": [f"{spelled(str(row['label']))}\n{row['embedding']}, cosine {row['cosine']:+.2f}" for row in rows],
        }
    )
    names = ["verdict", "q", "difference", "control_difference", "damage_beyond_control"]
    headings = {
        "matrix": "edit",
        "label": "best label",
        "difference": f"change of {terms.outcome_name}",
        "control_difference": "its control's change",
        "damage_beyond_control": f"{terms.lost} beyond the control",
    }
    intervals = {"damage_beyond_control": ("beyond_low", "beyond_high")}
    for name in names:
        if name in verdicts:
            frame[name] = verdicts[name].to_numpy()
    for name, ends in (
        ("difference", ("difference_low", "difference_high")),
        ("control_difference", ("control_difference_low", "control_difference_high")),
        *intervals.items(),
    ):
        for end in ends if name in frame else ():
            frame[end] = verdicts[end].to_numpy()
    if "failure_rate" in verdicts:
        pairs = zip(verdicts["failure_rate"], verdicts["control_failure_rate"], strict=True)
        frame["failed"] = [f"{100 * own:.0f} %\nits control {100 * other:.0f} %" for own, other in pairs]
    return Table(
        frame,
        f"Means over {len(result.baseline)} {terms.units}{terms.of_size}, paired with the unedited "
        f"{terms.actor}{f', in {terms.scale}' if terms.scale else ''}; in brackets 95 % intervals. p is by "
        "sign-flip permutation of the pairs of edit and control, q by Benjamini-Hochberg over the edits.",
        headings={name: said for name, said in headings.items() if name in frame},
        intervals=intervals,
        first=max(len(frame), 1) if len(frame) <= 24 else 12,
        anchors=_anchors(verdicts),
    )


def _where(row: dict[Any, Any], edit: Edit) -> str:
    """The place of an edit, its role, and what must be known of it, in lines."""
    role = ROLES.get(str(row["role"]), "")
    note = str(row["note"] or "").replace(str(row["matrix"]), "it")
    about = [DOES.get(str(row["side"]), str(row["side"])), *([role] if role else []), f"energy {row['energy']:.3g}"]
    if row["role"] == "given":  # those that the study chooses all do the same
        about.append(_what_edits_do([edit]))
    lines = [f"{row['matrix']} sv {row['sv']}", " · ".join(about)]
    return "\n".join([*lines, *([note] if note else [])])


def _effects(result: StudyResult) -> Section:
    table, terms = result.verdicts, result.baseline.terms
    title = "What editing them does"
    if said := unchanged(result):
        return Section(title, [*(Note(line.replace("**", "")) for line in said), _edits(result)])
    differences = [arm.outcomes - result.baseline.outcomes for arm in (*result.edited, *result.controls)]
    covers = (about_interval("An interval of differences", interval_note(row, "differences")) for row in differences)
    rho, interval = result.spearman.rho, (result.spearman.low, result.spearman.high)
    figure = figures.damage_against_cosine(table, terms, spearman=None if rho != rho else (rho, *interval))
    return Section(
        title,
        [
            _edits(result),
            *(Note(said) for said in dict.fromkeys(covers) if said),
            f"If the match explained the damage, edits of closer matches would do more of it. {correlation(result)}",
            Plot(figure),
        ],
    )


def _survival(result: StudyResult) -> list[Section]:
    terms = result.baseline.terms
    if terms.lasts is None:
        return []
    title = f"How long the {terms.actor} lasts"
    arms = (result.baseline, *result.edited, *result.controls)
    ended = [int(arm.ended.sum()) for arm in arms]
    total = sum(len(arm) for arm in arms)
    if not any(ended):
        said = f"All {total:,} {terms.units} of the {len(arms)} arms last to the limit"
        return [Section(title, [f"{said}{f' of {terms.limit:,} {terms.step}s' if terms.limit else ''}."])]
    curves: dict[str, Any] = {"unedited": _curve(result.baseline)}
    controls: dict[str, str] = {}
    for i, row in enumerate(result.verdicts.to_dict("records")):
        name = f"{row['matrix']} sv={row['sv']} ({row['role']})"
        name = name if name not in curves else f"{name} {row['side']}"
        name = name if name not in curves else f"{name}, edit {i + 1}"  # a user's own, of one direction
        curves[name], curves[f"control of {name}"] = _curve(result.edited[i]), _curve(result.controls[i])
        controls[name] = f"control of {name}"
    figure = figures.survival(
        curves,
        baseline="unedited",
        controls=controls,
        horizon=float(terms.limit or 0),
        title=title,
        step=terms.step,
        units=f"{len(result.baseline)} {terms.units}",
    )
    censored = (
        f"{terms.units.capitalize()} that the limit cuts are censored: they lasted at least that long, which does not "
        "mean that they succeeded."
    )
    least = 1 - max(number / len(arm) for number, arm in zip(ended, arms, strict=True))
    if least >= LASTING:
        said = (
            f"Hardly any {terms.unit} ends before the limit: {sum(ended)} of {total:,} over {len(arms)} arms do, and "
            f"in every arm at least {100 * least:.0f} % last to it."
        )
        return [Section(title, [said, Folded("The survival curves", [censored, Plot(figure)])])]
    return [Section(title, [censored, Plot(figure)])]


def _curve(evaluation: Any) -> tuple[Any, Any, Any, Any]:
    curve = evaluation.survival
    return curve.times, curve.survival, curve.low, curve.high


def _method(result: StudyResult) -> Section:
    folded = result.table.attrs["fold_layernorm"]
    stored = "with their LayerNorm folded in" if folded else "as stored"
    embeddings = "effective, through the LayerNorm between them and the stream" if folded else "raw"
    without = result.facts.get("without_contrast", [])
    lacking = (
        [f"No contrast: {', '.join(without)} {'have' if len(without) > 1 else 'has'} no poor match of its own."]
        if without
        else []
    )
    terms = result.baseline.terms
    return Section(
        "What this can and cannot tell",
        [
            (
                f"Singular directions are of the matrices {stored}; embeddings are {embeddings}. "
                "The strong directions have the largest z of each kind of matrix in turn, at most one per matrix; "
                "each contrast is a poor match (|cosine| below the median of the best match under the null), the "
                "poorest among directions of similar sigma in the same matrix. The first directions are direction 0 of "
                "the first matrix of each kind."
            ),
            *(Note(said) for said in lacking),
            Note(
                f"This is one checkpoint. Intervals are over {terms.units}; they say nothing about another training "
                "run of the same recipe.",
                "warning",
            ),
            Note(
                "Damage was measured in one setting and at one dose, with one random control for each edit. "
                "Another seed draws other controls."
            ),
        ],
    )
