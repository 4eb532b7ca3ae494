from .checkpoint import save_pretrained as save_pretrained
from .config import HookedDecisionTransformerConfig as HookedDecisionTransformerConfig
from .facts import RunFacts as RunFacts
from .model import DecisionTransformerOutput as DecisionTransformerOutput
from .model import HookedDecisionTransformer as HookedDecisionTransformer
