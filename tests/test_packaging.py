"""The wheel holds the whole package and nothing else, works outside the repository, and its floors fit together."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "dt_lens": ROOT / "dt_lens",
    "dt_lens_adapters": ROOT / "adapters" / "dt_lens_adapters",
    "dt_lens_benchmarks": ROOT / "benchmarks" / "dt_lens_benchmarks",
}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """The ``[project]`` table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs; the wheel is built here, without network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def files(folder: Path) -> set[str]:
    """All files in a folder but Python's caches, by their path in it."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {path for path in found if "__pycache__" not in path}


def test_the_wheel_holds_the_packages_whole_and_nothing_else(unpacked: Path) -> None:
    assert {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")} == set(PACKAGES)
    for package, folder in PACKAGES.items():
        assert files(unpacked / package) == files(folder)
    held = files(unpacked)
    for needed in (
        "dt_lens/__init__.pyi", "dt_lens/svd/__init__.pyi", "dt_lens/py.typed", "dt_lens_adapters/py.typed",
        "dt_lens/zoo/hopper/model.safetensors", "dt_lens/zoo/tiny-gpt2/tokenizer.json", "dt_lens/report/page.css",
        "dt_lens/report/page.js", "dt_lens_adapters/kzl.py",
    ):  # fmt: skip
        assert needed in held
    assert not [path for path in held if "test" in Path(path).name]


@pytest.mark.acceptance
def test_the_wheel_works_outside_the_repository(unpacked: Path, tmp_path: Path, project: dict[str, Any]) -> None:
    script = """
import importlib.metadata, dt_lens, dt_lens_adapters
model = dt_lens.load("hopper")
with dt_lens.SingularEdit(model, "blocks.0.mlp.W_in"):
    pass
print(dt_lens.__file__, dt_lens_adapters.__file__)
print(dt_lens.__version__, importlib.metadata.version("dt-lens"), model.cfg.d_model)
print(sorted(p.name for p in importlib.metadata.distribution("dt-lens").entry_points))
"""
    env = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    where, versions, names = done.stdout.splitlines()
    assert where == f"{unpacked / 'dt_lens' / '__init__.py'} {unpacked / 'dt_lens_adapters' / '__init__.py'}"
    assert versions.split()[0] == versions.split()[1] and versions.split()[2] == "128"
    assert names == str(sorted(["dt-lens", *project["entry-points"]["dt_lens.adapters"]]))
    listed = subprocess.run(
        [sys.executable, "-m", "dt_lens", "--version"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert listed.stdout == f"dt-lens {versions.split()[0]}\n"


def test_every_dependency_is_pinned_to_a_version_that_it_allows(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    tried = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    assert len(wanted) > 20
    for line in wanted:
        requirement = Requirement(line)
        version = tried[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(version), line


def test_no_floor_is_below_what_its_neighbours_ask_for(project: dict[str, Any]) -> None:
    """The tried version of each dependency accepts the lowest version of each other one."""
    from importlib.metadata import requires

    floors = {}
    for line in project["dependencies"]:
        requirement = Requirement(line)
        (floors[requirement.name.lower()],) = (s.version for s in requirement.specifier if s.operator == ">=")
    for name in floors:
        for line in requires(name) or []:
            asked = Requirement(line)
            if asked.name.lower() in floors and (asked.marker is None or asked.marker.evaluate({"extra": ""})):
                assert asked.specifier.contains(floors[asked.name.lower()]), f"{name} asks for {line}"
