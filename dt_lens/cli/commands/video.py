"""The command `video`: an agent in one episode, under edits beside the unedited one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dt_lens.arguments import local_path, require_writable
from dt_lens.cli.options import (
    Deterministic,
    EditMatrices,
    EditsFrom,
    EditSide,
    EditSv,
    EditValue,
    Environment,
    Given,
    Json,
    MaxSteps,
    Model,
    Raw,
    Seed,
    Target,
    edits_of,
    load_model,
)
from dt_lens.cli.output import print_json, progress, say
from dt_lens.errors import DtLensError

EXAMPLES = (
    "dt-lens video hopper --edit blocks.0.mlp.W_in --sv 0 --out runs/hopper.mp4",
    "dt-lens video taxi --edit blocks.0.mlp.W_out --steps 20 --out taxi.gif",
)


def video(
    model: Model,
    environment: Environment = None,
    edit: EditMatrices = None,
    sv: EditSv = None,
    side: EditSide = None,
    value: EditValue = None,
    edits_from: EditsFrom = None,
    raw: Raw = False,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The .mp4 or .gif to write.")] = Path("dt-lens-video.mp4"),
    seed: Seed = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Show so many steps from the beginning on; by default those around the first fall, or around the "
            "moment where the two agents part.",
        ),
    ] = None,
    size: Annotated[int, typer.Option(min=32, max=2048, help="Width and height of each picture, in pixels.")] = 288,
    stick: Annotated[
        bool, typer.Option("--stick", help="Draw agents of MuJoCo as stick figures, as where OpenGL does not work.")
    ] = False,
    target_return: Target = None,
    max_steps: MaxSteps = None,
    deterministic: Deterministic = None,
    given: Given = None,
    as_json: Json = False,
) -> None:
    """Draw one episode of an agent under edits beside the unedited agent, as a video.

    Without --edit or --edits-from, draw the unedited agent alone.
    """
    from dt_lens.behaviour.video.video import require_film

    require_film(local_path(out, "out"))
    require_writable(out, out.with_suffix(".jpg"))
    with progress() as tell:
        tell("loading", 0.0)
        loaded = load_model(model, given)
        if not loaded.can_act:
            raise DtLensError(
                "The model is a language model, and a video is of an agent; see dt-lens study for its text."
            )
        from dt_lens.behaviour.agents.filming import film

        edits = edits_of(loaded, edit, sv, side, value, edits_from, raw=raw, seed=seed)
        options = {"target_return": target_return, "max_steps": max_steps, "deterministic": deterministic}
        made = film(
            loaded, out, environment, edits, seed=seed, steps=steps, size=size, stick=stick or None, progress=tell,
            **options,
        )  # fmt: skip
    if made.file is None:
        raise DtLensError(made.reason)
    arms = ["unedited", *(["edited"] if edits else [])]
    if as_json:
        rows = [
            {"arm": arm, "steps": length, "return": value}
            for arm, length, value in zip(arms, made.lengths, made.returns, strict=True)
        ]
        print_json("video", model=model, seed=seed, episodes=rows, frames=made.frames, file=made.file, note=made.note)
        return
    for arm, length, total in zip(arms, made.lengths, made.returns, strict=True):
        say(f"{arm}: {length:,} steps, return {total:,.1f}")
    if made.note:
        say(made.note)
    say(f"The video: {made.file}")
