from .agent import train as train
from .planned import record_planned as record_planned
from .recording import record as record
from .settings import AgentSettings as AgentSettings
from .settings import TextSettings as TextSettings
from .text import train_text as train_text
