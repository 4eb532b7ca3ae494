"""From nothing to the first singular value of the bundled agent, beside what importing torch alone takes.

Each round starts new processes, in turn: ``import torch``, then the Python API, then the command. The first round, in
which files come from the disk, is left out.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from dt_lens_benchmarks.row import Row

__all__ = ["measure"]

TORCH = "import torch"
FIRST_SIGMA = (
    "import dt_lens; model = dt_lens.load('hopper'); dt_lens.WeightSVD(model)['blocks.0.mlp.W_in'].sigma[0].item()"
)
TOP = ["-m", "dt_lens", "top", "hopper", "blocks.0.mlp.W_in"]


def measure(quick: bool) -> Iterator[Row]:
    """The rows of this subject; ``quick`` takes fewer rounds."""
    seconds: dict[str, list[float]] = {"torch": [], "sigma": [], "top": []}
    for number in range(1 + (2 if quick else 5)):
        for name, words in (("torch", ["-c", TORCH]), ("sigma", ["-c", FIRST_SIGMA]), ("top", TOP)):
            taken = _seconds(words)
            if number:
                seconds[name].append(taken)
    torch, sigma, top = (statistics.median(taken) for taken in seconds.values())
    for what, ours, most in (
        ("load('hopper') to the first singular value", sigma, 2.5),
        ("dt-lens top hopper", top, 3.5),
    ):
        wanted = f"under {most:g} times"
        # The wanted seconds are those of a machine on which torch takes one second to import.
        yield Row(what, ours, "s", "import torch", torch, torch / ours, wanted, ours < most * torch)


def _seconds(words: list[str]) -> float:
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    taken = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {done.stderr.strip()[-500:]}")
    return taken
