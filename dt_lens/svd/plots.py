"""Figures of a ``WeightSVD`` and its scans, for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import plotly.graph_objects as go

from dt_lens.arguments import is_finite_number, require_offers, whole_number
from dt_lens.errors import DtLensError, as_written
from dt_lens.lens.matrices import SideName, select_matrices
from dt_lens.report import heatmaps, spectra
from dt_lens.report.options import require_level, require_word, sized, titled

if TYPE_CHECKING:
    import pandas as pd

    from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["plot_heatmap", "plot_overview", "plot_sigma_against_cosine", "plot_spectrum"]


def plot_spectrum(
    svd: WeightSVD,
    matrices: Sequence[str] | str | None = None,
    *,
    k: int | None = None,
    scale: Literal["relative", "log", "linear"] = "relative",
    tolerance: float = 1e-6,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
) -> go.Figure:
    """The singular values of several matrices, largest first, one line for each, cut at the numerical rank.

    Colours distinguish kinds of matrices (``W_in``, ``OV``, ...), dashes distinguish layers. A click on a kind in the
    legend hides all its lines.

    Args:
        svd: the decompositions.
        matrices: shell patterns such as ``"*.W_in"``; every catalogued matrix when ``None``.
        k: the first ``k`` singular values of each matrix; all of them when ``None``.
        scale: ``"relative"`` divides by the largest value and draws logarithmically; ``"log"`` and ``"linear"`` draw
            the values themselves.
        tolerance: values at or below ``tolerance`` times the matrix's largest are not drawn.
        title: of the figure, in place of its own.
        width, height: of the figure in pixels, in place of its own; a figure without a width is as wide as the page.

    Returns:
        a plotly ``Figure``.

    Raises:
        DtLensError: for something that is not a ``WeightSVD``, a pattern that matches no matrix, or an option out
            of range.
    """
    _require_svd(svd)
    require_word(scale, "scale", ("relative", "log", "linear"))
    if not (is_finite_number(tolerance) and 0 <= tolerance < 1):
        raise DtLensError(f"tolerance is {as_written(tolerance)}; it must be a number from 0 to below 1, such as 1e-6.")
    count = None if k is None else whole_number(k, "k", 1)
    title = titled(title, "Singular spectra")
    names = [matrix.name for matrix in select_matrices(svd.model, matrices)]
    sigmas = {name: svd[name].sigma[:count].cpu().numpy() for name in names}
    return sized(spectra.spectrum(sigmas, scale=scale, tolerance=tolerance, title=title), width, height)


def plot_heatmap(
    svd: WeightSVD,
    matrix: str,
    embedding: str,
    side: SideName | None = None,
    k: int = 32,
    *,
    n: int | None = None,
    q_values: pd.DataFrame | None = None,
    alpha: float = 0.05,
    limit: float | None = None,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
) -> go.Figure:
    """The cosines of a matrix's first ``k`` directions with an embedding's labels.

    Args:
        svd: the decompositions.
        matrix: its name.
        embedding: its name.
        side: by default the one the embedding is compared with in ``scan``: a reading side for input embeddings.
        k: how many directions at most.
        n: only the ``n`` labels of largest |cosine| with any of these directions, in the embedding's order; all of
            them when ``None``, which suits tens of labels and not a vocabulary.
        q_values: a table with a row for each direction that is shown, and a column for each label or one column, for
            the best match of each direction. A dot marks a cell with a value below ``alpha``; with one column, the
            largest |cosine| of that direction.
        alpha: the false discovery rate at which a cell is marked.
        limit: the colours range from ``-limit`` to ``limit``; by default to the largest |cosine|, at least 0.1. Give
            the same limit to figures that will be compared.
        title: of the figure, in place of its own.
        width, height: of the figure in pixels, in place of its own; a figure without a width is as wide as the page.

    Returns:
        a plotly ``Figure``; that of an untrained head is grey, since what it shows is chance.

    Raises:
        DtLensError: as ``WeightSVD.cosines`` does, for q values that do not fit, or for an option out of range.
    """
    _require_svd(svd)
    require_level(alpha)
    if limit is not None and not (is_finite_number(limit) and limit > 0):
        raise DtLensError(f"limit is {as_written(limit)}; it must be a number above 0, or None.")
    if q_values is not None:
        require_offers(q_values, "q_values", "a DataFrame", "to_numpy", "columns")
    labels = None if n is None else whole_number(n, "n", 1)
    title = titled(title, "")
    cosines = svd.cosines(matrix, embedding, side, whole_number(k, "k", 1))
    if labels is not None and labels < cosines.shape[1]:
        if q_values is not None and q_values.shape == cosines.shape:
            raise DtLensError("q_values has a column for each label; give one for each direction, or leave out n.")
        largest = cosines.abs().max().to_numpy()
        cosines = cosines.iloc[:, sorted((-largest).argsort(kind="stable")[:labels])]
    figure = heatmaps.scan_heatmap(
        cosines,
        q_values=q_values,
        sigma=svd[matrix].sigma[: len(cosines)].cpu().numpy(),
        matrix=matrix,
        embedding=embedding,
        alpha=alpha,
        limit=limit,
        trained=svd.registry[embedding].trained,
        title=title,
    )
    return sized(figure, width, height)


def plot_overview(
    table: pd.DataFrame,
    *,
    value: Literal["cosine", "z"] = "cosine",
    alpha: float = 0.05,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
) -> go.Figure:
    """The best match of every matrix with every embedding.

    Args:
        table: what ``scan`` returned, or some of its rows. A matrix that it has on two sides gets a row for each.
        value: colour and number: the largest |cosine|, or the largest ``z``.
        alpha: the false discovery rate at which a cell has a star.
        title: of the figure, in place of its own.
        width, height: of the figure in pixels, in place of its own; a figure without a width is as wide as the page.

    Returns:
        a plotly ``Figure``; columns of untrained heads are grey.

    Raises:
        DtLensError: for something that is not the table of a scan, or an option out of range.
    """
    require_word(value, "value", ("cosine", "z"))
    _require_scan(table, *(["z"] if value == "z" else []))
    require_level(alpha)
    title = titled(title, "Best match of every matrix with every embedding")
    return sized(heatmaps.scan_overview(table, value=value, alpha=alpha, title=title), width, height)


def plot_sigma_against_cosine(
    table: pd.DataFrame,
    *,
    colour: Literal["embedding", "kind"] = "embedding",
    alpha: float = 0.05,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
) -> go.Figure:
    """Each direction's sigma against its best |cosine| with any label.

    Args:
        table: what ``scan`` returned, or some of its rows.
        colour: by the embedding of the best match, or by the kind of matrix.
        alpha: the false discovery rate below which a direction is filled; others are open.
        title: of the figure, in place of its own.
        width, height: of the figure in pixels, in place of its own; a figure without a width is as wide as the page.

    Returns:
        a plotly ``Figure``; directions whose best match is with an untrained head are grey.

    Raises:
        DtLensError: for something that is not the table of a scan, or an option out of range.
    """
    _require_scan(table)
    require_word(colour, "colour", ("embedding", "kind"))
    require_level(alpha)
    title = titled(title, "Do strong directions match embeddings?")
    return sized(spectra.sigma_against_cosine(table, colour=colour, alpha=alpha, title=title), width, height)


def _require_svd(svd: Any) -> None:
    require_offers(svd, "svd", "a WeightSVD", "cosines", "registry", "scan")


def _require_scan(table: Any, *more: str) -> None:
    require_offers(table, "table", "the table of a scan", "columns", "groupby")
    needed = ("matrix", "sv", "sigma", "embedding", "label", "cosine", "q_value", *more)
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise DtLensError(f"table has no column {missing[0]!r}; give the table of a scan.")
    import pandas as pd

    for name in ("sv", "sigma", "cosine", "q_value", *more):
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise DtLensError(f"table's column {name!r} holds no numbers; give the table of a scan.")
