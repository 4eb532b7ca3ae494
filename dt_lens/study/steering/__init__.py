"""Steering: whether a dose of one direction moves what a task measures, and at what cost."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
