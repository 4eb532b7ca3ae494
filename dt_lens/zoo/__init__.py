"""The models that come with the package, each a folder in Hugging Face's format with its card."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
