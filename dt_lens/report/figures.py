"""Every figure of the report, in one place: plotly figures as pure functions of tables and arrays."""

from dt_lens.report.heatmaps import scan_heatmap, scan_overview
from dt_lens.study.figures import damage_against_cosine, effects, survival
from dt_lens.report.spectra import sigma_against_cosine, spectrum
from dt_lens.report.style import dark, light

__all__ = [
    "damage_against_cosine",
    "dark",
    "effects",
    "light",
    "scan_heatmap",
    "scan_overview",
    "sigma_against_cosine",
    "spectrum",
    "survival",
]
