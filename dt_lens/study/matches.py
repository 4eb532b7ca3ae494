"""The part of a study's report about what directions match: the significant ones first, the rest folded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from dt_lens.lens.token_text import spelled, texts
from dt_lens.report import heatmaps, spectra
from dt_lens.report.page import Block, Choice, Folded, Note, Plot, Section, Table
from dt_lens.report.spectra import best_matches
from dt_lens.report.style import signed
from dt_lens.report.tables import anchor_of
from dt_lens.statistics.outcomes import wilson
from dt_lens.study.result import StudyResult
from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["match_section", "row_anchor", "spelled_labels"]

ALPHA = 0.05
SHOWN = 64  # directions of a heatmap, and labels
LISTED = 400  # rows of the table of directions; scan.csv has all
POLE = 3  # labels at either end of a direction
LARGEST = 20_000  # labels of an embedding up to which the ends of directions are listed


def row_anchor(row: Mapping[Any, Any]) -> str:
    """The id of a direction's row in the table of matches."""
    return anchor_of(row["matrix"], row["side"], row["sv"], row["embedding"])


def spelled_labels(rows: pd.DataFrame) -> pd.DataFrame:
    """With every character of a label visible: many tokens differ in the space before them alone."""
    return rows.assign(label=[spelled(str(label)) for label in rows["label"]])


def match_section(result: StudyResult) -> Section:
    """The scan: an overview, the directions that match significantly with their ends, and the rest, folded."""
    table, svd = result.table, result.svd
    untrained = table[table["embedding"].isin(table.attrs["untrained"])]
    found, tried = int((untrained["q_value"] < ALPHA).sum()), len(untrained)
    significant = int((table["q_value"] < ALPHA).sum())
    names = list(dict.fromkeys(table["matrix"]))
    rows = _listed(table)
    anchors = [row_anchor(row) for row in rows.to_dict("records")]
    known = set(anchors)

    def link(row: Mapping[Any, Any]) -> str:
        return anchor if (anchor := row_anchor(row)) in known else ""

    overview = heatmaps.scan_overview(table, link=link)
    directions = _directions(rows, svd)
    clear = min(significant, LISTED)
    shortened, least = "", f", without a q below {ALPHA:g},"
    if clear < significant:  # then the best of a cell may be significant too
        shortened, least = f" Of {significant:,} the {clear:,} strongest are listed first; scan.csv has all.", ""
    blocks: list[Block] = [
        (
            f"Every direction of {len(names)} matrices was compared with every label of "
            f"{table['embedding'].nunique()} embeddings. Of {len(table):,} comparisons **{significant:,}** find a "
            f"match that is closer than chance (q < {ALPHA:g})."
        ),
        Plot(overview, "A click on a cell leads to its direction in the table below."),
        Table(
            directions,
            "The closest matches first. Towards and away are the labels at either end of the direction, with their "
            f"cosines; its sign is a convention, so neither end is the right one.{shortened} Rows "
            f"after them{least} are the best of their cell of the figure above.",
            headings={
                "sv": "sv",
                "z": "z",
                "q_value": "q",
                "label": "best label",
                "towards": "towards",
                "away": "away",
            },
            first=max(1, min(10, clear)),
            anchors=anchors,
        ),
        Choice(
            _heatmaps(result, link, every=False),
            "matrix and embedding",
            "The directions with a significant match, or that were edited, in the matrices of the edits; a dot marks "
            f"q < {ALPHA:g}. A click on a row leads to its place in the table above.",
        ),
        Folded(
            "How a match is tested",
            [
                (
                    "A direction's match is the best over all labels of an embedding, and its null is that best match "
                    "under a random rotation. Where the stream varies in few dimensions that null calls many "
                    "discoveries that others do not: `dt-lens scan --null spectrum` keeps how much of each direction "
                    "lies where the stream varies."
                ),
                Table(result.strongest, "The best match of each whole matrix, all its directions rotated at once."),
            ],
        ),
        Folded(
            f"All of the first {SHOWN} directions of the edited matrices",
            [Choice(_heatmaps(result, link, every=True), "matrix and embedding")],
        ),
        Folded(
            "Singular values, and whether large directions match better",
            [
                Plot(spectra.spectrum({name: svd[name].sigma.cpu().numpy() for name in names})),
                Plot(spectra.sigma_against_cosine(table)),
            ],
        ),
    ]
    if tried:
        low, high = wilson(found, tried)
        said = (
            f"The heads {', '.join(table.attrs['untrained'])} were never trained, which makes them a built-in "
            f"null: {found} of {tried:,} comparisons with them "
            f"are called discoveries ({100 * found / tried:.2f} %, interval {100 * low:.2f} % to {100 * high:.2f} %)."
        )
        blocks.insert(3, Note(said))
    return Section("What the singular directions match", blocks)


