from .claims import CLAIMS as CLAIMS
from .claims import Claim as Claim
from .claims import Finding as Finding
from .page import write_court as write_court
from .result import CourtResult as CourtResult
from .result import Ruling as Ruling
