from . import agents as agents
from . import sweep as sweep
from . import texts as texts
from . import video as video
