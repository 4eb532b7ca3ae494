"""The way through the rooms: imports point downwards, form no circle, and go to files, not to faces.

Lazy imports, imports for types only and ``import_module`` with a constant count like all others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "dt_lens": ROOT / "dt_lens",
    "dt_lens_adapters": ROOT / "adapters" / "dt_lens_adapters",
    "dt_lens_benchmarks": ROOT / "benchmarks" / "dt_lens_benchmarks",
}

# What each room may import, besides itself and the files at the root.
BASE = {"lens", "statistics", "report"}
BEHAVIOUR = {*BASE, "svd", "edits", "decision_transformer", "language_model"}
ROOMS: dict[str, set[str]] = {
    "zoo": set(),
    "statistics": set(),
    "report": set(),
    "lens": {"zoo"},
    "decision_transformer": {"lens"},
    "language_model": {"lens"},
    "svd": BASE,
    "edits": {*BASE, "svd"},
    "behaviour": BEHAVIOUR,
    "training": {*BEHAVIOUR, "behaviour"},
    "study": {*BEHAVIOUR, "behaviour"},
    "explorer": {*BEHAVIOUR, "behaviour", "study"},
    "cli": {*BEHAVIOUR, "behaviour", "training", "study", "explorer", "benchmarks", "zoo"},
    "adapters": {"lens", "decision_transformer", "language_model"},
    "benchmarks": {*BEHAVIOUR, "behaviour", "training", "study"},
}
OUTSIDE = {"dt_lens_adapters": "adapters", "dt_lens_benchmarks": "benchmarks"}  # packages beside dt_lens


def modules(packages: dict[str, Path]) -> dict[str, Path]:
    """Dotted name to file, for every module; a package is its ``__init__``."""
    found = {}
    for package, folder in packages.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imports(name: str, text: str, known: set[str], face: bool) -> Iterator[tuple[str, int]]:
    """The modules among ``known`` that a module's text imports, each with its line."""
    package = name if face else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        elif isinstance(node, ast.Call) and not face:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0] if node.args else None
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                targets = [str(first.value)]
        for target in targets:
            if target in known and target != name:
                yield target, node.lineno  # type: ignore[attr-defined]


def room_of(module: str) -> str | None:
    """The room that a module stands in; ``None`` for the files at the root."""
    package, *rest = module.split(".")
    if package in OUTSIDE:
        return OUTSIDE[package]
    return rest[0] if rest and (rest[0] in ROOMS) else None


def allowed(importer: str, imported: str) -> bool:
    """Whether an import stays in its room or points downwards."""
    here, there = room_of(importer), room_of(imported)
    if here == "benchmarks" and imported == "dt_lens":
        return True
    if here is None:
        return there is None or importer == "dt_lens.__main__"
    return there is None or there == here or there in ROOMS[here]


def test_every_room_is_listed() -> None:
    """A room that is not would count as a file at the root, which anything may import."""
    assert {face.parent.name for face in PACKAGES["dt_lens"].glob("*/__init__.py")} == set(ROOMS) - {*OUTSIDE.values()}


def faults(packages: dict[str, Path]) -> list[str]:
    """Every import that points upwards, goes to a face, or closes a circle, as ``importer:line -> imported``."""
    files = modules(packages)
    faces = {name for name, path in files.items() if path.name == "__init__.py"}
    edges: dict[str, dict[str, int]] = {name: {} for name in files}
    for name, path in files.items():
        for target, line in imports(name, path.read_text(), set(files), name in faces):
            edges[name].setdefault(target, line)
    found = []
    for name, targets in edges.items():
        for target, line in targets.items():
            edge = f"{name}:{line} -> {target}"
            # A benchmark measures what a user writes.
            if target in faces and name != "dt_lens.__main__" and room_of(name) != "benchmarks":
                found.append(f"{edge} imports a face")
            elif not allowed(name, target):
                found.append(f"{edge} points upwards")
    return found + [" -> ".join([*circle, circle[0]]) + " is a circle" for circle in circles(edges)]


