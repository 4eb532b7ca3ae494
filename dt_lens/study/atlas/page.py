"""The page and tables of an atlas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dt_lens.arguments import atomic_write, local_path, require_offers
from dt_lens.behaviour.terms import Terms, with_article
from dt_lens.report.page import Choice, Folded, Note, Plot, Section, Table, write_report
from dt_lens.report.style import signed
from dt_lens.statistics.outcomes import ENOUGH
from dt_lens.study.atlas import figures
from dt_lens.study.atlas.figures import number_format
from dt_lens.study.atlas.result import Atlas
from dt_lens.study.atlas.sentences import correlation_of, covered, joined, sentences, shares_for
from dt_lens.study.atlas.tables import ALPHA
from dt_lens.version import __version__

__all__ = ["table_of", "write_atlas"]

# The tested responses, and their names in a sentence.
TESTED = {
    "damage": "with damage as it is",
    "damage at equal size": "among directions of equal size",
    "beyond": "with damage beyond the controls",
    "beyond at equal size": "with that among directions of equal size",
}
SHOWN = 40


def write_atlas(atlas: Atlas, folder: str | Path, name: str = "the model", command: str = "") -> Path:
    """Write ``atlas.html`` and the tables as CSV into ``folder``; return the page.

    ``weighted.csv`` is written only if activation-aware directions were removed.

    Args:
        atlas: what ``make_atlas`` gives.
        folder: made if needed.
        name: what the page calls the model.
        command: the command line that repeats this, for the page.

    Raises:
        DtLensError: if the folder cannot be written.
    """
    require_offers(atlas, "atlas", "a result of make_atlas", "weighted", "baseline")
    folder = local_path(folder, "folder")
    tables = ["directions", "correlations", "shares", "reliability", "predictors"]
    tables += ["weighted"] * bool(len(atlas.weighted))
    for what in tables:
        with atomic_write(folder / f"{what}.csv") as part:
            getattr(atlas, what).to_csv(part, index=False, float_format="%.6g")
    base = atlas.baseline
    return write_report(
        folder / "atlas.html",
        f"An atlas of {name}: what each direction does",
        _sections(atlas),
        verdict=sentences(atlas),
        facts={
            "model": name,
            **_setting(base.terms),
            "unedited": f"{number_format(base.terms, base.mean).format(base.mean)}{base.terms.in_scale} on average",
            "directions": f"{len(atlas.directions):,} of {atlas.planned:,}",
            f"{base.terms.units} per direction": _units(atlas),
            "random changes": _controls(atlas),
            "seed": atlas.options["seed"],
            "version": f"dt-lens {__version__}",
        },
        command=command,
    )


def _sections(atlas: Atlas) -> list[Section]:
    """All sections; only the method where no removal did anything, since every figure would be empty."""
    if not atlas.directions["damage"].any():
        return [_method(atlas)]
    if not (atlas.directions["q_value"] < ALPHA).any():
        # Nothing is told from noise: what would explain it is there for who asks.
        rest = [_damage(atlas), _matches(atlas), _sizes(atlas)]
        folds = [Folded(section.title, section.blocks) for section in rest]
        said = "No direction's damage is told from noise, so there is nothing for a match or a size to predict."
        return [_shares(atlas), Section("What might have predicted it", [said, *folds]), _method(atlas)]
    return [_damage(atlas), _shares(atlas), _matches(atlas), _sizes(atlas), _method(atlas)]


def _setting(terms: Terms) -> dict[str, Any]:
    """What the outcomes depend on, and where the units come from, unless a value of the setting says that."""
    found = {
        terms.named(name): f"{value:g}" if isinstance(value, float) else value
        for name, value in terms.setting.items()
        if isinstance(value, str | int | float)
    }
    said = any(isinstance(value, str) and value in terms.place for value in terms.setting.values())
    return found if said or not terms.place else {terms.units: terms.place, **found}


def _units(atlas: Atlas) -> str:
    counts = atlas.directions[atlas.terms.units]
    return f"{counts.min():,}" + (f" to {counts.max():,}" if counts.max() > counts.min() else "")


def _controls(atlas: Atlas) -> str:
    found = shares_for(atlas, "all")
    if not found["controlled"]:
        return "none"
    return f"{found['controls']:,} beside {found['controlled']:,} of {found['directions']:,} directions{covered(atlas)}"


def _panels(atlas: Atlas) -> list[figures.Panel]:
    return [(kind, column) for kind, columns in atlas.matches.items() for column in columns]


def _damage(atlas: Atlas) -> Section:
    panels, terms = _panels(atlas), atlas.terms
    shown: dict[str, Any] = {}
    named = {"damage": "as it is", "damage_per_energy": "per unit energy", "beyond": "beyond the control"}
    for response, what in named.items():
        measured = atlas.directions[atlas.directions[response].notna()]
        if len(measured):
            present = [panel for panel in panels if panel[0] in set(measured["kind"])]
            heads = [_line(atlas, *panel, response) for panel in present]
            shown[what] = figures.damage_against(measured, present, terms, response=response, heads=heads)
    return Section(
        "Does cosine predict damage?",
        [
            Choice(
                shown,
                "damage",
                f"Every point is one singular direction, {atlas.words[2]} for all paired {terms.units}.",
            ),
            Note(
                "Damage per unit energy is large for a direction of tiny energy that does nothing: it is "
                f"{with_article(terms.unit)}'s noise divided by almost 0. All directions also share the noise of the "
                f"unedited {terms.actor}, so this damage "
                "correlates with anything that correlates with the energy. Its correlation is shown and not tested; "
                "the one to read is that among directions of equal size."
            ),
            Folded(
                "How well damage repeats",
                [
                    (
                        f"The rank correlation of the damage in {terms.units} of odd and of even {terms.index}, and "
                        f"from it by Spearman and Brown's formula that of all {terms.units}: how far a second such "
                        "sweep would agree."
                    ),
                    Table(atlas.reliability),
                ],
            ),
        ],
    )


def _line(atlas: Atlas, kind: str, column: str, response: str) -> str:
    given = "" if response == "damage_per_energy" else " at equal size"
    row = correlation_of(atlas, kind, column, f"{response}{given}")
    if row is None or np.isnan(row["rho"]):
        return ""
    between = "" if np.isnan(row["low"]) else f" [{signed(row['low'])}, {signed(row['high'])}]"
    return f"rho{given} {signed(row['rho'])}{between}"


def _shares(atlas: Atlas) -> Section:
    terms = atlas.terms
    hurts = atlas.shares["hurts"].any()
    n = len(atlas.directions)
    none = f"None of {n:,} directions {'costs' if terms.sign > 0 else 'raises'} {terms.outcome} at q < {ALPHA:g}."
    blocks: list[Any] = [Plot(figures.shares(atlas.shares, terms)) if hurts else none]
    deed, doing, done = atlas.words
    leaves = f"What {doing.lower()} each direction leaves"
    spectrum = figures.along_the_spectrum(atlas.directions, atlas.baseline.mean, terms, title=leaves, done=done)
    blocks.append(Plot(spectrum))
    worst = atlas.directions.sort_values("damage", ascending=False).head(SHOWN)
    columns = ["matrix", "sv", "sigma", "energy", f"mean_{terms.outcome}", "damage", "q_value"]
    columns += [*(["failure_rate"] if terms.failure is not None else []), "control_damage"]
    if atlas.directions["controls"].max() > 1:
        columns += ["controls", "controls_as_costly"]
    intervals = {"damage": ("damage_low", "damage_high")}
    frame = worst[[*columns, "damage_low", "damage_high"]]
    few = int(worst[terms.units].min())
    said = f"Intervals of single directions are over {few} {terms.units}; below {ENOUGH} they cover less than 95 %."
    notes = [Note(said)] if few < ENOUGH else []
    blocks.append(Folded(f"The {len(worst)} most harmful {deed}s", [Table(frame, intervals=intervals), *notes]))
    if terms.failure is not None:
        rule, note = f"Failures: {terms.failure_rule}.", terms.failure_note
        blocks.append(Note(f"{rule} {note[0].upper()}{note[1:]}." if note else rule))
    blocks.append(Folded("The counts", [Table(atlas.shares)]))
    return Section("How many directions matter?", blocks)


def _matches(atlas: Atlas) -> Section:
    table = atlas.correlations
    if table.empty:
        return Section("What other matches predict", ["Too few directions are measured to say."])
    kinds = table[table["what"] == table["kind"]]
    tested = kinds[kinds["p_value"].notna()]
    found = tested[tested["q_value"] < ALPHA]["response"].value_counts()
    counts = [
        f"{found.get(response, 0)} {words}" for response, words in TESTED.items() if response in set(tested["response"])
    ]
    text = (
        f"{len(tested)} tests of kinds of matrices with every embedding on every side. At q < {ALPHA} "
        f"(Benjamini-Hochberg over all, single matrices included): {joined(counts) or 'none'}."
    )
    if atlas.untrained:
        text += f" Never trained: {', '.join(atlas.untrained)}; what they correlate with is the procedure's noise."
    intervals = {"rho": ("low", "high")}
    single = table[table["what"] != table["kind"]]
    shown, matrices = kinds[kinds["rho"].notna()], single[single["rho"].notna()]
    undefined = len(table) - len(shown) - len(matrices)
    if undefined:
        text += f" {undefined:,} correlations are not defined and not listed: one of the two does not vary, or too few "
        text += "directions are measured."
    tables: list[Any] = [Table(shown.drop(columns=["what"]), intervals=intervals)] if len(shown) else []
    if len(matrices):
        tables.append(Folded("Matrix by matrix", [Table(matrices, intervals=intervals)]))
    return Section("What other matches predict", [text, *tables])


def _sizes(atlas: Atlas) -> Section:
    predictors = [name for name in ("sigma", "output_energy") if name in atlas.directions]
    whose = f"the {atlas.terms.actor}'s own inputs"
    blocks: list[Any] = [Plot(figures.sizes_against_damage(atlas.directions, predictors, atlas.terms))]
    by_kind = atlas.predictors[atlas.predictors["what"] == atlas.predictors["kind"]].drop(columns="what")
    by_kind = by_kind[by_kind["rho"].notna()]
    if len(by_kind):
        blocks.append(Table(by_kind))
    if "output_energy" in predictors:
        blocks.insert(
            0,
            "Sigma measures what the weights do if inputs point equally in every direction; the output energy is the "
            f"root mean square of what the direction puts out on {whose}.",
        )
    if len(atlas.weighted):
        blocks.append(
            f"{len(atlas.weighted)} activation-aware directions were {atlas.words[2]} as well: those of the "
            f"decomposition in which sigma is the standard deviation of the output on {whose}. Their sigmas, and those "
            "of the plain directions of the same matrices and indices, are compared with the damage of their own "
            f"{atlas.words[0]}s."
        )
    return Section("Does size predict damage?", blocks)


def _method(atlas: Atlas) -> Section:
    options, terms = atlas.options, atlas.terms
    halved = options.get("halving") and (
        f" Successive halving gave more {terms.units} to those that moved the {terms.outcome} most; the damage of "
        f"those that it kept is from fresh {terms.indices}, and that of the others from the {terms.indices} that "
        "stopped them, with p = 1."
    )
    edited = "Every direction was removed (its sigma set to 0)"
    if atlas.value != "zero":
        edited = f"A singular vector of every direction was edited (value {atlas.value})"
    return Section(
        "How it was measured",
        [
            (
                f"{edited} for {_units(atlas)} {terms.units}, the "
                f"{terms.indices} from {options['seed']} on, and compared with the unedited {terms.actor} "
                f"{terms.index} by {terms.index}. p is by sign flips of the "
                f"paired differences; q is Benjamini-Hochberg over the directions.{halved or ''}"
            ),
            (
                "Rank correlations take ranks inside each matrix, so differences between matrices do not count; "
                "intervals are bootstraps over directions, p is by permutation inside each matrix. At equal size, "
                "ranks and permutations stay among about six neighbours in energy (on real inputs if it is known), "
                "and intervals are Bonett and Wright's."
            ),
            Note(
                f"This is one checkpoint. Intervals are over its {terms.units} and directions, not over training "
                "runs; a "
                f"direction whose {atlas.words[0]} does nothing may be one of several that do the same work."
            ),
        ],
    )


def table_of(atlas: Atlas) -> pd.DataFrame:
    """The shares that the command line prints."""
    names = ["what", "directions", "hurts", "share", "large", "worst", "worst_damage"]
    if atlas.shares["controls"].gt(0).any():
        names[5:5] = ["controlled", "controlled_large", "controls", "controls_large", "beyond"]
    return atlas.shares[names]
