"""The documentation site builds without a warning, with every public name and command, and its notebooks run."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "site"


def public_names() -> set[str]:
    """``room.name`` for all that the faces of the rooms export."""
    names = set()
    for stub in sorted((ROOT / "dt_lens").rglob("__init__.pyi")):
        face = ".".join(stub.parent.relative_to(ROOT).parts)
        exported = [name for name in importlib.import_module(face).__all__ if not (stub.parent / name).is_dir()]
        names |= {f"{face}.{name}" for name in exported}
    return names - {"dt_lens.__version__", "dt_lens.cli.main"}


@pytest.mark.acceptance(minutes=4)
@pytest.mark.timeout(1800)
def test_the_site_builds_without_a_warning_and_is_complete() -> None:
    """Notebooks that have not changed since they ran here, in build/notebooks, are not run again."""
    import typer
    from sphinx.util.inventory import InventoryFile

    from dt_lens.cli.app import app

    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "html", "-c", "docs/site"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, ".", str(SITE)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-5000:]

    described = {
        name
        for kind, objects in InventoryFile.loads((SITE / "objects.inv").read_bytes(), uri="").data.items()
        if kind.startswith("py:")
        for name in objects
    }
    missing = set()
    for name in public_names() - described:
        face, _, short = name.rpartition(".")
        value = getattr(importlib.import_module(face), short)
        elsewhere = [other for other in described if other.endswith(f".{short}") and other.startswith("dt_lens.")]
        rooms = (other.rpartition(".")[0] for other in elsewhere)
        if not any(getattr(importlib.import_module(room), short, None) is value for room in rooms if is_module(room)):
            missing.add(name)
    assert not missing

    page = (SITE / "docs" / "reference" / "commands.html").read_text(encoding="utf-8")
    for command_name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f'id="dt-lens-{command_name}"' in page

    for notebook in (ROOT / "notebooks").glob("*.md"):
        shown = (SITE / "notebooks" / f"{notebook.stem}.html").read_text(encoding="utf-8")
        assert "cell_output" in shown and "Traceback" not in shown
    assert len(re.findall(r'<div class="figure"', (SITE / "notebooks" / "seed_redone.html").read_text("utf-8"))) == 4


def is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
