from .page import write_steering as write_steering
from .result import SteeringResult as SteeringResult
from .steering import steer as steer
