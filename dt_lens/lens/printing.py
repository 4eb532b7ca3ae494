"""What is printed of an object, and shown of it in a notebook: a title and a few named lines, everything escaped."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from torch import Tensor

__all__ = [
    "Printed",
    "Rows",
    "Weights",
    "frame_html",
    "grid_html",
    "html_table",
    "listed",
    "size_of",
    "text_table",
    "weights_html",
    "weights_text",
]

Rows = list[tuple[str, str]]
LEFT = "style='text-align:left'"
TITLE = "style='text-align:left;white-space:nowrap'"  # a caption is as wide as its table, which may be narrow


def text_table(title: str, rows: Rows) -> str:
    """A title, then one line of name and value per row, the values aligned.

    >>> print(text_table("Two things", [("a", "1"), ("long", "2")]))
    Two things
      a     1
      long  2
    """
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def html_table(title: str, rows: Rows) -> str:
    """An HTML table of name and value, with the title as caption, for notebooks."""
    body = "".join(f"<tr><th {LEFT}>{escape(name)}</th><td {LEFT}>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table><caption {TITLE}>{escape(title)}</caption>{body}</table>"


def grid_html(columns: Iterable[str], rows: Iterable[Iterable[object]], title: str = "") -> str:
    """An HTML table with named columns, for notebooks.

    >>> grid_html(["a"], [["<b>"]]).partition("<tbody>")[2]
    "<tr><td style='text-align:left'>&lt;b&gt;</td></tr></tbody></table>"
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td {LEFT}>{escape(str(value))}</td>" for value in row) + "</tr>" for row in rows)
    caption = f"<caption {TITLE}>{escape(title)}</caption>" if title else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def frame_html(frame: Any, columns: Sequence[str] | None = None, most: int = 10) -> str:
    """The first rows of a DataFrame as pandas writes them, with those ``columns`` that it has."""
    shown = frame if columns is None else frame[[name for name in columns if name in frame]]
    rest = len(frame) - most
    more = f"<p>and {rest} more row{'s' * (rest != 1)}</p>" if rest > 0 else ""
    return str(shown.head(most).to_html(index=False, border=0, float_format=lambda x: f"{x:.3g}")) + more


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names in a line, cut after ``most``.

    >>> listed(["a", "b", "c"], 2), listed([])
    ('a, b, ... (3)', 'none')
    """
    names = list(names)
    shown = ", ".join(names[:most]) or "none"
    return f"{shown}, ... ({len(names)})" if len(names) > most else shown


class Printed:
    """An object that is printed as a title with a few named lines, and as a table in a notebook."""

    def _shown(self) -> tuple[str, Rows]:
        """The title and the lines."""
        raise NotImplementedError

    def _more_html(self) -> str:
        """What a notebook shows below the lines, as HTML in which everything is escaped."""
        return ""

    def __repr__(self) -> str:
        return text_table(*self._shown())

    def _repr_html_(self) -> str:
        return html_table(*self._shown()) + self._more_html()


class Weights(dict[str, Tensor]):
    """Live weights by canonical name: a dictionary that prints their names and shapes and not their numbers."""

    def __repr__(self) -> str:
        return weights_text("Weights", self)

    def _repr_html_(self) -> str:
        return weights_html("Weights", self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # As a class that torch.load knows with weights_only=True, so that saved weights can be loaded anywhere.
        return OrderedDict, (), None, None, iter(self.items())


def size_of(weights: Mapping[str, Tensor]) -> str:
    """How many tensors and numbers there are, of which type and where; memory that two names share counts once."""
    own = {(weight.data_ptr(), weight.numel()): weight for weight in weights.values()}  # tied ones are transposed
    kinds = dict.fromkeys(f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}" for weight in own.values())
    return f"{len(weights)} tensors, {sum(weight.numel() for weight in own.values()):,} numbers, {', '.join(kinds)}"


def weights_text(title: str, weights: Mapping[str, Tensor]) -> str:
    """Names and shapes of weights, those of the blocks once."""
    # Matrices first: biases and norms are the many that few look for.
    ordered = sorted(weights, key=lambda name: not name.rpartition(".")[2].startswith("W"))
    inside, outside = _places(ordered, lambda name: f"{name} {list(weights[name].shape)}")
    rows = [("in each block" if not name else f"in {name}", listed(found)) for name, found in inside]
    rows += [("besides", listed(outside, 6))] if outside else []
    example = next((name for name in ordered if name.endswith(".mlp.W_in")), next(iter(ordered), ""))
    return text_table(f"{title}: {size_of(weights)}", [*rows, ("one of them", f'weights["{example}"]')])


def weights_html(title: str, weights: Mapping[str, Tensor]) -> str:
    """A table of names, shapes and types, with one line for the same weight of several blocks."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for name, weight in weights.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        place = f"blocks.{{}}.{name[block.end() :]}" if block else name
        key = place, str(list(weight.shape)), str(weight.dtype).removeprefix("torch.")
        rows.setdefault(key, []).append(int(block[1]) if block else -1)
    made = [(place.replace("{}", _span(layers), 1), *more) for (place, *more), layers in rows.items()]
    return grid_html(["name", "shape", "type"], made, f"{title}: {size_of(weights)}")


def _places(names: Iterable[str], write: Callable[[str], str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """What is in every block, then what is in some; and what is outside of blocks."""
    outside: list[str] = []
    blocks: dict[str, list[int]] = {}
    for name in names:
        block = re.match(r"blocks\.(\d+)\.", name)
        if block:
            blocks.setdefault(write(name)[block.end() :], []).append(int(block[1]))
        else:
            outside.append(write(name))
    layers = {layer for found in blocks.values() for layer in found}
    grouped: dict[str, list[str]] = {}
    for said, found in blocks.items():
        grouped.setdefault("" if set(found) == layers else f"blocks.{_span(found)}", []).append(said)
    return list(grouped.items()), outside


def _span(layers: Sequence[int]) -> str:
    """The numbers of blocks in a line.

    >>> _span([0, 1, 2]), _span([1]), _span([0, 2])
    ('0-2', '1', '0,2')
    """

    def runs() -> Iterator[str]:
        start = last = layers[0]
        for layer in [*layers[1:], -1]:
            if layer != last + 1:
                yield str(start) if start == last else f"{start}-{last}"
                start = layer
            last = layer

    return ",".join(runs())
