"""The power of the test of clusters: how likely a direction that separates a factor's levels is to be found.

``python -m dt_lens.study.cluster_power FOLDER`` writes ``cluster_power.csv``, ``cluster_power.html`` and the table
``cluster_power.md`` there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from dt_lens.report.style import PALETTE, columns_of, finish
from dt_lens.statistics.nulls.smallest_p import SmallestP
from dt_lens.statistics.outcomes import wilson
from dt_lens.statistics.rank_effects import RankEffects
from dt_lens.study.power import critical_values, write_curves, write_from
from dt_lens.study.power_figure import interval_band
from dt_lens.svd.cluster_draws import effects_of, haar_draws
from dt_lens.svd.clustering import MARGIN

__all__ = [
    "COLUMNS",
    "cluster_power",
    "power_figure",
    "separating_direction",
    "states_of_factors",
    "write_cluster_power",
]

COLUMNS = ["d_model", "labels", "rows", "cosine", "effect", "found", "low", "high", "trials"]
PLANTED = "passenger"
Array = NDArray[np.float64]


def states_of_factors(d_model: int, labels: int = 500, seed: int = 0) -> tuple[Array, dict[str, NDArray[np.int64]]]:
    """Embeddings of states ``[labels, d_model]`` that consist of four factors, and each label's levels.

    A state is the sum of one random vector for each of its levels, five rows, five columns, five passengers and four
    destinations, and of noise of its own, all of the same size. Like states lie close to each other, as in a trained
    agent.
    """
    rng, number = np.random.default_rng([seed, d_model, labels]), np.arange(labels)
    levels = {
        "row": number * 5 // labels,
        "column": number // 20 % 5,
        PLANTED: number // 4 % 5,
        "destination": number % 4,
    }
    parts = [rng.standard_normal((5, d_model))[of] for of in levels.values()]
    return np.sum([*parts, rng.standard_normal((labels, d_model))], axis=0), levels


def separating_direction(labels: Array, levels: NDArray[np.int64]) -> Array:
    """The unit direction along which the levels' means lie furthest apart, ``[d]``."""
    means = np.stack([labels[levels == level].mean(0) for level in np.unique(levels)])
    return np.asarray(np.linalg.svd(means - means.mean(0))[2][0])


def cluster_power(
    d_models: Sequence[int] = (32, 96, 256),
    rows: Sequence[int] = (50, 500),
    cosines: Sequence[float] | None = None,
    trials: int = 200,
    labels: int = 500,
    alpha: float = 0.05,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute the share of planted directions that are found at ``q <= alpha`` under ``haar``, with their factor.

    A planted direction has ``cosine`` with the one that separates the levels of one of four factors best, and is random
    otherwise; one is planted among rows without effect. The same draws are used for all cosines.

    Returns:
        a DataFrame ``d_model labels rows cosine effect found low high trials``: ``effect`` is the mean epsilon squared
        of that factor, ``low`` and ``high`` are Wilson's 95 % interval of ``found``.
    """
    at = np.linspace(0.0, 1.0, 21) if cosines is None else np.asarray(cosines, dtype=np.float64)
    table = []
    for d_model in d_models:
        E, levels = states_of_factors(d_model, labels, seed)
        E /= np.linalg.norm(E, axis=1, keepdims=True)
        effects = RankEffects({name: of.tolist() for name, of in levels.items()})
        planted = effects.names.index(PLANTED)
        null = SmallestP.of(haar_draws(E, 1, False, effects, seed)(MARGIN * max(rows) * len(levels) - 1))
        u = separating_direction(E, levels[PLANTED])
        across = np.random.default_rng([seed, d_model, 1]).standard_normal((trials, d_model))
        across -= np.outer(across @ u, u)
        across /= np.linalg.norm(across, axis=1, keepdims=True)
        for cosine in at:
            v = cosine * u + np.sqrt(1 - cosine**2) * across
            observed = effects_of(v[:, None], E, effects)
            tested = null.test(observed)
            right = tested.each.argmin(1) == planted
            for m in rows:
                found = int(((tested.p_value <= critical_values(m, trials, alpha, seed)) & right).sum())
                share = (found / trials, *wilson(found, trials), trials)
                table.append((d_model, labels, m, float(cosine), float(observed[:, planted].mean()), *share))
    return pd.DataFrame(table, columns=COLUMNS)


def power_figure(table: pd.DataFrame, *, title: str = "Which clusters are found") -> go.Figure:
    """Draw the share of planted clusters that are found against their effect; a colour for each ``d_model``.

    Raises:
        DtLensError: for a missing column.
    """
    columns_of(table, COLUMNS, "The figure of power")
    figure, widest = go.Figure(), int(table["rows"].max())
    for i, (d_model, some) in enumerate(table.groupby("d_model")):
        for rows, curve in some.groupby("rows"):
            name, colour = f"d_model {d_model}, {rows:,} rows", PALETTE[i % len(PALETTE)]
            figure.add_trace(interval_band(curve, "effect", colour))
            line = {"color": colour, "dash": "solid" if rows == widest else "dot", "width": 2}
            figure.add_trace(go.Scatter(x=curve["effect"], y=curve["found"], mode="lines", line=line, name=name))
    figure.update_xaxes(title="effect: share of the ranks' variance between the levels (ε²)", range=[0, 1])
    figure.update_yaxes(title="share found at q <= 0.05", range=[-0.02, 1.02], tickformat=".0%")
    figure.update_layout(legend={"x": 1.02, "y": 1, "xanchor": "left"})
    return finish(figure, title, "one planted direction in each table · band: 95 % interval", height=440)


def write_cluster_power(folder: str | Path, table: pd.DataFrame | None = None) -> list[Path]:
    """Write ``cluster_power.csv`` (the curves), ``.html`` (the figure) and ``.md`` (the effects needed).

    Raises:
        DtLensError: if the folder cannot be written.
    """
    table = cluster_power() if table is None else table
    return write_curves(folder, "cluster_power", table, power_figure(table), _markdown(table))


def _markdown(table: pd.DataFrame) -> Iterator[str]:
    yield "| d_model | rows | effect of a random direction | found by half from | found by 90 % from |"
    yield "|---:|---:|---:|---:|---:|"
    for (d_model, rows), curve in table.groupby(["d_model", "rows"]):
        share, effect = np.maximum.accumulate(curve["found"].to_numpy()), curve["effect"].to_numpy()
        cells = [
            f"{np.interp(wanted, share, effect):.2f}" if share[-1] >= wanted else "not found" for wanted in (0.5, 0.9)
        ]
        yield f"| {d_model} | {rows:,} | {effect[0]:.2f} | {' | '.join(cells)} |"


def main(words: Sequence[str] | None = None) -> None:
    """``python -m dt_lens.study.cluster_power FOLDER``."""
    write_from(
        words,
        write_cluster_power,
        "python -m dt_lens.study.cluster_power",
        "How likely clusters are to be found: cluster_power.csv, cluster_power.html and cluster_power.md.",
    )


if __name__ == "__main__":
    main()
