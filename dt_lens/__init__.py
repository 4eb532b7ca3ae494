"""dt-lens: what the weights of a decision transformer do, measured.

>>> import dt_lens
>>> dt_lens.__version__.count(".")
2
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
