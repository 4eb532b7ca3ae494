"""How time and memory grow: with episodes, edits, workers, width, depth and vocabulary.

Each point runs in a process of its own, forked from one that has imported everything and nothing more, with one thread.
Time is that of a second run, after a short one. Memory is the largest resident size of the process, or of one of its
workers if that is larger. A slope is that of a straight line through the logarithms: 1 where twice as much takes twice
as long.

    python -c "from dt_lens_benchmarks.growth import figure; figure('docs/performance_growth.png')"

draws the figure (it needs ``kaleido``, ``pip install dt-lens[images]``) and prints the table.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dt_lens.report.images import save_figure
from dt_lens_benchmarks.row import Row

__all__ = ["CURVES", "Curve", "Point", "draw", "figure", "measure", "points"]

PRELOADED = ["dt_lens", "dt_lens.behaviour.evaluate", "dt_lens.language_model.model", "dt_lens_benchmarks.growth"]
SHORT: dict[str, Any] = {
    "environment": "Hopper-v5",
    "environment_kwargs": {"terminate_when_unhealthy": False},
    "lanes": 8,
}


class Curve(NamedTuple):
    """What is varied, and how it must show."""

    axis: str
    what: str  # what is timed
    values: tuple[int, ...]
    expected: float  # the slope of time of an ideal machine and large sizes
    time: tuple[float, float]  # the least and the largest slope that are accepted here
    memory: float  # the largest slope of memory above what the imports take


class Point(NamedTuple):
    """One measurement."""

    value: int
    seconds: float
    megabytes: float  # the largest resident size of a process
    base: float  # the resident size before any model


# Products grow with the square of d_model; attention's scores and the tokens' other work with d_model itself.
CURVES = {
    "episodes": Curve("episodes", "evaluate, 10 steps an episode", (8, 32, 128, 256), 1, (0.7, 1.2), 0.1),
    "edits": Curve("edits in one batch", "evaluate, 8 episodes of 5 steps each", (4, 16, 64), 1, (0.7, 1.2), 0.1),
    "workers": Curve("workers", "evaluate, 64 episodes of 40 steps", (1, 2), -1, (-1.2, -0.5), 0.1),
    "d_model": Curve("d_model", "a step of evaluate", (64, 128, 256, 512), 2, (0.7, 2.2), 2.2),
    "layers": Curve("layers", "a step of evaluate", (2, 4, 8, 16), 1, (0.6, 1.2), 1.2),
    "vocabulary": Curve("vocabulary", "scan of a W_out, d_model 64", (2_000, 8_000, 32_000), 1, (0.4, 1.2), 1.2),
}


def measure(quick: bool) -> Iterator[Row]:
    """The rows of this subject; ``quick`` measures the ends of each curve only."""
    for name, curve in CURVES.items():
        values = (curve.values[0], curve.values[-2 if quick else -1]) if len(curve.values) > 2 else curve.values
        found = points(name, values if quick else curve.values)
        slope, memory = slopes(found)
        low, high = curve.time
        met = low <= slope <= high and memory <= curve.memory
        ends = f"{found[0].megabytes:.0f} to {found[-1].megabytes:.0f} MB (slope {memory:.2f} above the imports)"
        wanted = f"{low:g} to {high:g}; of memory at most {curve.memory:g}"
        what = f"slope of time in {curve.axis}: {curve.what}"
        yield Row(what, slope, "slope", "as expected", curve.expected, slope / curve.expected, wanted, met, ends)


def points(name: str, values: tuple[int, ...]) -> list[Point]:
    """The measurements of a curve of ``CURVES`` at these values."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    found = []
    for value in values:
        mine, its = context.Pipe()
        process = context.Process(target=_send, args=(its, name, value))
        process.start()
        its.close()
        try:
            found.append(Point(value, *mine.recv()))
        except EOFError:
            raise RuntimeError(f"Measuring {name} = {value} failed; see above.") from None
        finally:
            process.join()
    return found


def slopes(found: list[Point]) -> tuple[float, float]:
    """The log-log slopes of seconds, and of megabytes above what the imports take (at least 10)."""
    x = np.log([point.value for point in found])
    y = np.log([point.seconds for point in found]), np.log([max(p.megabytes - p.base, 10) for p in found])
    time, memory = (float(np.polyfit(x, line, 1)[0]) for line in y)
    return time, memory


def _send(pipe: Any, name: str, value: int) -> None:
    import torch

    torch.set_num_threads(1)
    base = _megabytes(resource.RUSAGE_SELF)
    seconds = globals()[f"_{name}"](value)
    pipe.send((seconds, max(map(_megabytes, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))), base))


def _megabytes(who: int) -> float:
    """The largest resident size so far, of this process or of its largest child."""
    largest = resource.getrusage(who).ru_maxrss
    return largest / 2 ** (20 if sys.platform == "darwin" else 10)


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _episodes(n: int) -> float:
    import dt_lens

    model = dt_lens.load("hopper", check=False)
    dt_lens.evaluate(model, episodes=8, max_steps=1, workers=1, **SHORT)
    return _seconds(lambda: dt_lens.evaluate(model, episodes=n, max_steps=10, workers=1, **SHORT))


