from .environment import ScoreReference as ScoreReference
from .environment import make_environment as make_environment
from .environment import score_reference as score_reference
from .evaluation import AgentEvaluation as AgentEvaluation
from .identity import model_id as model_id
from .recording import record_actions as record_actions
from .rollouts import Outcome as Outcome
from .task import AgentTask as AgentTask
