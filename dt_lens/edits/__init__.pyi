from .control import Control as Control
from .edit import Edit as Edit
from .edit import suspended as suspended
from .replacements import Value as Value
from .several import load_edits as load_edits
from .several import save_edits as save_edits
from .singular import SingularEdit as SingularEdit
from .singular import load_edit as load_edit
