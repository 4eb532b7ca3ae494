"""The note's claims, each as a test that was written down before it was tried: ``docs/court.md``."""

from __future__ import annotations

from dt_lens.study.court.claims import CLAIMS, Claim, Found
from dt_lens.study.court.court import CourtResult, Ruling, court

__all__ = ["CLAIMS", "Claim", "CourtResult", "Found", "Ruling", "court"]
