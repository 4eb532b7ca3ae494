"""The page kit: style, parts of figures, tables, and the self-contained HTML page."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