def _listed(table: pd.DataFrame) -> pd.DataFrame:
    """The significant rows, strongest first, and then the best row of each matrix and embedding that has none."""
    significant = table[table["q_value"] < ALPHA].sort_values("z", ascending=False, kind="stable").head(LISTED)
    best = best_matches(table, ["place", "embedding"], "cosine", ALPHA)[list(table.columns)]
    both = pd.concat([significant, best.sort_values("z", ascending=False, kind="stable").head(LISTED)])
    return both.drop_duplicates(["matrix", "side", "sv", "embedding"]).reset_index(drop=True)


def _directions(rows: pd.DataFrame, svd: WeightSVD) -> pd.DataFrame:
    """The rows with the labels at both ends of each direction."""
    towards, away = np.full(len(rows), "", dtype=object), np.full(len(rows), "", dtype=object)
    for _, group in rows.groupby(["matrix", "side", "embedding"], sort=False):
        matrix, side, embedding = group.iloc[0][["matrix", "side", "embedding"]]
        if len(svd.registry[embedding]) > LARGEST:
            continue
        cosines = svd.cosines(matrix, embedding, side, int(group["sv"].max()) + 1)
        names, values = texts([str(label) for label in cosines.columns]), cosines.to_numpy()
        for at, sv in zip(group.index, group["sv"], strict=True):
            order = np.argsort(-values[sv], kind="stable")
            towards[at] = _ends(names, values[sv], [i for i in order[:POLE] if values[sv][i] > 0])
            away[at] = _ends(names, values[sv], [i for i in order[::-1][:POLE] if values[sv][i] < 0])
    kept = spelled_labels(rows)[["matrix", "side", "sv", "embedding", "label", "cosine", "z", "q_value"]]
    return kept.assign(towards=towards, away=away)


def _ends(names: list[str], values: Any, chosen: list[int]) -> str:
    return ", ".join(f"{spelled(names[i])} {signed(float(values[i]))}" for i in chosen) or "–"


def _heatmaps(result: StudyResult, link: Any, every: bool) -> dict[str, Any]:
    """The matrices of the best matches against the embedding that they match; only directions that matter or all."""
    svd, found = result.svd, dict[str, Any]()
    scan, verdicts = result.table, result.verdicts
    chosen = verdicts[verdicts["role"].isin(["strong", "given"])]
    for row in chosen.to_dict("records"):
        matrix, side, embedding = row["matrix"], row["side"], row["embedding"]
        rows = scan[(scan["matrix"] == matrix) & (scan["side"] == side) & (scan["embedding"] == embedding)]
        q = rows.set_index("sv")["q_value"]
        edited = verdicts[(verdicts["matrix"] == matrix) & (verdicts["side"] == side)]["sv"]
        shown = list(range(SHOWN)) if every else sorted({*q.index[q < ALPHA], *map(int, edited)})[:SHOWN]
        cosines = svd.cosines(matrix, embedding, side)
        cosines = cosines.loc[[sv for sv in shown if sv in cosines.index]]
        if cosines.shape[1] > SHOWN:
            kept = set(cosines.abs().max().sort_values(ascending=False).index[:SHOWN])
            cosines = cosines[[label for label in cosines.columns if label in kept]]
        directions = [int(sv) for sv in cosines.index]
        place = {"matrix": matrix, "side": side, "embedding": embedding}
        found[f"{matrix} ({side}) × {embedding}"] = heatmaps.scan_heatmap(
            cosines,
            q_values=q.reindex(cosines.index).to_frame(),
            sigma=svd[matrix].sigma.cpu().numpy()[directions],
            matrix=f"{matrix} ({side})",
            embedding=embedding,
            links=[link({**place, "sv": sv}) for sv in directions],
        )
    return found
