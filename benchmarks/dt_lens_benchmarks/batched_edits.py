"""Many edits in one batch: time per environment step of ``evaluate(model, edits=...)``, beside unedited episodes.

Hopper runs without termination (``terminate_when_unhealthy=False``), so that every episode has the same number of
steps. Our time includes making the low-rank changes: each edit is put in force once, checked, and undone. The unedited
episodes are as many, in one ``evaluate``. Both take turns, and the median of the rounds' ratios is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import dt_lens
from dt_lens import SingularEdit, WeightSVD
from dt_lens.edits.edit import Edit
from dt_lens.lens.matrices import catalogue
from dt_lens_benchmarks.row import Row

__all__ = ["edits_of", "measure"]

MOST = 1.3  # times the time of unedited episodes
WORKERS = 2


def edits_of(model: Any, count: int) -> list[Edit]:
    """``count`` edits, of the leading directions of every matrix in turn; each matrix is decomposed once."""
    matrices = list(catalogue(model).values())[:count]
    svd = WeightSVD(model)
    return [
        SingularEdit(
            model, m.name, number // len(matrices), side=m.residual_sides[0], value="zero", decomposition=svd[m.name]
        )
        for number, m in ((n, matrices[n % len(matrices)]) for n in range(count))
    ]


def measure(quick: bool) -> Iterator[Row]:
    """The rows of this subject; ``quick`` takes fewer and shorter episodes, and one round."""
    count, episodes, steps, rounds = (16, 8, 100, 1) if quick else (64, 8, 200, 3)
    model = dt_lens.load("hopper", check=False)
    edits = edits_of(model, count)
    given: dict[str, Any] = {
        "environment_kwargs": {"terminate_when_unhealthy": False},
        "max_steps": steps,
        "workers": WORKERS,
    }

    def edited() -> float:
        return _microseconds(
            lambda: sum(len(one) for one in dt_lens.evaluate(model, edits=edits, episodes=episodes, **given)) * steps
        )

    def unedited() -> float:
        return _microseconds(lambda: len(dt_lens.evaluate(model, episodes=count * episodes, **given)) * steps)

    dt_lens.evaluate(model, episodes=32, **{**given, "max_steps": 2})  # the workers start, once per session
    found = [(edited(), unedited()) for _ in range(rounds)]
    ours, theirs = (statistics.median(row[i] for row in found) for i in (0, 1))
    ratio = statistics.median(row[1] / row[0] for row in found)
    yield Row(
        f"{count} edits x {episodes} episodes of {steps} steps in one batch, Hopper-v5, {WORKERS} workers",
        ours,
        "us/step",
        f"{count * episodes} unedited episodes",
        theirs,
        ratio,
        f"at least {1 / MOST:.2f}",
        ratio >= 1 / MOST,
        f"{1 / ratio:.2f} times the time; at most {MOST:g} wanted",
    )


def _microseconds(run: Callable[[], int]) -> float:
    """Microseconds a step of ``run()``, which returns its number of steps."""
    begin = time.perf_counter()
    steps = run()
    return 1e6 * (time.perf_counter() - begin) / steps
