"""Draws the pictures of the pages of results: ``python docs/pictures/results.py`` from the root of the repository.

``court.svg`` has the verdicts, read from the tables of court.md and court_more.md. ``atlas_row.svg`` has two rows of
atlas/directions.csv. ``clusters.svg`` is drawn from made-up points, ``clusters_taxi.svg`` from the bundled taxi agent.
Each is drawn on white, so that it can be read on a dark page too, in colours that the colour-blind tell apart.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

DOCS = Path(__file__).parents[1]
INK, GREY, BLUE, ORANGE, GREEN, PURPLE = "#222222", "#6b6b6b", "#0072b2", "#d55e00", "#00805d", "#a8457f"
LEVELS = (BLUE, ORANGE, GREEN, PURPLE, "#8a6d00")

# The verdicts' colours and the signs that say the same without colour.
VERDICTS = {"supported": (BLUE, "✓"), "no": (ORANGE, "✗"), "undecided": ("#d0d0d0", "?")}
SAME = {"supported": "supported", "not supported": "no", "no": "no", "undecided": "undecided"}
CLAIMS = {
    1: "W_in matches the outputs more than W_out",
    2: "Direction 0 is the most common output",
    3: "Editing W_in hurts more, at equal energy",
    4: "The first block's W_in and OV read the input",
    5: "The reward's match beats chance",
    6: "The first block's W_out follows time",
    7: "A closer match predicts more damage",
    8: "A direction that gathers labels acts where it matters",
}
Found = tuple[str, str]  # a verdict as it should be, and as the note's code computed it; "" where not applicable


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """A picture on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" font-family="sans-serif" font-size="15">'
    )
    back = f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", back, *parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, fill: str = INK, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" text-anchor="{anchor}" {more}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" {more}/>'


def line(x: float, y: float, to_x: float, to_y: float, stroke: str = INK, more: str = "") -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{stroke}" {more}/>'


def dots(points: Sequence[tuple[float, float]], fill: str, size: float) -> str:
    """Many round dots as one path."""
    path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
    return f'<path d="{path}" stroke="{fill}" stroke-width="{size}" stroke-linecap="round" opacity="0.75"/>'


def verdicts() -> dict[str, dict[int, Found]]:
    """For each model and claim the two verdicts, from the tables on the pages."""
    found: dict[str, dict[int, Found]] = {}
    for page in ("court.md", "court_more.md"):
        header: list[str] = []
        section = ""
        before: list[str] = []
        for row in (DOCS / page).read_text(encoding="utf-8").splitlines():
            if row.startswith("#"):
                section = row.strip("# ").partition(",")[0].strip("`")
            cells = [cell.strip() for cell in row.strip("|").split("|")] if row.startswith("|") else []
            if set("".join(cells)) <= set("-:"):  # the line below a header, or no table
                header = before if cells else header
            elif header and header[0] == "claim" and (number := re.match(r"\d", cells[0])):
                claim = int(number[0])
                if "as it should be" in header:
                    found.setdefault(section, {})[claim] = (_bold(cells[1]), _italic(cells[-1]))
                else:
                    for model, cell in zip(header[1:], cells[1:], strict=True):
                        found.setdefault(model, {})[claim] = (_bold(cell), _italic(cell))
            elif header and cells[0] == "verdict":
                for model, cell in zip(header[1:], cells[1:], strict=True):
                    found.setdefault(model.strip("`"), {})[8] = (_bold(cell), "")
            before = cells
    return found


def _bold(cell: str) -> str:
    said = re.search(r"\*\*([a-z ]+)\*\*", cell)
    return SAME[said[1]] if said else ""


def _italic(cell: str) -> str:
    said = re.search(r"(?<!\*)\*([a-z ]+)\*(?!\*)", cell)
    return SAME[said[1]] if said else ""


