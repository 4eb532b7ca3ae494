"""Figures for a notebook: every option is written down, does what it says, and is refused where it is none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

import dt_lens
from dt_lens.errors import DtLensError
from dt_lens.svd import plots
from dt_lens.svd.two_models.comparison import ModelChanges

FUNCTIONS = {name: getattr(plots, name) for name in plots.__all__} | {"ModelChanges.plot": ModelChanges.plot}


@pytest.fixture(scope="module")
def svd(make_dt: Callable[..., Any]) -> Any:
    return dt_lens.WeightSVD(make_dt(0, n_layers=1))


@pytest.fixture(scope="module")
def table(svd: Any) -> pd.DataFrame:
    return svd.scan(["*.W_in", "*.W_out"])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_option_is_documented(name: str) -> None:
    function = FUNCTIONS[name]
    given = inspect.signature(function).parameters
    assert not [p for p in given.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    text = inspect.getdoc(function) or ""
    arguments = text[text.index("Args:") : text.index("Returns:")]
    said = {
        word.strip() for line in arguments.splitlines() if ":" in line for word in line.partition(":")[0].split(",")
    }
    assert set(given) - {"self"} <= said
    assert {"title", "width", "height"} <= set(given) and "a plotly ``Figure``" in text


def test_title_and_size_are_those_asked_for(svd: Any, table: pd.DataFrame) -> None:
    options: dict[str, Any] = {"title": "Mine <b>", "width": 640, "height": 333}
    made = [
        dt_lens.plot_spectrum(svd, **options),
        dt_lens.plot_heatmap(svd, "blocks.0.mlp.W_in", "state_in", **options),
        dt_lens.plot_overview(table, **options),
        dt_lens.plot_sigma_against_cosine(table, **options),
    ]
    for figure in made:
        assert isinstance(figure, go.Figure)
        assert figure.layout.title.text == "Mine &lt;b&gt;"
        assert (figure.layout.width, figure.layout.height) == (640, 333)
    assert dt_lens.plot_overview(table).layout.width is None, "as wide as the page"


def test_the_heatmap_shows_the_labels_that_match_best(svd: Any) -> None:
    cosines = svd.cosines("blocks.0.mlp.W_in", "state_in").head(3)
    best = cosines.abs().max().nlargest(2).index
    figure = dt_lens.plot_heatmap(svd, "blocks.0.mlp.W_in", "state_in", k=3, n=2)
    shown = [label for label in cosines.columns if label in best]  # in the embedding's order
    np.testing.assert_allclose(figure.data[0].z, cosines[shown], atol=1e-12)
    assert list(figure.layout.xaxis.ticktext) == shown
    assert dt_lens.plot_heatmap(svd, "blocks.0.mlp.W_in", "state_in", k=3).data[0].z.shape == cosines.shape


def test_the_spectrum_shows_the_first_values(svd: Any) -> None:
    sigma = svd["blocks.0.mlp.W_in"].sigma
    (line,) = [
        trace
        for trace in dt_lens.plot_spectrum(svd, "blocks.0.mlp.W_in", k=2, scale="linear").data
        if trace.mode == "lines"
    ]
    torch.testing.assert_close(torch.tensor(line.y, dtype=sigma.dtype), sigma[:2])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"title": 3}, "title is 3; it must be text"),
        ({"width": 3}, "width is 3; it must be a whole number of at least 10"),
        ({"height": 0.5}, "height is 0.5"),
        ({"alpha": 0}, "alpha is 0; it must be a number above 0"),
        ({"value": "cosin"}, "value is 'cosin'; it must be 'cosine' or 'z'. Did you mean 'cosine'?"),
    ],
)
def test_an_option_that_is_none_is_one_sentence(given: dict[str, Any], said: str, table: pd.DataFrame) -> None:
    with pytest.raises(DtLensError) as error:
        dt_lens.plot_overview(table, **given)
    assert said in str(error.value)


def test_q_values_of_every_label_do_not_fit_some_labels(svd: Any) -> None:
    q = pd.DataFrame(0.5, index=range(3), columns=svd.registry["state_in"].labels)
    with pytest.raises(DtLensError, match="leave out n"):
        dt_lens.plot_heatmap(svd, "blocks.0.mlp.W_in", "state_in", k=3, n=2, q_values=q)
    one = dt_lens.plot_heatmap(svd, "blocks.0.mlp.W_in", "state_in", k=3, n=2, q_values=q.iloc[:, :1], alpha=0.6)
    assert (np.asarray(one.data[0].text) == "●").sum() == 3
