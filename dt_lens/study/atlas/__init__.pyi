from .atlas import make_atlas as make_atlas
from .page import write_atlas as write_atlas
from .result import Atlas as Atlas
