from .adapter import LanguageModelAdapter as LanguageModelAdapter
from .config import LanguageModelConfig as LanguageModelConfig
from .family import Family as Family
from .family import Modules as Modules
from .model import HookedLanguageModel as HookedLanguageModel
from .weights_only import WeightsOnly as WeightsOnly
