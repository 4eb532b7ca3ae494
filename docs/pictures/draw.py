"""Draw the pictures of the pages on the method: ``python docs/pictures/draw.py`` writes them beside this file.

Each is 480 wide, so that its words can be read on a phone, on a white card, so that it reads on a dark page too. The
colours are Okabe and Ito's, and nothing is told by colour alone. The same seed gives the same file.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy import stats

FOLDER = Path(__file__).parent
WIDTH = 480
INK, GREY, LIGHT, BLUE, ORANGE = "#222222", "#6e6e6e", "#c8c8c8", "#0072b2", "#d55e00"


class Picture:
    """Shapes and words, collected as SVG."""

    def __init__(self, name: str, title: str, height: int) -> None:
        self.name, self.title, self.height, self.parts = name, title, height, list[str]()

    def text(
        self, x: float, y: float, words: str, colour: str = INK, size: int = 15, anchor: str = "start",
        bold: bool = False,
    ) -> None:  # fmt: skip
        weight = ' font-weight="bold"' if bold else ""
        place = f'x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" text-anchor="{anchor}"'
        self.parts.append(f"<text {place}{weight}>{words}</text>")

    def box(self, x: float, y: float, w: float, h: float, fill: str, stroke: str = "none", rx: float = 0) -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{rx}"'
        self.parts.append(f'<rect {place} fill="{fill}" stroke="{stroke}"/>')

    def line(
        self, x: float, y: float, to_x: float, to_y: float, colour: str = INK, width: float = 1.5, arrow: bool = False,
        dashed: bool = False,
    ) -> None:  # fmt: skip
        place = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{colour}" stroke-width="{width}"'
        end = f' marker-end="url(#m{colour[1:]})"' if arrow else ""
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f"<line {place}{end}{dashes}/>")

    def dot(self, x: float, y: float, colour: str, radius: float = 4) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>')

    def area(self, points: list[tuple[float, float]], fill: str) -> None:
        self.parts.append(f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="{fill}"/>')

    def save(self) -> None:
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}"'
        markers = "".join(
            f'<marker id="m{colour[1:]}" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto" '
            f'markerUnits="userSpaceOnUse"><path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'
            for colour in (INK, GREY, BLUE, ORANGE)
        )
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="sans-serif">'
        card = f'<rect width="{WIDTH}" height="{self.height}" rx="6" fill="#ffffff"/>'
        lines = [head, f"<title>{self.title}</title>", f"<defs>{markers}</defs>", card, *self.parts, "</svg>\n"]
        (FOLDER / self.name).write_text("\n".join(lines), encoding="utf-8")


def null() -> None:
    """The density of |cosine| under a rotation, for one label and for the best of three, with an observed one."""
    d, seen = 128, 0.20
    picture = Picture("null.svg", "How often a random direction matches as well: one label, and the best of three", 400)
    x = np.linspace(0, 0.4, 161)
    cdf = stats.beta(0.5, (d - 1) / 2).cdf(x**2)
    for row, (labels, title) in enumerate([(1, "One label"), (3, "The best of three labels")]):
        top, floor = 50 + 185 * row, 160 + 185 * row
        density = np.diff(cdf**labels) / np.diff(x)  # of labels at right angles, nearly independent in 128 dimensions
        middle = (x[1:] + x[:-1]) / 2
        at = [(40 + 1000 * m, floor - 100 * v / density.max()) for m, v in zip(middle, density, strict=True)]
        edge = 40 + 1000 * seen
        picture.area([(at[0][0], floor), *(p for p in at if p[0] <= edge), (edge, floor)], LIGHT)
        picture.area([(edge, floor), *(p for p in at if p[0] >= edge), (at[-1][0], floor)], ORANGE)
        p = 1 - stats.beta(0.5, (d - 1) / 2).cdf(seen**2) ** labels
        picture.line(40, floor, 445, floor)
        picture.line(edge, top + 10, edge, floor + 5, BLUE, 2.5)
        picture.text(20, top - 22, title, bold=True)
        picture.text(edge + 8, top + 22, f"seen: {seen:.2f}", BLUE)
        picture.text(edge + 8, top + 44, f"p = {p:.2f}: the orange share", ORANGE)
        for tick in (0, 0.1, 0.2, 0.3, 0.4):
            picture.text(40 + 1000 * tick, floor + 18, f"{tick:.1f}", GREY, 13, "middle")
    picture.text(20, 386, "|cosine| of a random direction, 128 dimensions", GREY, 14)
    picture.save()


def sides() -> None:
    """W_in and W_out between the stream and the neurons, with the vectors of one direction on each side."""
    picture = Picture("sides.svg", "Which side of W_in and of W_out faces the residual stream", 380)

    def vector(x: float, y: float, n: int, colour: str) -> None:
        for i, shade in enumerate(np.random.default_rng(n).random(n)):
            picture.box(x + 14 * i, y, 14, 14, colour, "#ffffff")
            picture.box(x + 14 * i, y, 14, 14, f'#ffffff" fill-opacity="{0.75 * shade:.2f}', "#ffffff")

    for row, (name, above, below, shape) in enumerate(
        [
            ("W_in", ("read vector", BLUE, 10), ("neuron vector", GREY, 20), "[d_model, d_mlp]"),
            ("W_out", ("neuron vector", GREY, 20), ("write vector", ORANGE, 10), "[d_mlp, d_model]"),
        ]
    ):
        top = 24 + 178 * row
        picture.text(20, top + 12, name, bold=True, size=17)
        picture.text(20, top + 32, shape, GREY, 13)
        for y, (words, colour, n) in ((top, above), (top + 92, below)):
            vector(150, y, n, colour)
            picture.text(150, y + 32, words, colour)
        picture.line(156, top + 42, 156, top + 84, INK, 2, arrow=True)
        picture.text(172, top + 68, "times sigma", INK, 14)
    picture.text(252, 56, "faces the stream: d_model numbers", BLUE, 13)
    picture.text(252, 148, "the MLP's neurons: d_mlp numbers", GREY, 13)
    picture.text(252, 234, "the MLP's neurons", GREY, 13)
    picture.text(252, 326, "faces the stream", ORANGE, 13)
    picture.line(20, 186, 460, 186, LIGHT, 1)
    picture.text(20, 364, "Only the coloured vectors can be compared with embeddings.", INK, 14)
    picture.save()


def change() -> None:
    """A toy matrix: what an edit changes of each singular direction, beside a random change of the same energy."""
    picture = Picture("change.svg", "An edit changes one direction, a control of the same energy a little of each", 400)
    rng = np.random.default_rng(4)
    rows, columns = 10, 14
    u, _, vt = np.linalg.svd(rng.normal(size=(rows, columns)), full_matrices=False)
    sigma = np.linspace(3, 1, rows)
    edit = -sigma[0] * np.outer(u[:, 0], vt[0])
    left, right = rng.normal(size=rows), rng.normal(size=columns)
    control = sigma[0] * np.outer(left / np.linalg.norm(left), right / np.linalg.norm(right))
    for row, (title, colour, delta) in enumerate(
        [("The edit: direction 0 is removed", ORANGE, edit), ("Its control: a random change", BLUE, control)]
    ):
        top = 22 + 184 * row
        picture.text(20, top + 6, title, colour, bold=True)
        for i in range(rows):
            for j in range(columns):
                value = delta[i, j] / np.abs(edit).max()
                tone = ORANGE if value > 0 else BLUE
                fade = f'{tone}" fill-opacity="{min(1, abs(value)):.2f}'
                picture.box(20 + 12 * j, top + 20 + 12 * i, 12, 12, fade, "#eeeeee")
        size = np.linalg.norm(delta)
        picture.text(20, top + 158, f"the change; energy {size:.2f}", GREY, 13)
        moved = np.abs(np.einsum("ki,ij,kj->k", u.T, delta, vt))
        floor = top + 140
        picture.line(226, floor, 460, floor)
        for k, value in enumerate(moved):
            height = 115 * value / sigma[0]
            picture.box(230 + 23 * k, floor - height, 15, height, colour)
            picture.text(237 + 23 * k, floor + 15, str(k), GREY, 12, "middle")
    picture.text(226, 384, "change of each direction's sigma, by sv", GREY, 12)
    picture.save()


def dose() -> None:
    """A dose on one direction, the two kinds of random directions beside it, and the returns that were measured."""
    picture = Picture("dose.svg", "A dose of one direction, its two kinds of control, and the return at each dose", 520)
    picture.text(20, 26, "A dose multiplies sigma", bold=True)
    for k, value in enumerate((0, 0.5, 1, 1.5, 2)):
        x = 50 + 92 * k
        picture.dot(x, 110, INK, 3)
        if value:
            picture.line(x, 110, x, 110 - 30 * value, ORANGE, 3, arrow=True)
        picture.text(x, 132, "1: unedited" if value == 1 else str(value), GREY, 14, "middle")
    picture.text(20, 172, "Beside it, 19 random directions of the same output energy", bold=True)
    for x, title, moved in ((40, "in place of what is read", 0), (270, "in place of what is written", 1)):
        for side, (colour, words) in enumerate(((BLUE, "reads"), (ORANGE, "writes"))):
            centre = (x + 35 + 95 * side, 240)
            fan = (25, 70, 120, 200, 330) if side == moved else ()
            for angle in fan:
                radians = np.deg2rad(angle)
                end = (centre[0] + 32 * np.cos(radians), centre[1] - 32 * np.sin(radians))
                picture.line(*centre, *end, GREY, 1.5, arrow=True)
            if not fan:
                picture.line(*centre, centre[0] + 22, centre[1] - 26, colour, 3, arrow=True)
            picture.text(centre[0], 292, words, GREY if fan else colour, 14, "middle")
        picture.text(x, 200, title, INK, 14)
    picture.text(20, 330, "The return at each dose: hopper, 40 seeds", bold=True)
    returns = (1962, 2025, 2237, 2734, 3179)
    at = [(60 + 92 * k, 480 - 120 * (r - 1800) / 1400) for k, r in enumerate(returns)]
    picture.line(40, 485, 460, 485)
    for (x, y), (to_x, to_y) in pairwise(at):
        picture.line(x, y, to_x, to_y, ORANGE, 2)
    for (x, y), value, mark in zip(at, returns, ("0", "0.5", "1", "1.5", "2"), strict=True):
        picture.dot(x, y, ORANGE, 5)
        picture.text(x - 4, y - 11, f"{value:,}", INK, 14, "middle" if x < 400 else "end")
        picture.text(x, 505, mark, GREY, 14, "middle")
    picture.save()


def pairs() -> None:
    """Twelve simulated seeds, edited and unedited, and the interval of the mean difference with and without pairs."""
    picture = Picture("pairs.svg", "Episodes in pairs, and the interval of their mean difference", 420)
    rng = np.random.default_rng(3)
    n = 12
    base = rng.normal(2500, 400, n)
    edited = base - 180 + rng.normal(0, 90, n)
    least, most = edited.min(), base.max()
    picture.text(20, 26, "Twelve seeds: unedited (ring) and edited (dot)", bold=True)
    for k in range(n):
        x, start, end = 50 + 36 * k, *(185 - 130 * (v - least) / (most - least) for v in (base[k], edited[k]))
        picture.line(x, start, x, end, GREY, 1.5)
        ring = f'fill="#ffffff" stroke="{BLUE}" stroke-width="2"'
        picture.parts.append(f'<circle cx="{x}" cy="{start:.1f}" r="5" {ring}/>')
        picture.dot(x, end, ORANGE, 5)
        picture.text(x, 212, str(k), GREY, 12, "middle")
    picture.text(50, 232, "seed; higher is a larger return", GREY, 13)
    picture.text(20, 270, "The mean difference, and its 95 % interval", bold=True)
    difference = edited - base
    t = stats.t(n - 1).ppf(0.975)
    paired = t * difference.std(ddof=1) / n**0.5
    apart = stats.t(2 * n - 2).ppf(0.975) * ((base.var(ddof=1) + edited.var(ddof=1)) / n) ** 0.5

    def across(value: float) -> float:
        return 310 + 0.26 * value

    picture.line(across(0), 285, across(0), 388, GREY, 1.5, dashed=True)
    for tick in (-600, -400, -200, 0, 200, 400):
        picture.text(across(tick), 404, f"{tick:+d}" if tick else "0", GREY, 13, "middle")
    for y, words, half, colour in ((315, "in pairs", paired, ORANGE), (362, "not in pairs", apart, BLUE)):
        middle = difference.mean()
        picture.line(across(middle - half), y, across(middle + half), y, colour, 3)
        picture.dot(across(middle), y, colour, 5)
        picture.text(20, y + 5, words, colour, 14)
    picture.save()


def questions() -> None:
    """The questions in their order, each with the test that answers it."""
    picture = Picture("questions.svg", "Which question each test answers", 560)
    rows = [
        ("Are these the model's own matrices?", "certify", "each matrix, run against the model"),
        ("Does a direction resemble a label?", "scan", "cosine against a null, p and q"),
        ("Does changing it hurt?", "an edit", "paired episodes, an interval"),
        ("Would any change of that size hurt?", "its control", "a random change, same energy"),
        ("Does resembling predict hurting?", "the atlas", "rank correlation at equal size"),
        ("Does a dose of it control the outcome?", "steer", "19 random directions on each side"),
    ]  # fmt: skip
    for k, (question, test, how) in enumerate(rows):
        y = 12 + 90 * k
        picture.box(12, y, 456, 72, "#f4f7fa", BLUE, 6)
        picture.text(26, y + 28, question, INK, 17, bold=True)
        picture.text(26, y + 56, test, ORANGE, 16, bold=True)
        picture.text(132, y + 56, how, INK, 16)
        if k < len(rows) - 1:
            picture.line(240, y + 72, 240, y + 89, GREY, 2, arrow=True)
    picture.save()


if __name__ == "__main__":
    for draw in (null, sides, change, dose, pairs, questions):
        draw()
