from .images import save_figure as save_figure
from .page import write_report as write_report
from .tables import table_html as table_html
