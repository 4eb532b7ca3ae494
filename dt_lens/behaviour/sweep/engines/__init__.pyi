from .cluster import RayEngine as RayEngine
from .engine import Engine as Engine
from .engine import Event as Event
from .local import LocalEngine as LocalEngine
