"""The power of a scan: how likely it is to find a direction that matches a label, as a curve over its cosine.

``python -m dt_lens.study.power FOLDER`` writes ``power.csv``, ``power.html`` and the table ``power.md`` there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from dt_lens.arguments import atomic_write, local_path
from dt_lens.errors import DtLensError
from dt_lens.lens.embeddings import Embedding, EmbeddingRegistry
from dt_lens.lens.matrices import Structure
from dt_lens.statistics.nulls.haar import HaarMaximum
from dt_lens.statistics.outcomes import wilson
from dt_lens.svd.drawn_models import Drawn

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = [
    "COLUMNS",
    "critical_values",
    "needed_cosines",
    "planted_model",
    "power",
    "write_curves",
    "write_from",
    "write_power",
]

COLUMNS = ["d_model", "labels", "rows", "cosine", "found", "low", "high", "trials"]
Array = NDArray[np.float64]


def planted_model(
    cosine: float, *, d_model: int, labels: int = 1, layers: int = 1, directions: int | None = None, seed: int = 0
) -> Drawn:
    """A model of random ``W_in`` in ``layers`` blocks without LayerNorms, with one planted direction.

    The first direction of the first block has cosine ``cosine`` with ``label 0`` of the embedding ``planted``; the
    labels and all other directions are random. Singular values fall evenly from 2 to 1.

    Args:
        cosine: from 0 to 1.
        d_model: the stream's dimension, at least 2.
        labels: how many labels the embedding has.
        layers: how many matrices.
        directions: how many each matrix has; ``d_model`` by default.
        seed: of everything random.

    Raises:
        DtLensError: for a cosine beyond 1, or sizes that do not fit.
    """
    k = d_model if directions is None else directions
    if not 0 <= cosine <= 1:
        raise DtLensError(f"cosine is {cosine!r}; it must be from 0 to 1.")
    if d_model < 2 or not 1 <= k <= d_model or labels < 1 or layers < 1:
        raise DtLensError(
            f"d_model={d_model}, directions={k}, labels={labels} and layers={layers} do not fit; d_model must be at "
            "least 2, directions at most d_model, and each at least 1."
        )
    rng = np.random.default_rng([seed, d_model, labels])
    E = rng.standard_normal((labels, d_model))
    weights = {}
    for layer in range(layers):
        frame = rng.standard_normal((d_model, k))
        if layer == 0:
            label, across = _parts(E, 1, rng)
            frame[:, 0] = cosine * label + np.sqrt(1 - cosine**2) * across[0]
        read, other = np.linalg.qr(frame)[0], np.linalg.qr(rng.standard_normal((k, k)))[0]
        weights[f"blocks.{layer}.mlp.W_in"] = torch.from_numpy(read * np.linspace(2, 1, k) @ other)
    nowhere = (None,) * layers
    structure = Structure(layers, 1, d_model, (1.0,) * layers, nowhere, nowhere)
    registry = EmbeddingRegistry(d_model, f"planted {seed}")
    registry["planted"] = Embedding(torch.from_numpy(E), [f"label {i}" for i in range(labels)], kind="planted")
    return Drawn(weights, structure, registry)


def _parts(E: Array, trials: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """The first label as a unit vector ``[d]``, and random unit vectors orthogonal to it, ``[trials, d]``."""
    label = E[0] / np.linalg.norm(E[0])
    across = rng.standard_normal((trials, E.shape[1]))
    across -= np.outer(across @ label, label)
    return label, across / np.linalg.norm(across, axis=1, keepdims=True)


def critical_values(rows: int, trials: int, alpha: float = 0.05, seed: int = 0) -> Array:
    """The largest p at which one row is a discovery among ``rows - 1`` rows without effect, ``[trials]``.

    With the other p-values uniform, Benjamini and Hochberg's procedure rejects it if and only if it is at most
    ``alpha k / rows``, with the largest ``k`` for which ``k - 1`` of the others are.

    >>> critical_values(1, 2).tolist()
    [0.05, 0.05]
    """
    rng = np.random.default_rng([seed, rows])
    levels = alpha * np.arange(1, rows + 1) / rows
    found = np.empty(trials)
    for trial in range(trials):
        others = np.concatenate([[0.0], np.sort(rng.random(rows - 1))])
        found[trial] = levels[np.flatnonzero(others <= levels)[-1]]
    return found


def power(
    d_models: Sequence[int] = (32, 128, 768),
    labels: Sequence[int] = (1, 10, 100),
    rows: Sequence[int] = (100, 10_000),
    cosines: Sequence[float] | None = None,
    trials: int = 400,
    alpha: float = 0.05,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute the share of planted directions that a scan under the Haar null finds at ``q < alpha``, with their label.

    For each ``d_model``, number of random labels and number of rows in the table, ``trials`` directions of each cosine
    are planted among rows without effect. The same draws are used for all cosines.

    Returns:
        a DataFrame ``d_model labels rows cosine found low high trials``, with Wilson's 95 % interval.
    """
    at = np.linspace(0.01, 0.95, 95) if cosines is None else np.asarray(cosines, dtype=np.float64)
    table = []
    for d_model in d_models:
        for n in labels:
            rng = np.random.default_rng([seed, d_model, n])
            E = rng.standard_normal((n, d_model))
            E /= np.linalg.norm(E, axis=1, keepdims=True)
            null = HaarMaximum.of(E, seed=seed)
            label, across = _parts(E, trials, rng)
            near, far = E @ label, across @ E.T  # [n], [trials, n]
            absolute = np.abs(at[:, None, None] * near + np.sqrt(1 - at**2)[:, None, None] * far)
            p, right = null.p_value(absolute.max(2)), absolute.argmax(2) == 0
            for m in rows:
                limits = critical_values(m, trials, alpha, seed)
                for cosine, found in zip(at, ((p <= limits) & right).sum(1), strict=True):
                    share = (int(found) / trials, *wilson(int(found), trials))
                    table.append((d_model, n, m, float(cosine), *share, trials))
    return pd.DataFrame(table, columns=COLUMNS)


