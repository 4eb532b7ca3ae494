"""dt-lens: what the weights of a decision transformer do, measured.

>>> import dt_lens
>>> dt_lens.__version__.count(".")
2
"""

import sys

if sys.argv[0].rpartition("/")[2].startswith("dt-lens") or "-m dt_lens" in " ".join(sys.orig_argv):

    def _stopped(kind, error, trace):  # type: ignore[no-untyped-def]
        """Answer Ctrl-C with one sentence where the command line cannot yet: while it is being imported."""
        if issubclass(kind, KeyboardInterrupt):
            import os

            print("\ndt-lens: Stopped before the command began; give it again.", file=sys.stderr, flush=True)
            os._exit(130)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = _stopped

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
