"""The command `compare`: what changed in the weights between two models."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dt_lens.arguments import require_writable
from dt_lens.cli.completion import complete_model
from dt_lens.cli.options import Given, Json, Matrices, Raw, WeightsOnly, load_model, split
from dt_lens.cli.output import print_json, print_table, progress, say

SHOWN = ["matrix", "relative_change", "change_effective_rank", "spectrum_change", "spectral_norm_change", "k"]

EXAMPLES = (
    "dt-lens compare doorkey unlockpickup --top 5",
    "dt-lens compare before/ after/ --out comparison",
)


def compare(
    a: Annotated[
        str,
        typer.Argument(metavar="A", help="A model, such as the one before fine-tuning.", autocompletion=complete_model),
    ],
    b: Annotated[
        str,
        typer.Argument(
            metavar="B", help="A model of the same shape, such as the one after it.", autocompletion=complete_model
        ),
    ],
    matrices: Matrices = None,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Leading directions whose subspaces are compared.")] = 10,
    top: Annotated[int, typer.Option(min=0, help="Number of most changed matrices to print; 0 for all.")] = 20,
    raw: Raw = False,
    out: Annotated[Path | None, typer.Option(help="Write comparison.html and comparison.csv to this folder.")] = None,
    weights_only: WeightsOnly = False,
    resume: Annotated[
        Path | None, typer.Option(help="Folder to store finished work in; the same command resumes from it.")
    ] = None,
    given: Given = None,
    as_json: Json = False,
) -> None:
    """Show what changed in the weights between two models, such as before and after fine-tuning."""
    if out is not None:
        require_writable(out / "comparison.html", out / "comparison.csv")
    if resume is not None and not (resume.is_dir() and any(resume.iterdir())):  # a full one may be read only
        require_writable(resume / "finished.safetensors")
    with progress() as tell:
        tell("loading", 0.0)
        one, two = (load_model(source, given, weights_only=weights_only) for source in (a, b))
        from dt_lens.svd.two_models.comparison import compare as run

        names = (Path(a).name, Path(b).name)
        if names[0] == names[1]:
            names = (a, b)
        chosen = split(matrices, "matrices")
        found = run(one, two, chosen, k=k, fold_layernorm=not raw, names=names, progress=tell, resume=resume)
        page = None
        if out:
            from dt_lens.svd.two_models.page import write_page

            page = write_page(found, out, shlex.join(["dt-lens", *sys.argv[1:]]))
    table = found.most_changed(top or len(found.table))
    same = int((found.table["relative_change"] == 0).sum())
    if as_json:
        counts = {"matrices": len(found.table), "differ": len(found.table) - same}
        print_json("compare", models=names, **counts, table=table, notes=found.notes, report=page)
        return
    shown = table[SHOWN].copy()
    for side in ("left", "right"):
        shown[f"{side}_angle"] = [
            f"{name} {angle:.1f}°" if angle == angle else name
            for name, angle in zip(table[f"{side}_side"], table[f"{side}_angle"], strict=True)
        ]
    print_table(shown, f"{names[0]} and {names[1]}: the most changed of {len(found.table)} matrices")
    say(f"{len(found.table) - same} of {len(found.table)} matrices differ.")
    for note in found.notes:
        say(note)
    if page:
        say(f"\nThe report: {page}")
