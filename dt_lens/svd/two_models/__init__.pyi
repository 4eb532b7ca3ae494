from .comparison import ModelChanges as ModelChanges
from .comparison import compare as compare
from .page import write_page as write_page
