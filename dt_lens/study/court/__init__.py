"""Eight claims about singular directions, each with a pre-registered test: ``docs/court_registered.md``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
