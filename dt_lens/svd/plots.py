"""Figures of a ``WeightSVD`` and its scans, for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from dt_lens.lens.matrices import SideName, select_matrices
from dt_lens.report import heatmaps, spectra

if TYPE_CHECKING:
    import pandas as pd

    from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["plot_heatmap", "plot_overview", "plot_sigma_against_cosine", "plot_spectrum"]


def plot_spectrum(svd: WeightSVD, matrices: Sequence[str] | str | None = None, **options: Any) -> go.Figure:
    """The singular spectra of the matrices that match the patterns, cut at the rank; see ``spectra.spectrum``."""
    names = [matrix.name for matrix in select_matrices(svd.model, matrices)]
    return spectra.spectrum({name: svd[name].sigma.cpu().numpy() for name in names}, **options)


def plot_heatmap(
    svd: WeightSVD, matrix: str, embedding: str, side: SideName | None = None, directions: int = 32, **options: Any
) -> go.Figure:
    """The cosines of a matrix's first ``directions`` with an embedding's labels; see ``heatmaps.scan_heatmap``."""
    cosines = svd.cosines(matrix, embedding, side).head(directions)
    sigma = svd[matrix].sigma[: len(cosines)].cpu().numpy()
    trained = svd.registry[embedding].trained
    return heatmaps.scan_heatmap(cosines, sigma=sigma, matrix=matrix, embedding=embedding, trained=trained, **options)


def plot_overview(table: pd.DataFrame, **options: Any) -> go.Figure:
    """The best match of every matrix with every embedding, of a ``scan()`` table; see ``heatmaps.scan_overview``."""
    return heatmaps.scan_overview(table, **options)


def plot_sigma_against_cosine(table: pd.DataFrame, **options: Any) -> go.Figure:
    """Each direction's sigma against its best cosine, of a ``scan()`` table; see ``spectra.sigma_against_cosine``."""
    return spectra.sigma_against_cosine(table, **options)
