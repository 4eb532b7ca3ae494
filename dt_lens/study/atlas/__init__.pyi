from .atlas import Atlas as Atlas
from .atlas import make_atlas as make_atlas
from .page import write_atlas as write_atlas
