"""What the atlas says, in sentences, and the page that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dt_lens.errors import DtLensError
from dt_lens.report import atlas_figures as figures
from dt_lens.report.page import Choice, Folded, Note, Plot, Section, Table, write_report
from dt_lens.study.atlas import LARGE, Atlas
from dt_lens.version import __version__

__all__ = ["SIGHTS", "sentences", "write_atlas"]

# What the directions of each kind of matrix are said to look like: the embedding on the side that meets it. W_in reads,
# and is compared with the action output all the same, because that is the claim to be tested.
SIGHTS = {"W_in": "read action_out", "W_gate": "read action_out", "W_out": "write action_out", "OV": "write action_out"}
# Two sizes to hold against damage: how each is spoken of, their rows in the table, and that of their difference.
PREDICTORS = (
    (
        "Sigma",
        "the output energy on the agent's own inputs",
        "sigma",
        "output_energy",
        "output_energy minus sigma",
    ),
    (
        "Sigma of plain directions",
        "that of as many activation-aware directions",
        "plain sigma",
        "activation-aware sigma",
        "activation-aware minus plain",
    ),
)
SHOWN = 40


def sentences(atlas: Atlas) -> list[str]:
    """The answer in a few plain sentences."""
    shares, n = atlas.shares.set_index("what"), len(atlas.directions)
    everything = shares.loc["all"]
    said = [
        (
            f"Removing one singular direction costs the agent return (q < 0.05) for **{everything['hurts']:.0f} of "
            f"{n}** directions ({everything['share']:.1%}), and more than {LARGE:.0%} of it for "
            f"**{everything['large']:.0f}**."
        )
    ]
    if everything["controlled"]:
        said.append(
            f"Of {everything['controlled']:.0f} random changes of the same size in the same places "
            f"**{everything['control_large']:.0f}** cost more than {LARGE:.0%}."
        )
    if np.isfinite(everything["beyond"]):
        lost, low, high = (everything[name] / atlas.baseline.mean for name in ("beyond", "beyond_low", "beyond_high"))
        said.append(
            f"On average over directions, removal costs **{lost:+.1%}** of the return [{low:+.1%}, {high:+.1%}] beyond "
            f"a random change (p = {everything['beyond_p_value']:.2g}, a pair for each direction)."
        )
    for kind, sight in SIGHTS.items():
        row, held = (_correlation(atlas, kind, sight, response) for response in ("damage", "damage at equal size"))
        if row is not None and held is not None:
            said.append(_predicts(row, held))
    said += [_better(atlas, *names) for names in PREDICTORS if _is_told(atlas, names[-1])]
    if len(atlas.directions) < atlas.planned:
        said.append(f"The sweep is not finished: {n} of {atlas.planned} directions are measured.")
    return said


def _correlation(atlas: Atlas, kind: str, sight: str, response: str) -> dict[str, Any] | None:
    table = atlas.correlations
    if table.empty:
        return None
    side, _, embedding = sight.partition(" ")
    rows = table[
        (table["what"] == kind)
        & (table["side"] == side)
        & (table["embedding"] == embedding)
        & (table["response"] == response)
    ]
    return None if rows.empty else {str(key): value for key, value in rows.iloc[0].to_dict().items()}


def _predicts(row: dict[str, Any], held: dict[str, Any]) -> str:
    return (
        f"{row['kind']}: |cosine| with {row['embedding']} against damage has rank correlation "
        f"**{_signed(row['rho'])}** {_interval(row)} over {row['n']} directions: {_relation(row)}. Among directions of "
        f"equal size it is **{_signed(held['rho'])}** {_interval(held)}: {_relation(held)}."
    )


def _predictor(atlas: Atlas, name: str) -> dict[str, Any] | None:
    """Over all matrices."""
    table = atlas.predictors
    rows = table[(table["what"] == "all") & (table["predictor"] == name)] if len(table) else table
    return None if rows.empty else {str(key): value for key, value in rows.iloc[0].to_dict().items()}


def _is_told(atlas: Atlas, name: str) -> bool:
    found = _predictor(atlas, name)
    return found is not None and bool(np.isfinite(found["rho"]))


def _better(atlas: Atlas, first: str, second: str, *names: str) -> str:
    one, other, difference = (_predictor(atlas, name) or {} for name in names)
    if difference["low"] > 0:
        verdict = "the second predicts better"
    else:
        verdict = "the first predicts better" if difference["high"] < 0 else "neither is seen to predict better"
    return (
        f"{first} against damage has rank correlation **{_signed(one['rho'])}** {_interval(one)}, {second} "
        f"**{_signed(other['rho'])}** {_interval(other)}; the difference is {_signed(difference['rho'])} "
        f"{_interval(difference)}: {verdict}."
    )


def _interval(row: dict[str, Any]) -> str:
    return f"[{_signed(row['low'])}, {_signed(row['high'])}]"


def _relation(row: dict[str, Any]) -> str:
    if row["low"] > 0:
        return "a closer match goes with more damage"
    return "a closer match goes with less damage" if row["high"] < 0 else "no relation is seen"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def write_atlas(atlas: Atlas, out: Path, name: str = "the model", command: str = "") -> Path:
    """Write ``atlas.html`` and its tables as CSV; returns the page.

    ``weighted.csv`` is there only where activation-aware directions were removed.

    Raises:
        DtLensError: when the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        tables = ["directions", "correlations", "shares", "predictors"] + ["weighted"] * bool(len(atlas.weighted))
        for what in tables:
            getattr(atlas, what).to_csv(out / f"{what}.csv", index=False, float_format="%.6g")
    except OSError as error:
        raise DtLensError(
            f"The atlas cannot be written to {out}: {error.strerror or error}; choose another."
        ) from error
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
            "episodes per direction": atlas.options["episodes"],
            "controls per direction": atlas.options["controls"],
            "seed": atlas.options["seed"],
            "version": f"dt-lens {__version__}",
        },
        command=command,
    )
    return page


