"""The command `activations`: moments of the inputs of a model's matrices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dt_lens.cli.options import (
    Context,
    Deterministic,
    Environment,
    Given,
    Matrices,
    MaxSteps,
    Model,
    Seed,
    Target,
    Text,
    Windows,
    load_model,
    split,
    task_options,
)
from dt_lens.cli.output import print_next, print_table, print_written, progress, require_file, say

if TYPE_CHECKING:
    import pandas as pd

    from dt_lens.lens.activations import Activations

EXAMPLES = (
    "dt-lens activations hopper --out hopper.safetensors",
    "dt-lens activations tiny-gpt2 --windows 16 --out tiny.safetensors",
)


def activations(
    model: Model,
    out: Annotated[Path, typer.Option(help="The file to write, such as hopper.safetensors.")],
    episodes: Annotated[
        int | None, typer.Option(min=1, help="Number of episodes, 10 by default; episode i uses seed + i.")
    ] = None,
    seed: Seed = 0,
    environment: Environment = None,
    target_return: Target = None,
    max_steps: MaxSteps = None,
    deterministic: Deterministic = None,
    text: Text = None,
    context: Context = None,
    windows: Windows = None,
    matrices: Matrices = None,
    given: Given = None,
) -> None:
    """Collect means and second moments of every matrix's inputs, while an agent acts or a language model reads text."""
    require_file(out, ".safetensors")
    with progress() as tell:
        tell("loading", 0.0)
        loaded = load_model(model, given)
        from dt_lens.behaviour.collect_activations import collect_activations

        found = collect_activations(
            loaded,
            seed=seed,
            **task_options(
                loaded,
                environment=environment,
                episodes=episodes,
                target_return=target_return,
                max_steps=max_steps,
                deterministic=deterministic,
                text=text,
                context=context,
                windows=windows,
            ),
            matrices=split(matrices, "matrices"),
            progress=tell,
        )
    print_table(_table(found), f"{model}: inputs of its matrices")
    say(f"Digest {found.digest}, {found.record['tokens']:,} tokens.")
    found.save(out)
    print_written(out)
    print_next("scan", model, "--null", "spectrum", "--activations", out)


def _table(found: Activations) -> pd.DataFrame:
    """A row per place in the forward pass."""
    import pandas as pd

    rows = []
    for place, moments in found.points.items():
        readers = [name for name, where in found.reads.items() if where == place]
        # A head's own slice reads the same as the whole matrix, so it is not listed.
        readers = [name for name in readers if name.rpartition(".")[0] not in readers]
        energy = float(moments.second.trace())
        rows.append(
            {
                "read by": ", ".join(name.removeprefix("blocks.") for name in readers[:3])
                + (f" and {len(readers) - 3} more" if len(readers) > 3 else ""),
                "entries": len(moments.mean),
                "tokens": moments.count,
                "effective rank": moments.effective_rank,
                "the mean's share": float(moments.mean.square().sum()) / energy if energy else 0.0,
            }
        )
    return pd.DataFrame(rows)
