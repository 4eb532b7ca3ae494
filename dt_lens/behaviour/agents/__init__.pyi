from .comparison import Comparison as Comparison
from .environment import ScoreReference as ScoreReference
from .environment import make_task as make_task
from .environment import score_reference as score_reference
from .evaluation import Evaluation as Evaluation
from .identity import model_id as model_id
from .recording import record_actions as record_actions
from .rollouts import Outcome as Outcome