def _looks_of(atlas: Atlas) -> list[figures.Looks]:
    kinds = set(atlas.directions["kind"])
    return [(kind, sight) for kind, sight in SIGHTS.items() if kind in kinds and sight in atlas.directions]


def _damage(atlas: Atlas) -> Section:
    looks = _looks_of(atlas)
    shown: dict[str, Any] = {}
    named = {"damage": "as it is", "damage_per_energy": "per unit energy", "beyond": "beyond the control"}
    for response, what in named.items():
        if atlas.directions[response].notna().any():
            shown[what] = figures.damage_against(
                atlas.directions, looks, response=response, said=[_line(atlas, *look, response) for look in looks]
            )
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
        ],
    )


def _line(atlas: Atlas, kind: str, sight: str, response: str) -> str:
    row = _correlation(atlas, kind, sight, "damage at equal size" if response == "damage" else response)
    if row is None or np.isnan(row["rho"]):
        return ""
    given = " at equal size" if response == "damage" else ""
    return f"rho{given} {_signed(row['rho'])} [{_signed(row['low'])}, {_signed(row['high'])}]"


def _shares(atlas: Atlas) -> Section:
    blocks: list[Any] = [Plot(figures.shares(atlas.shares))]
    blocks.append(Plot(figures.along_the_spectrum(atlas.directions, atlas.baseline.mean)))
    worst = atlas.directions.sort_values("damage", ascending=False).head(SHOWN)
    columns = ["matrix", "sv", "sigma", "energy", "mean_return", "damage", "q_value", "failure_rate", "control_damage"]
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
    found = int((kinds["q_value"] < 0.05).sum())
    text = (
        f"{len(kinds)} correlations of kinds of matrices with every embedding on every side; {found} at q < 0.05 "
        "(Benjamini-Hochberg over all, single matrices included)."
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
    return Section(
        "How it was measured",
        [
            (
                f"Every direction was removed (its sigma set to 0) for {options['episodes']} episodes from seed "
                f"{options['seed']} on, the same for all, and compared with the unedited agent seed by seed. p is by "
                "sign flips of the paired differences; q is "
                "Benjamini-Hochberg over the directions."
            ),
            (
                "Rank correlations take ranks inside each matrix, so that what differs between matrices counts for "
                "nothing; intervals are bootstraps over directions, p by permutation inside each matrix. At equal "
                "size, ranks and permutations stay among about six neighbours in the energy, on real inputs "
                "where it is known."
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
    if atlas.shares["control_large"].notna().any():
        names[5:5] = ["control_large", "beyond"]
    return atlas.shares[names]
