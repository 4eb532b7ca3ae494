"""The report of a study: its sentences, its page and its tables."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dt_lens.arguments import atomic_write, local_path
from dt_lens.behaviour.printing import about_interval, decimals, places
from dt_lens.report import heatmaps, spectra
from dt_lens.report.page import Choice, Folded, Note, Plot, Section, Table, Video, write_report
from dt_lens.report.style import signed
from dt_lens.statistics.outcomes import interval_note, wilson
from dt_lens.study import figures
from dt_lens.study.result import StudyResult
from dt_lens.version import __version__

__all__ = ["sentences", "write_study"]

SHOWN = 64  # directions of a heatmap
# The verdict first: readers rarely scroll far to the right.
VERDICT_COLUMNS = (
    "role", "matrix", "side", "sv", "label", "cosine", "verdict", "q",
    "difference", "difference_low", "difference_high",
    "control_difference", "control_difference_low", "control_difference_high",
    "damage_beyond_control", "beyond_low", "beyond_high",
    "failure_rate", "control_failure_rate", "damage_per_energy", "energy", "sigma", "embedding",
)  # fmt: skip


def write_study(result: StudyResult, folder: str | Path) -> Path:
    """Write ``report.html``, ``scan.csv`` and ``verdicts.csv`` into ``folder``; return the page.

    Raises:
        DtLensError: if they cannot be written.
    """
    folder = local_path(folder, "folder")
    for name, table in (("scan", result.table), ("verdicts", result.verdicts)):
        with atomic_write(folder / f"{name}.csv") as part:
            table.to_csv(part, index=False)
    base, facts = result.baseline, result.facts
    model = facts.get("model", "the model")
    return write_report(
        folder / "report.html",
        f"What the weights of {model} do",
        [
            _agent(result),
            _matches(result),
            _effects(result),
            _survival(result),
            _video(result),
            _method(result),
        ],
        verdict=sentences(result),
        facts={
            "model": model,
            "environment": base.environment,
            "target return": f"{base.target_return:g}",
            "episodes per arm": len(base),
            "arms": 1 + 2 * len(result.edits),
            "seed": facts.get("seed"),
            "edit": f"the singular vector becomes {facts.get('value')!r}",
            "versions": f"dt-lens {__version__}, {_versions()}",
            **({"note": " ".join(base.notes)} if base.notes else {}),
        },
        command=facts.get("command", ""),
    )


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(
        [
            f"Python {platform.python_version()}",
            *(f"{name} {version(name)}" for name in ("torch", "gymnasium", "numpy")),
        ]
    )


def sentences(result: StudyResult) -> list[str]:
    """The verdict in three or four sentences."""
    base, table = result.baseline, result.verdicts
    mean = f"{base.mean:,.{places(*base.returns)}f}"
    alive = 1 - float(base.terminated.mean())
    hurts = table["verdict"] == "hurts more than its control"
    lines = [
        (
            f"Unedited, the agent returns **{mean}** on average over {len(base)} episodes, and {alive:.0%} "
            "of them last to the time limit."
        )
    ]
    if unchanged := _unchanged(result):
        return [*lines, *unchanged]
    for role, what in (
        ("strong", "directions that match an embedding best"),
        ("weak", "contrasts (similar in size, poor in match)"),
    ):
        rows = table["role"] == role
        lines.append(
            f"Of {int(rows.sum())} {what}, **{int((hurts & rows).sum())}** hurt more when edited than a random change "
            "of the same energy in the same place (q < 0.05)."
        )
    worst = table.sort_values("difference", kind="stable").iloc[0]
    edit = f"{worst['matrix']} sv={worst['sv']}"
    by = f"by **{_shown(worst['difference'])}** and its control by {_shown(worst['control_difference'])}."
    if worst["difference"] < 0:
        lines.append(f"The worst edit, {edit}, changes the return {by}")
    else:
        lines.append(f"No edit lowers the mean return; the one with the lowest, {edit}, changes it {by}")
    better = int((table["verdict"] == "improves more than its control").sum())
    if better:
        lines.append(f"**{better}** of the {len(table)} edits improve the agent more than their controls (q < 0.05).")
    found = result.spearman
    if np.isnan(found.rho):
        why = "one of the two does not vary" if len(table) > 2 else f"there are only {len(table)}"
        lines.append(f"These edits cannot show whether cosine predicts damage: {why}.")
    else:
        # By p, not by the interval: with a handful of pairs a bootstrap interval is too short.
        clear = (
            "so this number of edits does not decide whether cosine predicts damage"
            if found.p_value >= 0.05
            else "so cosine predicts damage here"
            if found.rho > 0
            else "so larger cosines go with less damage here"
        )
        lines.append(
            f"Across the {len(table)} edits, Spearman's correlation of |cosine| with damage beyond the control is "
            f"**{signed(found.rho)}** [{signed(found.low)}, {signed(found.high)}], p = {found.p_value:.2g}"
            f", {clear}."
        )
    return lines


def _shown(difference: float) -> str:
    """A difference of returns to three digits, or to whole numbers: returns may lie between 0 and 1.

    >>> _shown(-2345.6), _shown(0.3124), _shown(0.0)
    ('−2,346', '+0.312', '+0')
    """
    size = abs(difference)
    return signed(difference, 0 if size == 0 else int(np.clip(2 - np.floor(np.log10(size)), 0, 6)))


def _unchanged(result: StudyResult) -> list[str]:
    """That no edit and no control changed a return, and what else they changed, in sentences; empty if one did."""
    base, arms = result.baseline, (*result.edited, *result.controls)
    returns = base.returns
    if any((arm.returns != returns).any() for arm in arms):
        return []
    same = f"; all of them return **{returns[0]:,.6g}**" if np.ptp(returns) == 0 else ""
    failures = [float(arm.failed.mean()) for arm in arms]
    other = any((arm.failed != base.failed).any() or (arm.lengths != base.lengths).any() for arm in arms)
    nothing = (
        f"**{'No return' if other else 'Nothing'} changed**: no edit and no control changed the return of any "
        f"episode{same}. So this study shows nothing of damage; it takes larger edits, other directions, or a task in "
        "which the agent is not so sure of its return."
    )
    if not other:
        return [nothing]
    lengths = [float(arm.lengths.mean()) for arm in arms]
    return [
        nothing,
        (
            f"But episodes went otherwise: **{base.failed.mean():.0%}** of them fail unedited, and {min(failures):.0%} "
            f"to {max(failures):.0%} under edits and controls; they last {base.lengths.mean():,.1f} steps on average, "
            f"and {min(lengths):,.1f} to {max(lengths):,.1f}."
        ),
    ]


def _agent(result: StudyResult) -> Section:
    summary, k = result.baseline.summary(), decimals(*result.baseline.returns)
    rows = [
        ("mean return", f"{summary['mean']:,.{k}f}", _interval(summary["mean_interval"], k)),
        ("interquartile mean", f"{summary['iqm']:,.{k}f}", _interval(summary["iqm_interval"], k)),
        ("standard deviation of returns", f"{summary['std']:,.{k}f}", ""),
        ("mean length (steps)", f"{summary['mean_length']:,.1f}", ""),
        (
            f"failed ({summary['failure_rule']})",
            f"{summary['failure_rate']:.1%}",
            _interval(summary["failure_interval"], None),
        ),
    ]
    if "score" in summary:
        rows.append(("D4RL-normalised score", f"{summary['score']:.1f}", _interval(summary["score_interval"], 1)))
    frame = pd.DataFrame(rows, columns=["unedited agent", "value", "95 % interval"])
    return Section(
        "The unedited agent",
        [
            Table(
                frame,
                f"{summary['episodes']} episodes of {summary['environment']}, seeds {result.baseline.seeds[0]} to "
                f"{result.baseline.seeds[-1]}.",
            ),
            *(Note(f"Failures: {note}.", "warning") for note in [result.baseline.failure_note] if note),
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
        Table(best.drop(columns=["layer", "head", "block"]), "The 25 strongest matches."),
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


def _effects(result: StudyResult) -> Section:
    table = result.verdicts
    shown = table[list(VERDICT_COLUMNS)]
    notes = [Note(note) for note in dict.fromkeys(table["note"]) if note]
    if unchanged := _unchanged(result):
        said = [Note(line.replace("**", "")) for line in unchanged]
        return Section("What editing them does", [*said, Table(shown), *notes])
    differences = [arm.returns - result.baseline.returns for arm in (*result.edited, *result.controls)]
    covers = (about_interval("An interval of differences", interval_note(row, "differences")) for row in differences)
    notes += [Note(said) for said in dict.fromkeys(covers) if said]
    rho, interval = result.spearman.rho, (result.spearman.low, result.spearman.high)
    return Section(
        "What editing them does",
        [
            (
                "Each edit replaces one singular vector; its control is a random change of the same Frobenius norm "
                "and rank in the same place. All arms run the same seeds, so differences are paired."
            ),
            Plot(figures.effects(table)),
            Table(
                shown,
                "Damage beyond the control is the control's return less the edit's; p by sign-flip permutation "
                "of the pairs, q by Benjamini-Hochberg over the edits.",
                intervals={"damage_beyond_control": ("beyond_low", "beyond_high")},
            ),
            *notes,
            Plot(figures.damage_against_cosine(table, spearman=None if rho != rho else (rho, *interval))),
        ],
    )


def _survival(result: StudyResult) -> Section:
    if not any(arm.terminated.any() for arm in (result.baseline, *result.edited, *result.controls)):
        said = "No episode of any arm ended before the time limit, so there are no survival curves to draw."
        return Section("How long the agent lasts", [said])
    curves: dict[str, Any] = {"unedited": _curve(result.baseline)}
    controls: dict[str, str] = {}
    for i, row in enumerate(result.verdicts.to_dict("records")):
        name = f"{row['matrix']} sv={row['sv']} ({row['role']})"
        name = name if name not in curves else f"{name} {row['side']}"
        curves[name], curves[f"control of {name}"] = _curve(result.edited[i]), _curve(result.controls[i])
        controls[name] = f"control of {name}"
    limit = float(result.baseline.time_limit)
    return Section(
        "How long the agent lasts",
        [
            (
                "An episode that the time limit cuts is censored: it lasted at least that long, which does not mean "
                "that it succeeded."
            ),
            Plot(figures.survival(curves, baseline="unedited", controls=controls, horizon=limit)),
        ],
    )


def _curve(evaluation: Any) -> tuple[Any, Any, Any, Any]:
    curve = evaluation.survival
    return curve.times, curve.survival, curve.low, curve.high


def _video(result: StudyResult) -> Section:
    video = result.video
    return Section(
        "The worst edit beside the unedited agent",
        [
            Video(
                video.file,
                "The edit with the largest loss, in the episode with its median loss; both agents start from the "
                "same state.",
                video.reason,
            )
        ],
    )


def _method(result: StudyResult) -> Section:
    folded = result.table.attrs["fold_layernorm"]
    stored = "with their LayerNorm folded in" if folded else "as stored"
    embeddings = "effective, through the LayerNorm between them and the stream" if folded else "raw"
    return Section(
        "What this can and cannot tell",
        [
            (
                f"Singular directions are of the matrices {stored}; embeddings are {embeddings}. "
                "The strong directions have the largest z of each kind of matrix in turn, at most one per matrix; "
                "each contrast is the poorest match among directions of similar sigma in the same matrix."
            ),
            Note(
                "This is one checkpoint. Intervals are over episodes; they say nothing about another training "
                "run of the same recipe.",
                "warning",
            ),
            Note(
                "Damage was measured at one target return and one dose, with one random control for each edit. "
                "Another seed draws other controls."
            ),
        ],
    )
