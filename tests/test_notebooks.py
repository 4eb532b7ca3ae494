"""Each notebook is a pair, Markdown and ``.ipynb``, in step; the site executes the Markdown (tests/acceptance)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.md"))


def cells(notebook: Any) -> list[tuple[str, str, list[str]]]:
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]


def test_every_notebook_is_a_pair() -> None:
    assert len(NOTEBOOKS) == 6
    assert [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))] == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_the_two_of_a_pair_are_in_step(page: Path) -> None:
    """``jupytext --to ipynb notebooks/NAME.md`` writes the second from the first. Outputs are left to the site."""
    import jupytext

    markdown, notebook = jupytext.read(page), jupytext.read(page.with_suffix(".ipynb"))
    assert cells(notebook) == cells(markdown)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_the_first_cell_installs_on_colab_alone(page: Path) -> None:
    import jupytext

    first = next(cell for cell in jupytext.read(page).cells if cell.cell_type == "code")
    assert first.source.endswith('if "google.colab" in sys.modules:\n    %pip install -q dt-lens')


@pytest.mark.parametrize("name", ["toy_dt.py", "dt_lens_toy.py"])
def test_the_notebook_of_an_adapter_writes_the_example(name: str) -> None:
    """It works without a clone, and the tests of docs/example_adapter are tests of its files."""
    import jupytext

    notebook = jupytext.read(ROOT / "notebooks" / "your_adapter.md")
    (written,) = [cell.source for cell in notebook.cells if cell.source.startswith(f"%%writefile {name}\n")]
    example = (ROOT / "docs" / "example_adapter" / name).read_text(encoding="utf-8")
    assert written.partition("\n")[2].strip() == example.strip()
