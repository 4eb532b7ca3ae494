"""Whole studies of a model: scan, choose edits, measure them beside controls, report."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
