from . import engines as engines
from .results import SweepResults as SweepResults
from .settings import SweepSettings as SweepSettings
from .sweep import Sweep as Sweep
