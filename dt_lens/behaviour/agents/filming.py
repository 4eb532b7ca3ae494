"""A video of an agent in one episode: unedited, or under edits beside the unedited one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dt_lens.arguments import LAST_SEED, local_path, require_writable, whole_number
from dt_lens.behaviour.agents.recording import actions_of_episode
from dt_lens.behaviour.agents.task import AgentTask
from dt_lens.behaviour.video.video import SideBySide, require_film, side_by_side
from dt_lens.edits.edit import Edit
from dt_lens.edits.several import in_force
from dt_lens.errors import DtLensError, a_type
from dt_lens.lens.forward_mode import measuring

__all__ = ["dose_of", "film"]

SECONDS = 120.0  # that drawing may take
FRAMES = 1200


def film(
    model: Any,
    file: str | Path,
    environment: Any = None,
    edits: Sequence[Edit] = (),
    *,
    seed: int = 0,
    steps: int | None = None,
    size: int = 288,
    stick: bool | None = None,
    progress: Callable[[str, float], None] | None = None,
    **options: Any,
) -> SideBySide:
    """Draw one episode of an agent as an .mp4 or .gif: under ``edits`` beside the unedited agent, or unedited alone.

    Both start from the same state. The step and the return so far stand below each, the edit and its dose above.

    Args:
        model: a wrapped decision transformer, without these edits in force.
        file: the .mp4 or .gif to write; a picture of the moment where the two part is written beside it, as .jpg.
        environment: as for ``evaluate``; the model's own by default.
        edits: in force all at once on the right; with none the agent is drawn alone.
        seed: the episode's.
        steps: show so many steps from the beginning on; by default those around the first fall, or around the moment
            where the two part.
        size: width and height of each picture, pixels.
        stick: whether MuJoCo's agents are drawn as stick figures; by default only where OpenGL does not work.
        progress: a function of (what is being done, share done).
        options: what else ``evaluate`` takes to say what is run: ``target_return``, ``max_steps``, ``deterministic``,
            ``failure``, ``environment_kwargs``.

    Raises:
        DtLensError: for a model that does not act, a file that cannot be written or is neither .mp4 nor .gif, and an
            environment that cannot be run.
    """
    path = local_path(file, "file")
    require_film(path)
    require_writable(path, path.with_suffix(".jpg"))
    seed = whole_number(seed, "seed", 0, LAST_SEED - 1)
    whole_number(size, "size", 32, 2048)
    if steps is not None:
        whole_number(steps, "steps", 1)
    if not isinstance(edits, list | tuple) or not all(isinstance(edit, Edit) for edit in edits):
        raise DtLensError(f"edits is {a_type(edits)}; it must be a list of edits, such as [SingularEdit(...)].")
    tell = progress or (lambda _what, _share: None)
    task = AgentTask.of(model, environment, caller="a video", **options)
    setting, terms = task.setting, task.terms
    captions = ["unedited", *([", ".join(map(dose_of, edits))] if edits else [])]
    actions = []
    with measuring(model):
        for number, caption in enumerate(captions):
            tell(f"running the agent, {caption}", 0.35 * number)
            with in_force(edits if number else ()):
                actions.append(actions_of_episode(model, setting, seed))
    tell("drawing", 0.7)
    ended = terms.failure == "terminated"
    return side_by_side(
        setting.made.spec,
        actions[0],
        actions[1] if edits else None,
        seed=seed,
        file=path,
        captions=(captions[0], captions[-1]),
        environment_kwargs=setting.made.kwargs,
        ended="fell" if ended and not terms.failure_note else "ended",
        failed=(ended, ended),
        size=size,
        steps=steps,
        stick=stick,
        max_frames=FRAMES if steps is not None else 200,
        budget=SECONDS / 2,
        timeout=2 * SECONDS,
    )


def dose_of(edit: Edit) -> str:
    """What a caption calls an edit: its matrix, its directions and what they become.

    A control, or an edit of a user's own kind, is called by its matrix alone.
    """
    sv, value = getattr(edit, "sv", None), getattr(edit, "value", None)
    parts = [edit.matrix.name]
    if sv is not None:
        parts.append(f"sv={','.join(map(str, sv)) if isinstance(sv, list | tuple) else sv}")
    if isinstance(value, str):
        parts.append(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        parts.append(f"sigma × {value:g}")
    elif value is not None:
        parts.append("vector")
    return " ".join(parts)
