"""How large a match chance alone would give, and what that makes of a table of matches.

Each null is a class with ``p_value(match)``, ``z(match)`` and ``assumes``, one sentence on what a direction without
meaning is taken to be:

- ``HaarMaximum``: points anywhere;
- ``CovarianceMaximum``: is a draw from the stream's own Gaussian;
- ``UntrainedMaximum``: is what a freshly initialised model of the same shape has;
- ``ShuffledMaximum``: is what the same weights have when their entries are put in random order.

``SubspaceOverlap`` is the null of whole subspaces.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
