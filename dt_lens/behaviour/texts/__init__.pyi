from .comparison import TextComparison as TextComparison
from .evaluation import TextEvaluation as TextEvaluation
from .task import TextTask as TextTask
