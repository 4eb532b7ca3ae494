"""The report of a study: its sentences, its page and its tables."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dt_lens.arguments import atomic_write, local_path
from dt_lens.behaviour.printing import about_interval, decimals, edit_name, places
from dt_lens.lens.token_text import spelled
from dt_lens.report import heatmaps, spectra
from dt_lens.report.page import Choice, Folded, Markup, Note, Plot, Section, Table, write_report
from dt_lens.report.style import signed
from dt_lens.statistics.outcomes import interval_note, wilson
from dt_lens.study import figures
from dt_lens.study.clusters import cluster_section
from dt_lens.study.result import StudyResult
from dt_lens.svd.token_page import token_html
from dt_lens.version import __version__

__all__ = ["sentences", "write_study"]

SHOWN = 64  # directions of a heatmap
MANY = 64  # labels of an embedding from which on both ends of each edited direction are shown in words
ROLES = {
    "strong": "directions that match an embedding best",
    "weak": "contrasts (similar in size, poor in match)",
    "first": "first directions of a kind of matrix",
    "given": "edits",
}
# The verdict first: readers rarely scroll far to the right.
VERDICT_COLUMNS = (
    "role", "matrix", "side", "sv", "label", "cosine", "verdict", "q",
    "difference", "difference_low", "difference_high",
    "control_difference", "control_difference_low", "control_difference_high",
    "damage_beyond_control", "beyond_low", "beyond_high",
    "failure_rate", "control_failure_rate", "damage_per_energy", "energy", "sigma", "embedding",
)  # fmt: skip


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
    return write_report(
        folder / "report.html",
        f"What the weights of {model} do",
        [
            _unedited(result),
            _matches(result),
            *_labels(result),
            *([] if result.clusters is None else [cluster_section(result.clusters, result.svd)]),
            _effects(result),
            *_survival(result),
            *result.sections,
            _method(result),
        ],
        verdict=sentences(result),
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
            "edit": f"the singular vector becomes {facts.get('value')!r}",
            "versions": f"dt-lens {__version__}, {_versions(facts.get('software', ()))}",
            **({"note": " ".join(base.notes)} if base.notes else {}),
        },
        command=facts.get("command", ""),
    )


def _versions(software: Any) -> str:
    from importlib.metadata import version

    packages = (f"{name} {version(name)}" for name in software)
    return ", ".join([f"Python {platform.python_version()}", *packages])


def sentences(result: StudyResult) -> list[str]:
    """The verdict in a few sentences."""
    base, table, terms = result.baseline, result.verdicts, result.baseline.terms
    mean = f"{base.mean:,.{_places(result)}f}"
    hurts = table["verdict"] == "hurts more than its control"
    lasts = ""
    if terms.lasts is not None:
        lasts = f", and {1 - float(base.ended.mean()):.0%} of them last to the limit"
    over = f"over {len(base)} {terms.units}{lasts}"
    lines = [f"Unedited, the {terms.actor}'s mean {terms.outcome_name} is **{mean}**{terms.in_scale} {over}."]
    if unchanged := _unchanged(result):
        return [*lines, *unchanged]
    for role, what in ROLES.items():
        rows = table["role"] == role
        if rows.any():
            lines.append(
                f"Of {int(rows.sum())} {what}, **{int((hurts & rows).sum())}** hurt more when edited than a random "
                "change of the same energy in the same place (q < 0.05)."
            )
    worst = table.loc[(terms.sign * table["difference"]).sort_values(kind="stable").index[0]]
    edit = edit_name(worst.to_dict())
    shown = _shown(worst["difference"], terms.digits), _shown(worst["control_difference"], terms.digits)
    by = f"by **{shown[0]}** and its control by {shown[1]}."
    if terms.sign * worst["difference"] < 0:
        lines.append(f"The worst edit, {edit}, changes the mean {terms.outcome_name} {by}")
    else:
        worsens, extreme = ("lowers", "lowest") if terms.sign > 0 else ("raises", "highest")
        lines.append(
            f"No edit {worsens} the mean {terms.outcome_name}; the one with the {extreme}, {edit}, changes it {by}"
        )
    better = int((table["verdict"] == "improves more than its control").sum())
    if better:
        lines.append(
            f"**{better}** of the {len(table)} edits improve the {terms.actor} more than their controls (q < 0.05)."
        )
    return [*lines, _correlation(result)]


def _correlation(result: StudyResult) -> str:
    """Whether cosine predicts damage here, in a sentence."""
    found, n = result.spearman, len(result.verdicts)
    if np.isnan(found.rho):
        why = "one of the two does not vary" if n > 2 else f"there are only {n}"
        return f"These edits cannot show whether cosine predicts damage: {why}."
    # By p, not by the interval: with a handful of pairs a bootstrap interval is too short.
    clear = (
        "so this number of edits does not decide whether cosine predicts damage"
        if found.p_value >= 0.05
        else "so cosine predicts damage here"
        if found.rho > 0
        else "so larger cosines go with less damage here"
    )
    return (
        f"Across the {n} edits, Spearman's correlation of |cosine| with damage beyond the control is "
        f"**{signed(found.rho)}** [{signed(found.low)}, {signed(found.high)}], p = {found.p_value:.2g}, {clear}."
    )


def _places(result: StudyResult) -> int:
    given = result.baseline.terms.digits
    return places(*result.baseline.outcomes) if given is None else given


def _shown(difference: float, digits: int | None = None) -> str:
    """A difference to ``digits`` decimals; by default to three digits, or to whole numbers.

    >>> _shown(-2345.6), _shown(0.3124), _shown(0.0), _shown(0.25, 4)
    ('−2,346', '+0.312', '+0', '+0.2500')
    """
    size = abs(difference)
    if digits is None:
        digits = 0 if size == 0 else int(np.clip(2 - np.floor(np.log10(size)), 0, 6))
    return signed(difference, digits)


def _unchanged(result: StudyResult) -> list[str]:
    """That no edit and no control changed an outcome, and what else they changed, in sentences; empty if one did."""
    base, arms, terms = result.baseline, (*result.edited, *result.controls), result.baseline.terms
    outcomes = base.outcomes
    if any((arm.outcomes != outcomes).any() for arm in arms):
        return []
    equal = np.ptp(outcomes) == 0
    same = f"; for all of them it is **{outcomes[0]:,.6g}**" if equal else ""
    failures = [float(arm.failed.mean()) for arm in arms]
    lasting = terms.lasts is not None
    other = any((arm.failed != base.failed).any() or (lasting and (arm.lengths != base.lengths).any()) for arm in arms)
    nothing = (
        f"**{f'No {terms.outcome_name}' if other else 'Nothing'} changed**: no edit and no control changed the "
        f"{terms.outcome_name} of any {terms.unit}{same}. So this study shows nothing of damage; it takes larger "
        f"edits, other directions, or a task in which the {terms.actor} is not so sure of its {terms.outcome_name}."
    )
    if not other:
        return [nothing]
    said = (
        f"But {terms.units} went otherwise: **{base.failed.mean():.0%}** of them fail unedited, and "
        f"{min(failures):.0%} to {max(failures):.0%} under edits and controls"
    )
    if lasting:
        lengths = [float(arm.lengths.mean()) for arm in arms]
        said += (
            f"; they last {base.lengths.mean():,.1f} {terms.step}s on average, and {min(lengths):,.1f} to "
            f"{max(lengths):,.1f}"
        )
    return [nothing, f"{said}."]


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
        rows.append((failed, f"{summary['failure_rate']:.1%}", _interval(summary["failure_interval"], None)))
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
    return f"{low:.1%} to {high:.1%}" if digits is None else f"{low:,.{digits}f} to {high:,.{digits}f}"


def _matches(result: StudyResult) -> Section:
    table, svd = result.table, result.svd
    untrained = table[table["embedding"].isin(table.attrs["untrained"])]
    found, tried = int((untrained["q_value"] < 0.05).sum()), len(untrained)
    significant = table[table["q_value"] < 0.05]
    best = significant.sort_values("z", ascending=False, kind="stable").head(25)
    names = list(dict.fromkeys(table["matrix"]))
    blocks: list[Any] = [
        (
            f"{len(table):,} comparisons of {len(names)} matrices with {table['embedding'].nunique()} embeddings; "
            f"{len(significant):,} are discoveries at q < 0.05. "
            "A direction's match is the best over all labels of an embedding, and its null is that best match under "
            "a random rotation. Where the stream varies in few dimensions that null calls many discoveries that others "
            "do not: dt-lens scan --null spectrum keeps how much of each direction lies where the stream varies."
        ),
        Plot(heatmaps.scan_overview(table)),
    ]
    if tried:
        low, high = wilson(found, tried)
        blocks.append(
            Note(
                f"The heads {', '.join(table.attrs['untrained'])} were never trained, which makes them a built-in "
                f"null: {found} of {tried:,} comparisons with them "
                f"are called discoveries ({found / tried:.2%}, interval {low:.2%} to {high:.2%})."
            )
        )
    blocks += [
        Table(_spelled(best.drop(columns=["layer", "head", "block"])), "The 25 strongest matches."),
        Plot(spectra.spectrum({name: svd[name].sigma.cpu().numpy() for name in names})),
        Plot(spectra.sigma_against_cosine(table)),
        Choice(
            _heatmaps(result),
            "matrix and embedding",
            f"The first {SHOWN} directions of the matrices that were edited, against the embedding they matched; "
            "a dot marks q < 0.05.",
        ),
        Folded(
            "The best match of each whole matrix, under a random rotation of all its directions at once",
            [Table(result.strongest)],
        ),
    ]
    return Section("What the singular directions match", blocks)


def _heatmaps(result: StudyResult) -> dict[str, Any]:
    svd, found = result.svd, dict[str, Any]()
    strong = result.verdicts[result.verdicts["role"] == "strong"]
    for row in strong.to_dict("records"):
        matrix, side, embedding = row["matrix"], row["side"], row["embedding"]
        cosines = svd.cosines(matrix, embedding, side).head(SHOWN)
        if cosines.shape[1] > 64:
            kept = cosines.abs().max().sort_values(ascending=False).index[:64]
            cosines = cosines[[label for label in cosines.columns if label in set(kept)]]
        scan = result.table
        rows = scan[(scan["matrix"] == matrix) & (scan["side"] == side) & (scan["embedding"] == embedding)]
        q = rows.set_index("sv")["q_value"].reindex(cosines.index).to_frame()
        found[f"{matrix} ({side}) × {embedding}"] = heatmaps.scan_heatmap(
            cosines,
            q_values=q,
            sigma=svd[matrix].sigma[: len(cosines)].cpu().numpy(),
            matrix=f"{matrix} ({side})",
            embedding=embedding,
        )
    return found


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
                Table(_spelled(table[columns]), "The best match of each edited direction with each embedding."),
            ],
        )
    ]


def _spelled(rows: pd.DataFrame) -> pd.DataFrame:
    """With every character of a label visible: many tokens differ in the space before them alone."""
    return rows.assign(label=[spelled(str(label)) for label in rows["label"]])


def _effects(result: StudyResult) -> Section:
    table, terms = result.verdicts, result.baseline.terms
    shown = _spelled(table[[name for name in VERDICT_COLUMNS if name in table]])
    notes = [Note(note) for note in dict.fromkeys(table["note"]) if note]
    if unchanged := _unchanged(result):
        said = [Note(line.replace("**", "")) for line in unchanged]
        return Section("What editing them does", [*said, Table(shown), *notes])
    differences = [arm.outcomes - result.baseline.outcomes for arm in (*result.edited, *result.controls)]
    covers = (about_interval("An interval of differences", interval_note(row, "differences")) for row in differences)
    notes += [Note(said) for said in dict.fromkeys(covers) if said]
    rho, interval = result.spearman.rho, (result.spearman.low, result.spearman.high)
    return Section(
        "What editing them does",
        [
            (
                "Each edit replaces one singular vector; its control is a random change of the same Frobenius norm "
                f"and rank in the same place. All arms run the same {terms.units}, so differences are paired."
            ),
            Plot(figures.effects(table, terms)),
            Table(
                shown,
                f"Damage beyond the control is the {terms.lost} beyond it; p by sign-flip permutation of the pairs, "
                "q by Benjamini-Hochberg over the edits.",
                intervals={"damage_beyond_control": ("beyond_low", "beyond_high")},
            ),
            *notes,
            Plot(figures.damage_against_cosine(table, terms, spearman=None if rho != rho else (rho, *interval))),
        ],
    )


def _survival(result: StudyResult) -> list[Section]:
    terms = result.baseline.terms
    if terms.lasts is None:
        return []
    title = f"How long the {terms.actor} lasts"
    if not any(arm.ended.any() for arm in (result.baseline, *result.edited, *result.controls)):
        said = f"No {terms.unit} of any arm ended before the limit, so there are no survival curves to draw."
        return [Section(title, [said])]
    curves: dict[str, Any] = {"unedited": _curve(result.baseline)}
    controls: dict[str, str] = {}
    for i, row in enumerate(result.verdicts.to_dict("records")):
        name = f"{row['matrix']} sv={row['sv']} ({row['role']})"
        name = name if name not in curves else f"{name} {row['side']}"
        curves[name], curves[f"control of {name}"] = _curve(result.edited[i]), _curve(result.controls[i])
        controls[name] = f"control of {name}"
    figure = figures.survival(
        curves, baseline="unedited", controls=controls, horizon=float(terms.limit or 0), title=title, step=terms.step
    )
    censored = (
        f"{terms.units.capitalize()} that the limit cuts are censored: they lasted at least that long, which does not "
        "mean that they succeeded."
    )
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
