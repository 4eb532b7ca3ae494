from .comparison import TextComparison as TextComparison
from .evaluation import TextEvaluation as TextEvaluation
from .prompts import PromptTask as PromptTask
from .task import TextTask as TextTask
