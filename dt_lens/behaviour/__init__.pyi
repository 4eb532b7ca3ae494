from . import agents as agents
from . import sweep as sweep
from . import texts as texts
from . import video as video
from .comparison import Comparison as Comparison
from .evaluation import Evaluation as Evaluation
from .task import Task as Task
from .terms import Terms as Terms
