"""Run by each notebook's kernel as it starts: a plotly figure is shown as its data, for ``static/site.js`` to draw."""

from typing import Any

import plotly.io
from plotly.io.base_renderers import MimetypeRenderer


class DataRenderer(MimetypeRenderer):
    """Gives a figure as an element that holds its JSON."""

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, str]:
        data = plotly.io.to_json(fig_dict, validate=False).replace("</", "<\\/")
        return {"text/html": f'<div class="figure"><script type="application/json">{data}</script></div>'}


plotly.io.renderers["data"] = DataRenderer()
plotly.io.renderers.default = "data"
