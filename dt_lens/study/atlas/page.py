"""The page that shows an atlas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dt_lens.arguments import atomic_write
from dt_lens.report.page import Choice, Folded, Note, Plot, Section, Table, write_report
from dt_lens.study.atlas import figures
from dt_lens.study.atlas.atlas import Atlas
from dt_lens.study.atlas.sentences import SIGHTS, correlation_of, covered, joined, sentences, shares_for, signed
from dt_lens.study.atlas.tables import ALPHA
from dt_lens.version import __version__

__all__ = ["table_of", "write_atlas"]

# What damage is tested as, and how that is spoken of.
TESTED = {
    "damage": "with damage as it is",
    "damage at equal size": "among directions of equal size",
    "beyond": "with damage beyond the controls",
    "beyond at equal size": "with that among directions of equal size",
}
SHOWN = 40


def write_atlas(atlas: Atlas, out: Path, name: str = "the model", command: str = "") -> Path:
    """Write ``atlas.html`` and its tables as CSV; returns the page.

    ``weighted.csv`` is there only where activation-aware directions were removed.

    Raises:
        DtLensError: when the folder cannot be written.
    """
    tables = ["directions", "correlations", "shares", "reliability", "predictors"]
    tables += ["weighted"] * bool(len(atlas.weighted))
    for what in tables:
        with atomic_write(out / f"{what}.csv") as part:
            getattr(atlas, what).to_csv(part, index=False, float_format="%.6g")
    base = atlas.baseline
    page = out / "atlas.html"
    write_report(
        page,
        f"An atlas of {name}: what each direction does",
        [_damage(atlas), _shares(atlas), _looks(atlas), _sizes(atlas), _method(atlas)],
        verdict=sentences(atlas),
        facts={
            "model": name,
            "environment": base.environment,
            "target return": f"{base.target_return:g}",
            "unedited": f"{base.mean:,.0f} on average",
            "directions": f"{len(atlas.directions):,} of {atlas.planned:,}",
            "episodes per direction": _episodes(atlas),
            "random changes": _controls(atlas),
            "seed": atlas.options["seed"],
            "version": f"dt-lens {__version__}",
        },
        command=command,
    )
    return page


def _episodes(atlas: Atlas) -> str:
    counts = atlas.directions["episodes"]
    return f"{counts.min():,}" + (f" to {counts.max():,}" if counts.max() > counts.min() else "")


def _controls(atlas: Atlas) -> str:
    found = shares_for(atlas, "all")
    if not found["controlled"]:
        return "none"
    return f"{found['controls']:,} beside {found['controlled']:,} of {found['directions']:,} directions{covered(atlas)}"


def _looks_of(atlas: Atlas) -> list[figures.Looks]:
    kinds = set(atlas.directions["kind"])
    return [(kind, sight) for kind, sight in SIGHTS.items() if kind in kinds and sight in atlas.directions]


def _damage(atlas: Atlas) -> Section:
    looks = _looks_of(atlas)
    shown: dict[str, Any] = {}
    named = {"damage": "as it is", "damage_per_energy": "per unit energy", "beyond": "beyond the control"}
    for response, what in named.items():
        measured = atlas.directions[atlas.directions[response].notna()]
        if len(measured):
            told = [look for look in looks if look[0] in set(measured["kind"])]
            lines = [_line(atlas, *look, response) for look in told]
            shown[what] = figures.damage_against(measured, told, response=response, said=lines)
    return Section(
        "Does cosine predict damage?",
        [
            Choice(shown, "damage", "Every point is one singular direction, removed for all paired episodes."),
            Note(
                "Per unit energy, a direction of tiny energy that does nothing has a large number, an episode's chaos "
                "divided by next to nothing; and all of them share the unedited agent's luck, so that anything that "
                "goes with the energy goes with them. That correlation is shown and not tested; the one to read is "
                "that among directions of equal size."
            ),
            Folded(
                "How well damage repeats",
                [
                    (
                        "The rank correlation of the damage in episodes of odd and of even seed, and what Spearman and "
                        "Brown's formula makes of it for all episodes: how far a second such sweep would agree."
                    ),
                    Table(atlas.reliability),
                ],
            ),
        ],
    )


def _line(atlas: Atlas, kind: str, sight: str, response: str) -> str:
    given = "" if response == "damage_per_energy" else " at equal size"
    row = correlation_of(atlas, kind, sight, f"{response}{given}")
    if row is None or np.isnan(row["rho"]):
        return ""
    return f"rho{given} {signed(row['rho'])} [{signed(row['low'])}, {signed(row['high'])}]"


def _shares(atlas: Atlas) -> Section:
    blocks: list[Any] = [Plot(figures.shares(atlas.shares))]
    blocks.append(Plot(figures.along_the_spectrum(atlas.directions, atlas.baseline.mean)))
    worst = atlas.directions.sort_values("damage", ascending=False).head(SHOWN)
    columns = ["matrix", "sv", "sigma", "energy", "mean_return", "damage", "q_value", "failure_rate", "control_damage"]
    if atlas.directions["controls"].max() > 1:
        columns += ["controls", "controls_as_costly"]
    intervals = {"damage": ("damage_low", "damage_high")}
    frame = worst[[*columns, "damage_low", "damage_high"]]
    blocks.append(Folded(f"The {len(worst)} most harmful removals", [Table(frame, intervals=intervals)]))
    blocks.append(Folded("The counts", [Table(atlas.shares)]))
    return Section("How many directions matter?", blocks)


def _looks(atlas: Atlas) -> Section:
    table = atlas.correlations
    if table.empty:
        return Section("What else a direction may look like", ["Too few directions are measured to say."])
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
        text += (
            f" {', '.join(atlas.untrained)} no loss ever reached: what they correlate with is the procedure's noise."
        )
    intervals = {"rho": ("low", "high")}
    return Section(
        "What else a direction may look like",
        [
            text,
            Table(kinds.drop(columns=["what"]), intervals=intervals),
            Folded("Matrix by matrix", [Table(table[table["what"] != table["kind"]], intervals=intervals)]),
        ],
    )


def _sizes(atlas: Atlas) -> Section:
    predictors = [name for name in ("sigma", "output_energy") if name in atlas.directions]
    blocks: list[Any] = [Plot(figures.sizes_against_damage(atlas.directions, predictors))]
    blocks.append(Table(atlas.predictors[atlas.predictors["what"] == atlas.predictors["kind"]].drop(columns="what")))
    if "output_energy" in predictors:
        blocks.insert(
            0,
            "Sigma is what the weights do to inputs of every direction alike; the output energy is the root mean "
            "square of what the direction puts out on the agent's own inputs.",
        )
    if len(atlas.weighted):
        blocks.append(
            f"{len(atlas.weighted)} activation-aware directions were removed as well: those of the decomposition in "
            "which sigma is the standard deviation of the output on the agent's own inputs. They and the plain ones "
            "of the same matrices and numbers are held against the damage of their own removals."
        )
    return Section("Does size predict damage?", blocks)


def _method(atlas: Atlas) -> Section:
    options = atlas.options
    halved = options.get("halving") and (
        " Successive halving gave more episodes to those that moved the return most; the damage of those that it kept "
        "is of fresh seeds, and that of the others of the seeds that they were stopped by, with p = 1."
    )
    return Section(
        "How it was measured",
        [
            (
                f"Every direction was removed (its sigma set to 0) for {_episodes(atlas)} episodes, the seeds from "
                f"{options['seed']} on, and compared with the unedited agent seed by seed. p is by sign flips of the "
                f"paired differences; q is Benjamini-Hochberg over the directions.{halved or ''}"
            ),
            (
                "Rank correlations take ranks inside each matrix, so that what differs between matrices counts for "
                "nothing; intervals are bootstraps over directions, p by permutation inside each matrix. At equal "
                "size, ranks and permutations stay among about six neighbours in the energy, on real inputs "
                "where it is known, and intervals are Bonett and Wright's."
            ),
            Note(
                "This is one checkpoint. Intervals are over its episodes and directions, not over trainings; a "
                "direction whose removal does nothing may be one of several that do the same work."
            ),
        ],
    )


def table_of(atlas: Atlas) -> pd.DataFrame:
    """The shares as the command line prints them."""
    names = ["what", "directions", "hurts", "share", "large", "worst", "worst_damage"]
    if atlas.shares["controls"].gt(0).any():
        names[5:5] = ["controlled", "controlled_large", "controls", "controls_large", "beyond"]
    return atlas.shares[names]