def _edits(n: int) -> float:
    import dt_lens

    model = dt_lens.load("hopper", check=False)
    edits = [dt_lens.SingularEdit(model, f"blocks.{i % 3}.mlp.W_out", sv=i // 3) for i in range(n)]
    dt_lens.evaluate(model, edits=edits[:1], episodes=8, max_steps=1, workers=1, **SHORT)
    return _seconds(lambda: dt_lens.evaluate(model, edits=edits, episodes=8, max_steps=5, workers=1, **SHORT))


def _workers(n: int) -> float:
    from loky import get_reusable_executor

    import dt_lens

    model = dt_lens.load("hopper", check=False)
    dt_lens.evaluate(model, episodes=64, max_steps=1, workers=n, **SHORT)
    # The better of two: another process on one of the cores would count as if the workers were at fault.
    runs = (lambda: dt_lens.evaluate(model, episodes=64, max_steps=40, workers=n, **SHORT),) * 2
    seconds = min(map(_seconds, runs))
    if n > 1:
        get_reusable_executor(max_workers=n).shutdown(wait=True)  # a child's memory is known when it has ended
    return seconds


def _acting(**shape: Any) -> float:
    """Seconds of an episode's step, of a random agent."""
    import dt_lens
    from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
    from dt_lens.decision_transformer.facts import RunFacts

    model = dt_lens.HookedDecisionTransformer(HookedDecisionTransformerConfig(11, 3, **shape)).eval()
    model.facts = RunFacts(20, target_returns=(3000.0,), return_scale=1000.0)
    dt_lens.evaluate(model, episodes=8, max_steps=1, workers=1, **SHORT)
    return _seconds(lambda: dt_lens.evaluate(model, episodes=8, max_steps=15, workers=1, **SHORT)) / (8 * 15)


def _d_model(d: int) -> float:
    return _acting(d_model=d, d_mlp=4 * d, n_layers=3, n_heads=1)


def _layers(n: int) -> float:
    return _acting(d_model=128, d_mlp=512, n_layers=n, n_heads=1)


def _vocabulary(n: int) -> float:
    from transformers import GPT2Config, GPT2LMHeadModel

    import dt_lens

    cfg = GPT2Config(vocab_size=n, n_positions=32, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    svd = dt_lens.WeightSVD(dt_lens.wrap(GPT2LMHeadModel(cfg).eval(), check=False))
    svd.scan("blocks.0.mlp.W_out", draws=10)
    return _seconds(lambda: svd.scan("blocks.1.mlp.W_out", draws=100))


def draw(curves: dict[str, list[Point]]) -> Any:
    """The figure: a panel for each curve, time against the left axis and memory against the right one."""
    from plotly.subplots import make_subplots

    titles = [f"{CURVES[name].what}<br>slope {slopes(found)[0]:.2f}" for name, found in curves.items()]
    panels = make_subplots(2, 3, subplot_titles=titles, specs=[[{"secondary_y": True}] * 3] * 2)
    for number, (name, found) in enumerate(curves.items()):
        row, column = number // 3 + 1, number % 3 + 1
        x = [point.value for point in found]
        lines = (("seconds", "#1f5fa8", [p.seconds for p in found]), ("MB", "#c4572a", [p.megabytes for p in found]))
        for right, (unit, colour, y) in enumerate(lines):
            place = {"row": row, "col": column, "secondary_y": bool(right)}
            panels.add_scatter(
                x=x, y=y, name=unit, mode="lines+markers", line_color=colour, showlegend=number == 0, **place
            )
            low, high = min(y), max(y)
            apart = (low, high) if high > 1.15 * low else (high,)  # two labels need room
            ends = [float(f"{value:.2g}") for value in apart]
            look: dict[str, Any] = {
                "type": "log",
                "range": [np.log10(low / 2), np.log10(high * 2)],
                "tickvals": ends,
                "ticks": "outside",
            }
            look |= {"ticktext": [f"{end:g} {'MB' if right else 's'}" for end in ends]}
            look |= {"tickfont_color": colour, "showgrid": False}
            panels.update_yaxes(**look, **place)
        panels.update_xaxes(type="log", tickvals=x, title_text=CURVES[name].axis, row=row, col=column)
    return panels.update_layout(
        width=1100, height=640, template="plotly_white", font_size=12, margin={"l": 50, "r": 50, "t": 70, "b": 50},
        legend={"orientation": "h", "x": 0.5, "xanchor": "center", "y": -0.1},
    )  # fmt: skip


def figure(file: str) -> None:
    """Measure all curves, print them, and write the figure to ``file``."""
    curves = {}
    for name, curve in CURVES.items():
        curves[name] = found = points(name, curve.values)
        time_slope, memory_slope = slopes(found)
        print(f"{curve.axis}: slope of time {time_slope:.2f}, of memory above the imports {memory_slope:.2f}")
        for point in found:
            print(f"  {point.value:>7}  {point.seconds:8.3f} s  {point.megabytes:6.0f} MB", flush=True)
    save_figure(draw(curves), file)
