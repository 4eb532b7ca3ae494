from . import atlas as atlas
from . import court as court
from . import steering as steering
from .result import StudyResult as StudyResult
from .study import Study as Study
