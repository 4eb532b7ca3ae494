"""The atlas of a model: what the removal of every direction costs, and what predicts it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
