"""The explorer: a local web app in which a model's directions are looked at, edited and watched."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
