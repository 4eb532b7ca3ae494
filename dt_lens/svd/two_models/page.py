"""The page of what changed between two models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from dt_lens.arguments import atomic_write, local_path, require_offers
from dt_lens.lens.matrices import RESIDUAL
from dt_lens.lens.token_text import spelled, texts
from dt_lens.report.page import Block, Folded, Note, Plot, Section, Table, write_report
from dt_lens.report.tables import Format
from dt_lens.svd.two_models.summary import HEADINGS, is_rounding, most_changed, readable, sentence

if TYPE_CHECKING:
    from dt_lens.svd.two_models.comparison import ModelChanges

__all__ = ["write_page"]

DETAILED = 4  # matrices whose directions and labels the page shows


def write_page(changes: ModelChanges, folder: str | Path, command: str = "") -> Path:
    """Write ``comparison.html``, a page with figures, tables and the labels that moved, and ``comparison.csv``.

    Args:
        changes: what ``dt_lens.compare`` returned.
        folder: created if missing.
        command: shown on the page as the command that made it.

    Returns:
        the page's path.

    Raises:
        DtLensError: when the folder cannot be written.
    """
    require_offers(changes, "changes", "a result of compare", "table", "notes", "most_changed")
    folder = local_path(folder, "folder")
    with atomic_write(folder / "comparison.csv") as part:
        changes.table.to_csv(part, index=False)
    a, b = changes.names
    table = readable(most_changed(changes.table, len(changes.table)))
    changed = list(changes.most_changed(DETAILED).query("relative_change > 0")["matrix"])
    same = (
        f"All {len(changes.table)} matrices of the two models hold the same numbers, so there is nothing to draw: no "
        "singular value moved and no direction turned."
    )
    if is_rounding(changes.table):
        changed, same = [], f"{sentence(changes.table, changes.names)} No figure is drawn of it."
    sections = [
        Section("What changed", [*(Note(note) for note in changes.notes), same])
        if not changed
        else Section(
            "What changed",
            [
                *(Note(note) for note in changes.notes),
                Plot(changes.plot("change")),
                Plot(changes.plot("spectra")),
                Plot(changes.plot("angles"), _by_chance(changes.table)),
                Table(
                    table,
                    _ABOUT,
                    headings={k: v for k, v in HEADINGS.items() if k in table.columns},
                    formats=_small(table),
                ),
            ],
        ),
        *([Section("The most changed matrices", _details(changes, changed))] if changed else []),
    ]
    facts = {
        a: _stored(changes, 0),
        b: _stored(changes, 1),
        "LayerNorm": "folded into the matrices" if changes.folded else "not folded in",
        "matrices": len(changes.table),
    }
    return write_report(
        folder / "comparison.html",
        f"{a} and {b}: what changed",
        sections,
        verdict=_verdict(changes),
        facts=facts,
        command=command,
    )


_ABOUT = (
    "A row per matrix. The effective rank is the number of directions that the change has; the share is the part of "
    "its energy in the first. Angles are mean principal angles, in degrees, between the leading k directions."
)


def _by_chance(table: pd.DataFrame) -> str:
    """The angles between random subspaces, for comparison."""
    angles = pd.concat([table.loc[table[f"{s}_side"].isin(RESIDUAL), f"{s}_haar_angle"] for s in ("left", "right")])
    if angles.dropna().empty:
        return ""
    low, high = (f"{angles.quantile(q):.0f}" for q in (0.0, 1.0))
    between = f"{low}°" if low == high else f"{low}° to {high}°"
    return f"Two random subspaces of the same sizes would be at {between}."


def _details(changes: ModelChanges, names: list[str]) -> list[Block]:
    blocks: list[Block] = []
    for name in names:
        directions = changes.directions(name)
        matched = directions[directions["matched"]]
        rows = directions[(directions["sv_a"].fillna(0) < 20)].head(20).drop(columns=["matched"])
        blocks.append(
            f"`{name}`: {len(matched)} of {len(directions)} blocks of directions are matched with an overlap of 0.5 or "
            "more."
        )
        change = changes.change(name, 3)
        strong = int((change.sigma >= 0.05 * change.sigma[:1]).sum())
        for side in change.matrix.residual_sides:
            for embedding in changes.embeddings_of_both(side):
                moved = changes.labels(name, embedding, side, by="change", k=strong, n=12)
                if moved.empty:
                    continue
                moved["label"] = [spelled(text) for text in texts(list(moved["label"]))]
                caption = (
                    f"`{embedding}` on the {side} side: the labels nearest to the leading directions of the change; "
                    "a and b are cosines with either model's own labels."
                )
                shown = moved.drop(columns=["index"])
                blocks.append(Folded(f"{name}: {embedding}", [Table(shown, caption, formats=_cosines(shown))]))
        blocks.append(Folded(f"{name}: directions", [Table(rows, "The leading directions in both models.")]))
    return blocks


def _cosines(table: pd.DataFrame) -> dict[str, str | Format]:
    return {name: "+.3f" for name in ("a", "b", "label_cosine") if name in table}


def _small(table: pd.DataFrame) -> dict[str, str | Format]:
    small = dict.fromkeys(("relative_change", "spectrum_change", "spectral_norm_change"), ".3g")
    ranks = {name: ".1f" for name in table.columns if name.endswith(("rank", "angle"))}
    return {**small, **ranks}


def _verdict(changes: ModelChanges) -> list[str]:
    said = [sentence(changes.table, changes.names)]
    changed = changes.table[changes.table["relative_change"] > 0]
    if len(changed):
        rank = changed["change_effective_rank"].median()
        shift = (changed["spectrum_change"] / changed["relative_change"]).median()
        said.append(
            f"The median change has an effective rank of {rank:.1f}, and {100 * shift:.0f} % of its size shows in the "
            "singular values; the rest turns directions."
        )
    return said


def _stored(changes: ModelChanges, which: int) -> str:
    model = (changes._a, changes._b)[which]
    kinds = sorted({str(weight.dtype).removeprefix("torch.") for weight in model.weights.values()})
    return f"{model.structure.n_layers} layers, d_model {model.structure.d_model}, {' and '.join(kinds)}"
