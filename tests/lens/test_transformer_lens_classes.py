"""TransformerLens's classes without its package: what is imported when, and that there is one of each class."""

from __future__ import annotations

import subprocess
import sys

import pytest

FIRST_SIGMA = """
import sys
import dt_lens
model = dt_lens.load("hopper")
assert dt_lens.WeightSVD(model)["blocks.0.mlp.W_in"].sigma[0] > 0
print(*(name for name in ("transformers", "datasets", "pandas", "gymnasium", "huggingface_hub", "torch._dynamo",
                          "scipy.stats", "plotly", "minari", "transformer_lens.SVDInterpreter") if name in sys.modules))
"""
# Whatever asks first, the package is run, once, and its names are of the classes that the lens stands on.
ASKS = {
    "a name of a class that is imported": "from transformer_lens import ActivationCache, HookedRootModule\n"
    "assert isinstance(ActivationCache, type) and isinstance(HookedRootModule, type)",
    "a name": "from transformer_lens import FactoredMatrix",
    "a module": "import transformer_lens.model_bridge",
    "a name of a package in it": "from transformer_lens.utilities import get_act_name",
    "a module of a package in it": "import transformer_lens.utilities.hf_utils",
    "all names": "from transformer_lens import *",
    "a module that the package imports": "import transformer_lens.patching",
}
SAME = """
import sys
from dt_lens.lens.activation_cache import ActivationCache
from dt_lens.lens.hooks import HookedModule, HookPoint
import warnings
with warnings.catch_warnings(record=True):
    pass
assert "datasets" not in sys.modules
{asks}
assert "datasets" in sys.modules
import transformer_lens, transformer_lens.hook_points, transformer_lens.utilities
assert type(transformer_lens) is type(transformer_lens.utilities) is type(sys)
assert issubclass(HookedModule, transformer_lens.HookedRootModule)
assert issubclass(ActivationCache, transformer_lens.ActivationCache)
assert transformer_lens.hook_points.HookPoint is HookPoint
for name in ("model_bridge", "patching", "utilities", "utilities.hf_utils"):
    __import__("transformer_lens." + name)
    found = transformer_lens
    for part in name.split("."):
        found = getattr(found, part)
    assert found is sys.modules["transformer_lens." + name], name
    assert found.__spec__.name == found.__name__ == "transformer_lens." + name, name
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("dt_lens")]
try:
    transformer_lens.utilities.no_such_name
except AttributeError as error:
    print(error)
"""


def run(program: str) -> str:
    """What a program prints in a Python of its own."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_first_singular_value_of_a_bundled_agent_imports_little() -> None:
    assert run(FIRST_SIGMA) == ""


@pytest.mark.parametrize(
    "asks",
    # Each takes the seconds that importing the package takes.
    [
        pytest.param(asks, id=name, marks=() if n == 1 else pytest.mark.acceptance)
        for n, (name, asks) in enumerate(ASKS.items())
    ],
)
def test_the_package_is_run_whatever_asks(asks: str) -> None:
    assert run(SAME.format(asks=asks)) == "module 'transformer_lens.utilities' has no attribute 'no_such_name'"


def test_an_interrupt_while_it_is_run_leaves_it_to_be_run_again() -> None:
    program = """
import sys
from dt_lens.lens.hooks import HookedModule
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "datasets":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
import transformer_lens
try:
    transformer_lens.FactoredMatrix
except KeyboardInterrupt:
    sys.meta_path.pop(0)
assert isinstance(transformer_lens.FactoredMatrix, type)
assert issubclass(HookedModule, transformer_lens.HookedRootModule)
"""
    assert run(program) == ""


@pytest.mark.acceptance
def test_other_threads_wait_until_it_has_been_run() -> None:
    program = """
import threading, time
from dt_lens.lens.hooks import HookedModule
import transformer_lens
found = []
def ask():
    try:
        found.append(isinstance(transformer_lens.FactoredMatrix, type))
    except Exception as error:
        found.append(repr(error))
threads = [threading.Thread(target=ask) for _ in range(6)]
for thread in threads:
    thread.start()
    time.sleep(0.1)
for thread in threads:
    thread.join()
assert found == [True] * 6, found
"""
    assert run(program) == ""


def test_a_package_that_was_imported_already_is_left_alone() -> None:
    program = "import transformer_lens\nfrom dt_lens.lens.hooks import HookedModule\n"
    program += "assert issubclass(HookedModule, transformer_lens.HookedRootModule)\n"
    assert run(program) == ""


def test_another_layout_is_imported_as_usual() -> None:
    program = "import importlib, sys\nfrom importlib import import_module as usual\n"
    program += "def broken(name, *more):\n"
    program += "    if name == 'transformer_lens.utilities.slice' and 'datasets' not in sys.modules:\n"
    program += "        raise ModuleNotFoundError(name)\n"
    program += "    return usual(name, *more)\n"
    program += "importlib.import_module = broken\n"
    program += "from dt_lens.lens.hooks import HookedModule\nimport transformer_lens\n"
    program += "assert 'datasets' in sys.modules and type(transformer_lens) is type(sys)\n"
    program += "assert issubclass(HookedModule, transformer_lens.HookedRootModule)\n"
    assert run(program) == ""