def court() -> str:
    """A row of squares for each claim, one for each model."""
    table = verdicts()
    step, left, top = 45, 15, 108
    parts = []
    for column, model in enumerate(table):
        x, y = left + column * step + 24, top - 12
        parts.append(text(x, y, model, more=f'transform="rotate(-50 {x} {y})" font-size="14"'))
    for row, (claim, words) in enumerate(CLAIMS.items()):
        y = top + row * 76
        parts.append(text(left, y + 16, f"{claim}  {words}", more='font-weight="bold"'))
        for column, model in enumerate(table):
            should, note = table[model].get(claim, ("", ""))
            x = left + column * step
            if not should:
                parts.append(text(x + 20, y + 44, "–", GREY, "middle"))
                continue
            fill, sign = VERDICTS[should]
            parts.append(box(x, y + 24, 40, 28, fill, 'rx="3"'))
            parts.append(text(x + 20, y + 44, sign, INK if should == "undecided" else "#ffffff", "middle"))
            if note:
                parts.append(box(x, y + 55, 40, 7, VERDICTS[note][0], 'rx="2"'))
    y = top + len(CLAIMS) * 76 + 14
    for x, (verdict, (fill, sign)) in zip((15, 140, 290), VERDICTS.items(), strict=True):
        parts.append(box(x, y, 24, 20, fill, 'rx="3"'))
        parts.append(text(x + 12, y + 15, sign, INK if verdict == "undecided" else "#ffffff", "middle"))
        parts.append(text(x + 31, y + 15, "not supported" if verdict == "no" else verdict))
    parts.append(text(412, y + 15, "–  no verdict"))
    parts.append(text(15, y + 44, "The strip below: what the note's code would have said.", GREY))
    return svg(550, y + 60, "The verdicts on eight claims about ten models", parts)


