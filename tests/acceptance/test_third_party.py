"""A third party's adapter, installed into a fresh environment, found without being mentioned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.acceptance(minutes=1)
EXAMPLE = Path(__file__).parents[2] / "docs" / "example_adapter"
USE = """
import json, sys
import dt_lens
from dt_lens import SingularEdit, WeightSVD, certify, evaluate

model = dt_lens.load(sys.argv[1])
found = {"worst": certify(model).worst, "from": sys.modules["dt_lens_toy"].__file__}
table = WeightSVD(model).scan(["*.W_in", "*.W_out", "*.OV.*"])
found["matrices"] = int(table["matrix"].nunique())
before = evaluate(model, "CartPole-v1", episodes=16, seed=0)
with SingularEdit(model, "blocks.0.mlp.W_in", sv=0, value="flip"):
    edited = evaluate(model, episodes=16, seed=0)
after = evaluate(model, episodes=16, seed=0)
found |= {"before": before.mean, "edited": edited.mean, "same": after.to_frame().equals(before.to_frame())}
print(json.dumps(found))
"""
BROKEN = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n[project]\n'
BROKEN += 'name = "{name}"\nversion = "1"\n[project.entry-points."dt_lens.adapters"]\n{entry} = "{module}:Adapter"\n'
BROKEN += '[tool.setuptools]\npy-modules = ["{module}"]\n'


class Environment:
    """A virtual environment that sees this one's packages, so that torch need not be fetched again."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=300)
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        (site,) = (path for path in folder.rglob("site-packages") if path.is_dir())
        self.pip("uninstall", "--yes", "setuptools")  # Python 3.11 brings one too old to build wheels; torch's is not
        # Through a .pth file, whose own .pth files (an editable install is one) are then read too.
        line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})"
        (site / "packages_of_the_tests.pth").write_text(f"{line}\n")

    def run(self, *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [self.python, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)

    def pip(self, *arguments: str | Path) -> None:
        result = self.run("-m", "pip", "--disable-pip-version-check", *arguments)
        assert result.returncode == 0, result.stderr

    def install(self, folder: Path) -> None:
        self.pip("install", "--no-deps", "--no-build-isolation", "--no-index", folder)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("fresh"))
    # setuptools builds in the source folder, which stays clean.
    copy = tmp_path_factory.mktemp("source") / "example_adapter"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    made.install(copy)
    return made


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An agent that its own code base trained."""
    file = tmp_path_factory.mktemp("agent") / "file.pt"
    subprocess.run([sys.executable, EXAMPLE / "toy_dt.py", file], check=True, timeout=300)
    return file


def bring(environment: Environment, folder: Path, entry: str, text: str) -> str:
    """Install a package whose one module is ``text``; returns its name."""
    name = f"brought-{folder.name.replace('_', '-')}"
    module = name.replace("-", "_")
    (folder / "pyproject.toml").write_text(BROKEN.format(name=name, entry=entry, module=module))
    (folder / f"{module}.py").write_text(text)
    environment.install(folder)
    return name


def test_it_is_found_and_everything_works(environment: Environment, agent: Path, tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(USE)
    result = environment.run("use.py", agent, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert Path(found["from"]).is_relative_to(environment.python.parents[1])
    assert found["worst"] < 2e-5 and found["matrices"] == 8
    assert found["before"] > 400 and found["edited"] < found["before"] and found["same"]


def test_the_command_line_finds_it_too(environment: Environment, agent: Path) -> None:
    result = environment.run("-m", "dt_lens", "certify", agent)
    assert result.returncode == 0, result.stderr
    assert "matrices and parts reproduce their activations" in result.stdout


def test_without_it_the_file_is_unknown(agent: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dt_lens", "certify", agent], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 2
    progress, sentence = result.stderr.splitlines()
    assert progress.endswith("loading") and sentence.startswith(
        "dt-lens: No adapter recognises this model, which holds "
    )


@pytest.mark.parametrize(
    ("entry", "text", "said"),
    [
        ("toy", "Adapter = None", "Two installed packages both have an adapter 'toy' ("),
        (
            "broken",
            "import no_such_module",
            "The adapter 'broken' cannot be imported: No module named 'no_such_module'",
        ),
        ("broken", "raise SystemError('what\\never')", "The adapter 'broken' cannot be imported: what ever."),
        ("broken", "class Adapter: pass", "'broken' is not an adapter: it needs a name and the methods "),
    ],
    ids=["duplicate", "import", "raises", "none"],
)
def test_a_bad_one_ends_in_one_sentence(
    environment: Environment, agent: Path, tmp_path: Path, entry: str, text: str, said: str
) -> None:
    name = bring(environment, tmp_path, entry, text)
    try:
        result = environment.run("-m", "dt_lens", "certify", agent)
    finally:
        environment.pip("uninstall", "--yes", name)
    assert result.returncode == 2
    progress, sentence = result.stderr.splitlines()
    assert progress.endswith("loading") and sentence.startswith(f"dt-lens: {said}")
    assert "Traceback" not in result.stderr


def test_a_broken_one_leaves_a_named_one_alone(environment: Environment, agent: Path, tmp_path: Path) -> None:
    name = bring(environment, tmp_path, "broken", "1 / 0")
    try:
        use = f"import dt_lens; print(dt_lens.load({str(agent)!r}, adapter='toy').cfg.n_heads)"
        result = environment.run("-c", use)
    finally:
        environment.pip("uninstall", "--yes", name)
    assert result.returncode == 0 and result.stdout.strip() == "2", result.stderr
