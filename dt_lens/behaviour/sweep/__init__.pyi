from . import engines as engines
from .results import SweepResults as SweepResults
from .sweep import Sweep as Sweep
