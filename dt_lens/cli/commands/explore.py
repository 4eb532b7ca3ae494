"""The command `explore`: look at a model by clicking."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dt_lens.cli.options import Given, Matrices, Model, Raw, given_values, load_model, split
from dt_lens.cli.output import progress, say

EXAMPLES = (
    "dt-lens explore hopper",
    "dt-lens explore tiny-gpt2 --no-browser --port 8050",
    "dt-lens explore hopper --sweep runs/sweep",
)


def explore(
    model: Model,
    sweep: Annotated[
        Path | None, typer.Option(help="Also show the results of a sweep or an atlas: its folder.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 for a free one.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the address in a browser.")] = True,
    matrices: Matrices = None,
    raw: Raw = False,
    given: Given = None,
) -> None:
    """Look at a model in a browser: its directions, what they match, edits of them, and runs with and without.

    The page is served on this machine alone, to whoever has the printed address. Ctrl-C ends it.
    """
    from dt_lens.explorer.server import Explorer, require_dash, require_port

    require_dash()
    require_port(port)
    from dt_lens.behaviour.sweep.results import SweepResults
    from dt_lens.explorer.explored import Explored

    results = None if sweep is None else SweepResults(sweep)
    with progress() as tell:
        tell("loading", 0.0)
        loaded = load_model(model, given)
        explored = Explored.of(
            model,
            loaded,
            matrices=split(matrices, "matrices"),
            fold_layernorm=not raw,
            given=given_values(given),
            sweep=results,
            tell=tell,
        )
    explorer = Explorer(explored, port)
    say(f"Explore {model} at {explorer.address}", flush=True)
    say("Whoever has this address can use it, from this machine. Ctrl-C ends it.", err=True, flush=True)
    if browser:
        import webbrowser

        webbrowser.open(explorer.address)
    explorer.serve()
