"""A wrapped model: its matrices and embeddings, how it is loaded, and how it is certified."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
