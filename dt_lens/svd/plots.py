"""Figures of a ``WeightSVD`` and its scans, for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from dt_lens.arguments import require_offers, whole_number
from dt_lens.errors import DtLensError
from dt_lens.lens.matrices import SideName, select_matrices
from dt_lens.report import heatmaps, spectra

if TYPE_CHECKING:
    import pandas as pd

    from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["plot_heatmap", "plot_overview", "plot_sigma_against_cosine", "plot_spectrum"]


def plot_spectrum(svd: WeightSVD, matrices: Sequence[str] | str | None = None, **options: Any) -> go.Figure:
    """The singular spectra of the matrices that match the patterns, cut at the rank; see ``spectra.spectrum``."""
    _require_svd(svd)
    names = [matrix.name for matrix in select_matrices(svd.model, matrices)]
    return spectra.spectrum({name: svd[name].sigma.cpu().numpy() for name in names}, **options)


def plot_heatmap(
    svd: WeightSVD, matrix: str, embedding: str, side: SideName | None = None, directions: int = 32, **options: Any
) -> go.Figure:
    """The cosines of a matrix's first ``directions`` with an embedding's labels; see ``heatmaps.scan_heatmap``."""
    _require_svd(svd)
    cosines = svd.cosines(matrix, embedding, side).head(whole_number(directions, "directions", 1))
    sigma = svd[matrix].sigma[: len(cosines)].cpu().numpy()
    trained = svd.registry[embedding].trained
    return heatmaps.scan_heatmap(cosines, sigma=sigma, matrix=matrix, embedding=embedding, trained=trained, **options)


def plot_overview(table: pd.DataFrame, **options: Any) -> go.Figure:
    """The best match of every matrix with every embedding, of a ``scan()`` table; see ``heatmaps.scan_overview``."""
    _require_scan(table)
    return heatmaps.scan_overview(table, **options)


def plot_sigma_against_cosine(table: pd.DataFrame, **options: Any) -> go.Figure:
    """Each direction's sigma against its best cosine, of a ``scan()`` table; see ``spectra.sigma_against_cosine``."""
    _require_scan(table)
    return spectra.sigma_against_cosine(table, **options)


def _require_svd(svd: Any) -> None:
    require_offers(svd, "svd", "a WeightSVD", "cosines", "registry", "scan")


def _require_scan(table: Any) -> None:
    require_offers(table, "table", "the table of a scan", "columns", "groupby")
    needed = ("matrix", "sv", "sigma", "embedding", "label", "cosine", "q_value")
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise DtLensError(f"table has no column {missing[0]!r}; give the table of a scan.")
