"""Statistics of arrays: null distributions, multiple tests, outcomes, rank correlation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
