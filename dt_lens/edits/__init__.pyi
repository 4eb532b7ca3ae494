from .control import Control as Control
from .edit import Edit as Edit
from .edit import suspended as suspended
from .replacements import Value as Value
from .singular import SingularEdit as SingularEdit
from .singular import load_edit as load_edit