def atlas_row() -> str:
    """Two removals of the hopper atlas, each beside its control."""
    with (DOCS / "atlas" / "directions.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["matrix"], row["sv"]): row for row in csv.DictReader(file)}
    parts, left, right, most = [], 20, 520, 3300.0
    scale = (right - left) / most
    for number, name in enumerate(("blocks.1.mlp.W_in", "blocks.0.mlp.W_in")):
        row = rows[name, "0"]
        damage, control = float(row["damage"]), float(row["control_damage"])
        unedited = float(row["mean_return"]) + damage
        y = 30 + number * 220
        parts.append(text(left, y, f"{name}, sv 0", more='font-weight="bold"'))
        bars = (
            ("unedited", unedited, GREY, ""),
            ("direction removed", unedited - damage, ORANGE, f"damage {damage:,.0f}"),
            ("control: a random change", unedited - control, BLUE, f"its damage {control:,.0f}"),
        )
        for place, (words, value, fill, lost) in enumerate(bars):
            top = y + 12 + place * 50
            parts.append(text(left, top + 15, f"{words}: return {value:,.0f}", INK, more='font-size="14"'))
            parts.append(box(left, top + 21, value * scale, 18, fill))
            if lost:
                end = left + unedited * scale
                gap = left + value * scale
                parts.append(box(gap, top + 21, end - gap, 18, "none", f'stroke="{fill}" stroke-dasharray="4 3"'))
                parts.append(text(end, top + 15, lost, fill, "end", 'font-size="14" font-weight="bold"'))
        beyond = f"beyond the control: {damage:,.0f} - {control:,.0f} = {float(row['beyond']):,.0f}"
        parts.append(text(left, y + 178, beyond, more='font-size="14"'))
    return svg(540, 440, "Two rows of the atlas of hopper: damage, the control's damage, and what is beyond it", parts)


def clusters() -> str:
    """Made-up labels of three kinds along two directions: gathered, and mixed."""
    from dt_lens.statistics import epsilon_squared

    draw = np.random.default_rng(3)
    kinds = np.repeat(np.arange(3), 9)
    parts, left, width = [], 25, 490
    for number, (title, spread) in enumerate((("Gathered by kind", 0.055), ("Mixed", 0.45))):
        middle = np.array([0.2, 0.5, 0.8]) if number == 0 else np.full(3, 0.5)
        places = np.clip(middle[kinds] + spread * draw.uniform(-1.5, 1.5, len(kinds)), 0.02, 0.98)
        if number:  # each kind spread over the whole line
            places = draw.permutation(np.linspace(0.03, 0.97, len(kinds)))
        effect = epsilon_squared(places, kinds.tolist())
        y = 34 + number * 125
        parts.append(text(left, y, title, more='font-weight="bold"'))
        parts.append(text(left + width, y, f"epsilon squared {effect:.2f}", INK, "end"))
        parts.append(line(left, y + 52, left + width, y + 52, GREY, 'stroke-width="2"'))
        for place, kind in zip(places, kinds, strict=True):
            parts.append(_shape(left + place * width, y + 52, int(kind)))
    parts.append(text(left, 268, "Made up. Each sign is a label, and its place is how far along it lies.", GREY))
    return svg(540, 285, "Labels of three kinds along two directions: gathered by kind, and mixed", parts)


def _shape(x: float, y: float, kind: int) -> str:
    """A circle, a square or a triangle, so that the kinds differ without colour too."""
    edge = f'fill="{LEVELS[kind]}" stroke="#ffffff"'
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" {edge}/>'
    if kind == 1:
        return f'<rect x="{x - 7:.1f}" y="{y - 7:.1f}" width="14" height="14" {edge}/>'
    return f'<path d="M{x:.1f} {y - 9:.1f}l9 16h-18z" {edge}/>'


def clusters_taxi() -> str:
    """The taxi's 500 states along one direction that gathers them by the passenger, and along a random one."""
    import dt_lens
    from dt_lens.statistics import epsilon_squared

    matrix, embedding, factor = "blocks.1.attn.OV.0", "state_in", "passenger"
    model = dt_lens.load("taxi", check=False)
    svd = dt_lens.WeightSVD(model)
    states = list(svd.registry[embedding].labels)
    found = svd.cosines(matrix, embedding, "read", 1).iloc[0].to_numpy()
    vectors = svd.labels_of(svd.registry[embedding], svd[matrix].matrix, "read")
    random = vectors.cosines(_random_direction(svd[matrix].side("read").shape[1]))[0]
    levels = [re.search(rf"{factor} ([\w ]+)", str(state)) for state in states]
    kinds = [found[1] for found in levels if found]
    parts, left, width, place = [], 120, 405, sorted(set(kinds), key=lambda kind: (len(kind) > 1, kind))
    draw = np.random.default_rng(0)
    shown = (("A direction of a head in block 1", found), ("A random direction", random))
    limit = 1.02 * max(float(np.abs(values).max()) for _, values in shown)

    def across(cosine: float) -> float:
        return left + width * (0.5 + 0.5 * cosine / limit)

    for number, (title, values) in enumerate(shown):
        y = 34 + number * 215
        effect = epsilon_squared(values, kinds)
        parts.append(text(15, y, title, more='font-weight="bold"'))
        parts.append(text(left + width, y, f"epsilon squared {effect:.2f}", INK, "end"))
        for row, kind in enumerate(place):
            at = y + 28 + row * 32
            mine = values[np.array(kinds) == kind]
            points = [(across(value), at + draw.uniform(-8, 8)) for value in mine]
            parts.append(text(15, at + 5, "in the taxi" if len(kind) > 1 else f"at {kind}", LEVELS[row]))
            parts.append(dots(points, LEVELS[row], 5))
            median = across(float(np.median(mine)))
            parts.append(line(median, at - 13, median, at + 13, INK, 'stroke-width="2.5"'))
    for cosine in (-0.4, -0.2, 0.0, 0.2, 0.4):
        parts.append(line(across(cosine), 430, across(cosine), 436, GREY))
        parts.append(text(across(cosine), 452, f"{cosine:.1f}", GREY, "middle"))
    parts.append(line(left, 430, left + width, 430, GREY))
    parts.append(text(15, 478, "Across: the state's cosine with the direction. Line: the median.", GREY))
    return svg(540, 492, "The taxi's 500 states along two directions, by where the passenger is", parts)


def _random_direction(size: int) -> Any:
    drawn = np.random.default_rng(0).normal(size=(1, size))
    drawn -= drawn.mean()  # the LayerNorm in front takes the mean away
    return drawn / np.linalg.norm(drawn)


def main() -> None:
    for draw in (court, atlas_row, clusters, clusters_taxi):
        (Path(__file__).parent / f"{draw.__name__}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