def needed_cosines(table: pd.DataFrame, shares: Sequence[float] = (0.5, 0.9)) -> pd.DataFrame:
    """The least cosine at which each share of planted directions is found, read off the curves of ``power``.

    Returns:
        a DataFrame ``d_model labels rows``, and a column per share, such as ``50%``; NaN if the curve stays below it.
    """
    found = []
    for where, curve in table.groupby(["d_model", "labels", "rows"], sort=True):
        cosine, share = curve["cosine"].to_numpy(), np.maximum.accumulate(curve["found"].to_numpy())
        found.append((*where, *(_crossing(cosine, share, wanted) for wanted in shares)))
    return pd.DataFrame(found, columns=["d_model", "labels", "rows", *(f"{share:.0%}" for share in shares)])


def _crossing(x: Array, y: Array, level: float) -> float:
    above = np.flatnonzero(y >= level)
    if not len(above):
        return float("nan")
    i = int(above[0])
    if i == 0 or y[i] == y[i - 1]:
        return float(x[i])
    return float(x[i - 1] + (level - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


def write_power(folder: str | Path, table: pd.DataFrame | None = None) -> list[Path]:
    """Write ``power.csv`` (the curves), ``power.html`` (the figure) and ``power.md`` (the cosines needed).

    Raises:
        DtLensError: if the folder cannot be written.
    """
    from dt_lens.study.power_figure import power_curves

    table = power() if table is None else table
    return write_curves(folder, "power", table, power_curves(table), _markdown(table))


def write_curves(
    folder: str | Path, name: str, table: pd.DataFrame, figure: go.Figure, lines: Iterable[str]
) -> list[Path]:
    """Write ``NAME.csv``, ``NAME.html`` and ``NAME.md``: curves, their figure, and lines of Markdown.

    Raises:
        DtLensError: if the folder cannot be written.
    """
    folder = local_path(folder, "folder")
    contents = {
        f"{name}.csv": table.to_csv(index=False, float_format="%.4g"),
        f"{name}.html": figure.to_html(include_plotlyjs=True),
        f"{name}.md": "".join(f"{line}\n" for line in lines),
    }
    for file, text in contents.items():
        with atomic_write(folder / file) as part:
            part.write_text(text, encoding="utf-8")
    return [folder / file for file in contents]


def _markdown(table: pd.DataFrame) -> Iterator[str]:
    yield "# What a scan can find"
    yield ""
    yield (
        "A direction of known cosine with one label is planted among rows without effect. From these cosines on, half "
        "(or nine in ten) of such directions are discoveries at q < 0.05 under the Haar null "
        f"({int(table['trials'].iloc[0])} plants a point, one in each table). Labels are random; Benjamini and "
        "Hochberg's procedure runs over all rows. The curves are steep because the cosine itself is tested: only the "
        "other rows and the other labels are left to chance. If many rows have an effect, smaller cosines are enough."
    )
    yield ""
    yield "| d_model | labels | rows | found by half from | found by 90 % from |"
    yield "|---:|---:|---:|---:|---:|"
    for row in needed_cosines(table).itertuples(index=False):
        d_model, n, rows, *needed = row
        cells = " | ".join("beyond the curve" if np.isnan(cosine) else f"{cosine:.2f}" for cosine in needed)
        yield f"| {d_model} | {n} | {rows:,} | {cells} |"
    yield ""
    yield (
        f"[The share found against the cosine](power.html), in tables of {int(table['rows'].max()):,} rows; the curves "
        "are in [power.csv](power.csv)."
    )
    yield ""
    yield "Made by `python -m dt_lens.study.power FOLDER`."


def main(words: Sequence[str] | None = None) -> None:
    """``python -m dt_lens.study.power FOLDER``."""
    write_from(
        words,
        write_power,
        "python -m dt_lens.study.power",
        "How likely a scan is to find a direction of known cosine: power.csv, power.html and power.md.",
    )


def write_from(
    words: Sequence[str] | None, write: Callable[[Path], list[Path]], program: str, description: str
) -> None:
    """The command line of a file that writes curves into the one folder it is given."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("folder", type=Path, help="where to write them")
    try:
        for file in write(parser.parse_args(words).folder):
            print(f"Written: {file}", file=sys.stderr)
    except DtLensError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
