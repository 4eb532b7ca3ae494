"""How Sphinx builds the documentation site: ``make docs`` writes it into build/site.

The source folder is the root of the repository, so that a link between two pages, a notebook or a model's card is the
same relative path here and where the Markdown is read as it lies.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "adapters"), str(ROOT / "benchmarks")]

import plotly  # noqa: E402

from dt_lens.version import __version__  # noqa: E402

project = "dt-lens"
author = "The dt-lens authors"
copyright = author  # noqa: A001
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "commands",
]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/reference/*.md",
    "notebooks/*.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "dt_lens/zoo/*/CARD.md",
]
exclude_patterns = [".*", "build", "dist", "runs", "datasets", "dt-lens-study*", "tests", "notebooks/*.ipynb"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
source_suffix = {".md": "myst-nb"}
suppress_warnings = ["myst.header"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# Attributes get no entries of their own, since an attribute may be a property with a docstring.
napoleon_custom_sections = [("Attributes", "params_style")]

BUILD = ROOT / "build"
nb_execution_mode = "cache"  # in build/notebooks: only what has changed is executed again
nb_execution_cache_path = str(BUILD / "notebooks")
nb_execution_in_temp = True
nb_execution_timeout = 240
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # what libraries say while they load

# The kernels of the notebooks read these: figures go into the page as data, which static/site.js draws with plotly.js.
startup = BUILD / "ipython" / "profile_default" / "startup"
startup.mkdir(parents=True, exist_ok=True)
shutil.copy(Path(__file__).parent / "figures.py", startup)
os.environ |= {
    "IPYTHONDIR": str(BUILD / "ipython"),
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "adapters"), os.environ.get("PYTHONPATH", "")]),
    "PYTHONWARNINGS": "ignore:IProgress not found",
    "OMP_NUM_THREADS": "1",
}
(BUILD / "static").mkdir(exist_ok=True)
shutil.copy(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", BUILD / "static")

html_theme = "furo"
html_title = "dt-lens"
html_static_path = ["static", str(BUILD / "static")]
html_extra_path = ["extra"]  # index.html leads to the front page, docs/index.html
html_css_files = ["site.css"]
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"


def _bars_are_bars(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Keep ``|cosine|`` as it is written: reStructuredText would take it for a name to be replaced."""
    lines[:] = [re.sub(r"\|(\w+)\|", r"\\|\1\\|", line) for line in lines]


def _scripts_of_notebooks(app: Any, page: str, *rest: Any) -> None:
    """Load plotly.js, of five megabytes, in pages with figures only."""
    if page.startswith("notebooks/"):
        app.add_js_file("plotly.min.js")
        app.add_js_file("site.js")


def setup(app: Any) -> None:
    app.connect("html-page-context", _scripts_of_notebooks)
    app.connect("autodoc-process-docstring", _bars_are_bars)