def circles(edges: dict[str, dict[str, int]]) -> Iterator[list[str]]:
    """One circle of imports for each group of modules that reach each other."""
    done: set[str] = set()

    def search(start: str) -> list[str] | None:
        paths = [[start]]
        seen = {start}
        for path in paths:
            for target in edges[path[-1]]:
                if target == start:
                    return path
                if target not in seen and target not in done:
                    seen.add(target)
                    paths.append([*path, target])
        return None

    for name in edges:
        circle = search(name)
        if circle:
            yield circle
        done.add(name)


def test_imports_point_downwards_and_form_no_circle() -> None:
    assert faults(PACKAGES) == []


PLANTED = {
    "lazy": (
        "svd/scan.py",
        "def f():\n    from dt_lens.edits.edit import Edit",
        "dt_lens.svd.scan:2 -> dt_lens.edits.edit points upwards",
    ),
    "types only": (
        "lens/a.py",
        "if TYPE_CHECKING:\n    from dt_lens.svd import scan",
        "dt_lens.lens.a:2 -> dt_lens.svd.scan points upwards",
    ),
    "import_module": (
        "lens/a.py",
        "import importlib\nimportlib.import_module('dt_lens.svd.scan')",
        "dt_lens.lens.a:2 -> dt_lens.svd.scan points upwards",
    ),
    "relative": ("lens/a.py", "from ..svd.scan import scan", "dt_lens.lens.a:1 -> dt_lens.svd.scan points upwards"),
    "a root file": ("errors.py", "import dt_lens.svd.scan", "dt_lens.errors:1 -> dt_lens.svd.scan points upwards"),
    "a face": ("edits/edit.py", "from dt_lens.svd import x", "dt_lens.edits.edit:1 -> dt_lens.svd imports a face"),
    "a circle": (
        "svd/scan.py",
        "def f():\n    import dt_lens.svd.b",
        "dt_lens.svd.b -> dt_lens.svd.scan -> dt_lens.svd.b is a circle",
    ),
}


@pytest.mark.parametrize(("where", "statement", "said"), PLANTED.values(), ids=PLANTED)
def test_a_planted_import_is_named(tmp_path: Path, where: str, statement: str, said: str) -> None:
    house = {"__init__.py": "", "errors.py": "", "lens/a.py": "", "svd/scan.py": "", "edits/edit.py": ""}
    house |= {f"{room}/__init__.py": "" for room in ("lens", "svd", "edits")}
    house |= {"svd/b.py": "from dt_lens.svd.scan import scan", where: statement}
    for name, text in house.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert faults({"dt_lens": tmp_path}) == [said]


def test_the_root_holds_at_most_twenty_one_entries() -> None:
    """Thirteen rooms, the explorer being the last to come, and eight files."""
    entries = [path.name for path in PACKAGES["dt_lens"].iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 21, entries


def test_no_file_is_longer_than_450_lines() -> None:
    folders = [*PACKAGES.values(), ROOT / "tests", ROOT / "benchmarks"]
    lengths = {path: len(path.read_text().splitlines()) for folder in folders for path in folder.rglob("*.py")}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > 450} == {}


def test_faces_export_what_exists_and_no_name_of_a_module() -> None:
    """Importing a module sets its name in the package, and would replace an export of the same name."""
    import importlib

    for stub in sorted(PACKAGES["dt_lens"].rglob("__init__.pyi")):
        face = importlib.import_module(".".join(("dt_lens", *stub.parent.relative_to(PACKAGES["dt_lens"]).parts)))
        within = {path.stem for path in stub.parent.iterdir()}
        for name in face.__all__:
            value = getattr(face, name)
            is_room = (stub.parent / name / "__init__.py").exists()
            assert is_room == (getattr(value, "__name__", None) == f"{face.__name__}.{name}"), (face.__name__, name)
            assert is_room or name not in within, f"{face.__name__} exports {name}, the name of one of its modules"
