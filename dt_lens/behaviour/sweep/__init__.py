"""Sweeps: many edits beside their controls over the same seeds, in worker processes, in one SQLite file."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
