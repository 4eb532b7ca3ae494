"""dt-lens: what the weights of a decision transformer do."""

from dt_lens.errors import DtLensError
from dt_lens.version import __version__

__all__ = ["DtLensError", "__version__"]
