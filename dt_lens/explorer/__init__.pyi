from .explored import Explored as Explored
from .server import Explorer as Explorer
