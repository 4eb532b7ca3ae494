"""Null distributions of the best match of a direction with a set of labels.

Each null is a class with ``p_value(match)``, ``z(match)`` and ``assumes``, one sentence on what a meaningless direction
is taken to be:

- ``HaarMaximum``: points anywhere;
- ``CovarianceMaximum``: is a draw from a Gaussian with the stream's covariance;
- ``SpectrumMaximum``: is as long on every principal axis of the stream, with random signs;
- ``BandMaximum``: is as long on every band of such axes, and points anywhere inside each band;
- ``UntrainedMaximum``: comes from a freshly initialised model of the same shape;
- ``ShuffledMaximum``: comes from the same weights with their entries in random order.

``SubspaceOverlap`` is the null of whole subspaces.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
