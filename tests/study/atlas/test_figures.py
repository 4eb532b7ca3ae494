"""The atlas's figures: panels and ticks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dt_lens.behaviour.agents.evaluation import terms_of_episodes
from dt_lens.study.atlas.figures import along_the_spectrum, damage_against

TERMS = terms_of_episodes("E-v0", 1.0, 10)


def directions(heads: int, damage: np.ndarray) -> pd.DataFrame:
    """Two blocks with a W_in each and ``heads`` OV circuits, of as many directions each."""
    places = [
        (f"blocks.{layer}.{name}", kind, layer, head)
        for layer in range(2)
        for name, kind, head in [("mlp.W_in", "W_in", None), *((f"attn.OV.{h}", "OV", h) for h in range(heads))]
    ]
    n = len(damage)
    table = pd.DataFrame([(*place, sv) for place in places for sv in range(n)])
    table.columns = pd.Index(["matrix", "kind", "layer", "head", "sv"])
    columns = {"damage": np.tile(damage, len(places)), "q_value": 1.0, "sigma": 1.0, "energy": 1.0}
    table = table.astype({"head": "Int64"}).assign(**columns)
    return table.assign(mean_return=1000 - table["damage"], cosine=np.linspace(0, 1, len(table)))


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_every_matrix_has_a_panel_of_its_own(heads: int) -> None:
    figure = along_the_spectrum(directions(heads, np.arange(4.0)), 1000.0, TERMS)
    drawn = [(trace.xaxis, trace.yaxis) for trace in figure.data if len(trace.x)]
    assert len(set(drawn)) == len(drawn) == 2 * (1 + heads)
    titles = {annotation.text for annotation in figure.layout.annotations}
    named = {"<b>OV</b>"} if heads == 1 else {f"<b>OV.{head}</b>" for head in range(heads)}
    assert named | {"<b>W_in</b>", "block 0", "block 1"} <= titles


@pytest.mark.parametrize(
    ("low", "high"), [(30, 500), (40, 60), (-20, 90), (-500, -30), (310, 350), (0.001, 0.004), (-3, 900), (1, 1e6)]
)
def test_an_axis_has_three_ticks_in_view(low: float, high: float) -> None:
    values = np.linspace(low, high, 30)
    figure = damage_against(directions(1, values), [("W_in", "cosine")], TERMS)
    drawn = np.concatenate(
        [np.asarray(t.y, float) for t in figure.data if t.y is not None and t.customdata is not None]
    )
    marks = np.array(figure.layout.yaxis.tickvals)
    seen = (drawn.min() - 1e-9 <= marks) & (marks <= drawn.max() + 1e-9)
    assert seen.sum() >= 3
    # A tick's text is its value on the axis of the points.
    numbers = [float(text.replace("−", "-").replace(",", "")) for text in figure.layout.yaxis.ticktext]
    scale = values.max() / np.sinh(drawn.max()) if values.max() > 0 else values.min() / np.sinh(drawn.min())
    assert marks == pytest.approx(np.arcsinh(np.array(numbers) / scale))
