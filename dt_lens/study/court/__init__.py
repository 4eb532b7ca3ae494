"""Claims about where actions come from, each with a test that was written down first: ``docs/court.md``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
