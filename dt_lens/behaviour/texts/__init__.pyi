from .comparison import TextComparison as TextComparison
from .evaluation import TextEvaluation as TextEvaluation
