"""The page and the notebook's view of a comparison of two models."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from dt_lens.arguments import atomic_write
from dt_lens.lens.matrices import RESIDUAL
from dt_lens.lens.token_text import spelled, texts
from dt_lens.report.page import Block, Folded, Note, Plot, Section, Table, write_report
from dt_lens.report.tables import Format

if TYPE_CHECKING:
    from dt_lens.svd.two_models.comparison import Comparison

__all__ = ["notebook_html", "write_comparison"]

LOOKED_INTO = 4  # matrices whose directions and labels the page shows
HEADINGS = {
    "relative_change": "relative change",
    "change_effective_rank": "effective rank of the change",
    "change_stable_rank": "stable rank",
    "change_leading_share": "its first direction's share",
    "spectrum_change": "spectrum change",
    "spectral_norm_change": "largest σ change",
}
SHOWN = ["matrix", *HEADINGS, "k"]


def notebook_html(comparison: Comparison) -> str:
    """The most changed matrices as a plain table that any notebook's theme suits."""
    table = _readable(comparison.most_changed(12))
    headings = {name: name for name in table.columns} | {k: v for k, v in HEADINGS.items() if k in table.columns}
    head = "".join(f"<th>{html.escape(headings[name])}</th>" for name in table.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(value))}</td>" for value in row) + "</tr>"
        for row in table.itertuples(index=False)
    )
    caption = html.escape(" ".join([_sentence(comparison), *comparison.notes]))
    return f"<p>{caption}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def write_comparison(comparison: Comparison, folder: Path, command: str) -> Path:
    """Write ``comparison.html`` and ``comparison.csv``; see ``Comparison.save``."""
    with atomic_write(folder / "comparison.csv") as part:
        comparison.table.to_csv(part, index=False)
    a, b = comparison.names
    table = _readable(comparison.table.sort_values("relative_change", ascending=False, kind="stable"))
    changed = list(comparison.most_changed(LOOKED_INTO).query("relative_change > 0")["matrix"])
    sections = [
        Section(
            "What changed",
            [
                *(Note(note) for note in comparison.notes),
                Plot(comparison.plot("change")),
                Plot(comparison.plot("spectra")),
                Plot(comparison.plot("angles"), _by_chance(comparison.table)),
                Table(
                    table,
                    _ABOUT,
                    headings={k: v for k, v in HEADINGS.items() if k in table.columns},
                    formats=_small(table),
                ),
            ],
        ),
        *([Section("The most changed matrices", _details(comparison, changed))] if changed else []),
    ]
    facts = {
        a: _stored(comparison, 0),
        b: _stored(comparison, 1),
        "LayerNorm": "folded into the matrices" if comparison.folded else "not folded in",
        "matrices": len(comparison.table),
    }
    return write_report(
        folder / "comparison.html",
        f"{a} and {b}: what changed",
        sections,
        verdict=_verdict(comparison),
        facts=facts,
        command=command,
    )


_ABOUT = (
    "A row per matrix. The effective rank says of how many directions the change is; the share is the part of its "
    "energy in the first. Angles are mean principal angles, in degrees, between the leading k directions."
)


def _by_chance(table: pd.DataFrame) -> str:
    """What the angles would be if nothing was kept."""
    angles = pd.concat([table.loc[table[f"{s}_side"].isin(RESIDUAL), f"{s}_haar_angle"] for s in ("left", "right")])
    if angles.dropna().empty:
        return ""
    low, high = (f"{angles.quantile(q):.0f}" for q in (0.0, 1.0))
    between = f"{low}°" if low == high else f"{low}° to {high}°"
    return f"Two random subspaces of the same sizes would be at {between}."


def _details(comparison: Comparison, names: list[str]) -> list[Block]:
    blocks: list[Block] = []
    for name in names:
        directions = comparison.directions(name)
        matched = directions[directions["matched"]]
        rows = directions[(directions["sv_a"].fillna(0) < 20)].head(20).drop(columns=["matched"])
        blocks.append(
            f"`{name}`: {len(matched)} of {len(directions)} blocks of directions are matched with an overlap of 0.5 or "
            "more."
        )
        change = comparison.change(name, 3)
        strong = int((change.sigma >= 0.05 * change.sigma[:1]).sum())
        for side in change.matrix.residual_sides:
            for embedding in comparison.embeddings_of_both(side):
                moved = comparison.labels(name, embedding, side, by="change", k=strong, n=12)
                if moved.empty:
                    continue
                moved["label"] = [spelled(text) for text in texts(list(moved["label"]))]
                caption = (
                    f"`{embedding}` on the {side} side: the labels nearest to the leading directions of the change; "
                    "a and b are cosines with either model's own labels."
                )
                shown = moved.drop(columns=["index"])
                blocks.append(Folded(f"{name}: {embedding}", [Table(shown, caption, formats=_cosines(shown))]))
        blocks.append(Folded(f"{name}: directions", [Table(rows, "The leading directions and what they have become.")]))
    return blocks


def _cosines(table: pd.DataFrame) -> dict[str, str | Format]:
    return {name: "+.3f" for name in ("a", "b", "label_cosine") if name in table}


def _small(table: pd.DataFrame) -> dict[str, str | Format]:
    small = dict.fromkeys(("relative_change", "spectrum_change", "spectral_norm_change"), ".3g")
    ranks = {name: ".1f" for name in table.columns if name.endswith(("rank", "angle"))}
    return {**small, **ranks}


def _readable(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that a reader looks at first, angles under the names of their sides."""
    shown = table[SHOWN].copy()
    for side in ("left", "right"):
        for name in dict.fromkeys(table[f"{side}_side"]):
            if name not in RESIDUAL:
                continue
            values = table[f"{side}_angle"].where(table[f"{side}_side"] == name)
            column = f"{name}_angle"
            shown[column] = values if column not in shown else shown[column].fillna(values)
    return shown


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.3g}"
    return str(value)


def _sentence(comparison: Comparison) -> str:
    table = comparison.table
    changed = table[table["relative_change"] > 0]
    a, b = comparison.names
    if changed.empty:
        return f"{a} and {b} have the same weights in all {len(table)} matrices."
    most = comparison.most_changed(1).iloc[0]
    return (
        f"{len(changed)} of {len(table)} matrices differ between {a} and {b}; most of all {most['matrix']}, by "
        f"{most['relative_change']:.2g} of its norm."
    )


def _verdict(comparison: Comparison) -> list[str]:
    said = [_sentence(comparison)]
    changed = comparison.table[comparison.table["relative_change"] > 0]
    if len(changed):
        rank = changed["change_effective_rank"].median()
        shift = (changed["spectrum_change"] / changed["relative_change"]).median()
        said.append(
            f"The median change has an effective rank of {rank:.1f}, and {100 * shift:.0f} % of its size shows in the "
            "singular values; the rest turns directions."
        )
    return said


def _stored(comparison: Comparison, which: int) -> str:
    model = (comparison._a, comparison._b)[which]
    kinds = sorted({str(weight.dtype).removeprefix("torch.") for weight in model.weights.values()})
    return f"{model.structure.n_layers} layers, d_model {model.structure.d_model}, {' and '.join(kinds)}"
