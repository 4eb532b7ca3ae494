"""Pipelines over everything below: scan a model, choose edits, measure them, report."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
