"""The hooked decision transformer, into which the checkpoints of every code base load."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
