"""The atlas of a sweep in the explorer: its figure and its table are those of the atlas."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

import dt_lens
from dt_lens.behaviour.sweep import Sweep
from dt_lens.explorer.explored import Explored
from dt_lens.explorer.parts import short
from dt_lens.explorer.sweep import atlas_view

MATRIX = "blocks.3.mlp.W_out"


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> Explored:
    model = dt_lens.load("tiny-gpt2", check=False)
    sweep = Sweep(model, tmp_path_factory.mktemp("sweep"), matrices=[MATRIX], sv="0-4", edits="zero", windows=4)
    sweep.run()
    return Explored.of("tiny-gpt2", model, matrices=[MATRIX], sweep=sweep.results)


def parts(view: Any) -> list[Any]:
    """All components of a view, from the top."""
    if isinstance(view, list | tuple):
        return [one for child in view for one in parts(child)]
    below = getattr(view, "children", None)
    return [view, *([] if below is None else parts(below))]


def unpacked(values: Any) -> list[float]:
    """The numbers of a trace, which a copy of a figure holds as bytes."""
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist()  # type: ignore[no-any-return]
    return list(values)


def texts(row: Any) -> list[str]:
    """The words of the cells of a row."""
    return [str(cell.children) for cell in row.children]


def test_its_numbers_are_those_of_the_atlas(explored: Explored) -> None:
    shown, atlas = parts(atlas_view(explored, False)), explored.atlas()
    (body,) = [one for one in shown if type(one).__name__ == "Tbody"]
    assert len(body.children) == len(atlas.shares)
    for row, (_, kept) in zip(body.children, atlas.shares.iterrows(), strict=True):
        what, *numbers = texts(row)
        assert what == short(str(kept["what"]))
        for cell, name in zip(numbers, ["directions", "hurts", "large", "worst_damage"], strict=True):
            assert float(cell.replace("−", "-").replace(",", "")) == pytest.approx(kept[name], abs=6e-4), name
    (graph,) = [one for one in shown if getattr(one, "id", "") == "atlas-spectrum"]
    drawn = [
        (int(sv), float(y))
        for trace in graph.figure.data
        if "control" not in trace.name
        for sv, y in zip(unpacked(trace.x), unpacked(trace.y), strict=True)
    ]
    table = atlas.directions
    assert sorted(drawn) == sorted(zip(table["sv"], table[f"mean_{atlas.terms.outcome}"], strict=True))


@pytest.mark.parametrize("colours", [False, True])
def test_the_atlas_is_drawn(explored: Explored, colours: bool) -> None:
    shown = parts(atlas_view(explored, colours))
    assert len([one for one in shown if getattr(one, "id", "") == "atlas-spectrum"]) == 1


def test_two_explorers_do_not_share_an_atlas(explored: Explored) -> None:
    other = Explored.of("again", explored.model, matrices=[MATRIX], sweep=explored.sweep)
    assert other.atlas() is not explored.atlas()
