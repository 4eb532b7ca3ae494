"""Replay the recorded actions of an agent, or of two side by side, and draw them into one video.

The drawing happens in a process of its own. OpenGL can only be chosen before MuJoCo is imported, and where its library
is missing or broken, starting it may raise, hang or end the process, and none of that may reach the calling process.
If drawing fails, an agent of MuJoCo's is drawn as a stick figure, which needs no OpenGL; otherwise the result holds a
sentence that says why.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dt_lens.arguments import atomic_write, local_path, require_writable, whole_number
from dt_lens.decision_transformer.environment_wrappers import specify
from dt_lens.errors import DtLensError
from dt_lens.lens.environment_names import import_module_of, specification

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec

__all__ = ["FILMS", "SideBySide", "frame_steps", "require_film", "side_by_side"]

FILMS = (".mp4", ".gif")

_OFF = ("disable", "disabled", "off", "false", "0")  # the values of MUJOCO_GL that switch MuJoCo's OpenGL off


@dataclass(frozen=True)
class SideBySide:
    """A video, or the reason why there is none; and the length and the return of each replay.

    ``note`` says where the agents are stick figures, and why.
    """

    file: Path | None
    reason: str = ""  # one sentence, empty where there is a video
    frames: int = 0
    lengths: tuple[int, ...] = (0, 0)  # environment steps
    returns: tuple[float, ...] = (0.0, 0.0)
    poster: Path | None = None  # a JPEG of the moment where the two part
    note: str = ""
    opengl: bool = False  # whether it is OpenGL that does not work


def side_by_side(
    environment: str | EnvSpec,
    left: npt.ArrayLike,
    right: npt.ArrayLike | None,
    *,
    seed: int,
    file: str | Path,
    captions: tuple[str, str] = ("left", "right"),
    environment_kwargs: Mapping[str, Any] | None = None,
    ended: str = "ended",
    failed: tuple[bool, bool] = (True, True),
    size: int = 288,
    steps: int | None = None,
    stick: bool | None = None,
    max_frames: int = 80,
    fps: int = 20,
    budget: float = 8.0,
    timeout: float = 60.0,
) -> SideBySide:
    """Replay two recorded action sequences from the same seed and write them, side by side, as one H.264 mp4 or GIF.

    The frames are spread so that the first fall is among them, or where nobody falls the moment where the two part. A
    picture of that moment is written beside the video, under the video's name with the ending ``.jpg``. An agent whose
    episode ended stands still, greyed, with ``ended`` and the step below it, while the other goes on. Short episodes
    are shown slowly.

    Args:
        environment: a Gymnasium id, or a specification if the id is registered by your own code.
        left: the actions as they were given to ``env.step``: ``[steps, act_dim]``, or for discrete actions
            ``[steps]`` whole numbers, or one-hot rows.
        right: the other agent's actions; the number of steps may differ. ``None`` draws the left agent alone.
        seed: the episode's seed: ``env.reset(seed=seed)``.
        file: the .mp4 or .gif to write; its folder is made if it does not exist.
        captions: what stands above each agent.
        environment_kwargs: as for ``evaluate``, when the actions were recorded.
        ended: the word for a terminated episode: an agent that hops ``"fell"``.
        failed: whether an episode that ended ended in failure: it then has the colour of edits, else grey.
        size: width and height of each picture, pixels.
        steps: show this many steps from the episode's beginning on; by default those around the first fall, or around
            the moment where the two part.
        stick: whether MuJoCo's agents are drawn as stick figures; by default only where OpenGL does not work.
        max_frames: most frames; fewer are drawn if they would take more than ``budget``, or too much memory.
        fps: frames per second of the video; fewer for episodes of few steps.
        budget: seconds that drawing may take, roughly.
        timeout: seconds after which the drawing process is ended.

    Returns:
        The video, or why there is none: no OpenGL library, an environment that cannot draw itself, too slow a machine.

    Raises:
        DtLensError: for an unknown environment, actions that are not numbers, or a file that cannot be written or is
            neither .mp4 nor .gif.
    """
    file = local_path(file, "file")
    require_film(file)
    poster = file.with_suffix(".jpg")
    require_writable(file, poster)
    # Whoever recorded the actions has made the environment with these keywords.
    spec, kwargs = specify(_specification(environment), dict(environment_kwargs or {}))
    job = {
        "spec": spec,
        "kwargs": kwargs,
        "seed": seed,
        "actions": [_actions(left, "left"), *([] if right is None else [_actions(right, "right")])],
        "kind": file.suffix.lower()[1:],
        "steps": None if steps is None else whole_number(steps, "steps", 1),
        "stick": False,
        "captions": captions,
        "ended": ended,
        "failed": failed,
        "size": size - size % 2,
        "max_frames": max_frames,
        "fps": fps,
        "budget": budget,
    }
    outcome = SideBySide(None, "There is no video: nothing was tried.")
    for platform in [] if stick else _platforms():
        outcome = _drawn(job, platform, timeout, file, poster)
        if outcome.file is not None:
            return outcome
    if stick or (stick is None and outcome.opengl):
        why = outcome.reason
        drawn = _drawn({**job, "stick": True}, "disable", timeout, file, poster)
        if drawn.file is not None:
            return replace(
                drawn, note="" if stick else f"Drawn as a stick figure{why.removeprefix('There is no video')}"
            )
        outcome = drawn if stick else outcome
    return outcome


def require_film(file: Path) -> None:
    """Raise ``DtLensError`` unless the file's ending is that of a video that can be written."""
    if file.suffix.lower() not in FILMS:
        raise DtLensError(f"{file} ends in {file.suffix or 'nothing'}; a video is written as {' or '.join(FILMS)}.")


def _drawn(job: dict[str, Any], platform: str | None, timeout: float, file: Path, poster: Path) -> SideBySide:
    """Draw on one OpenGL platform in a folder of its own, and keep the video and its poster."""
    try:
        content = pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        return SideBySide(None, f"There is no video: the environment cannot be sent to another process ({error}).")
    with tempfile.TemporaryDirectory(prefix="dt-lens-video-", ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        (place / "job.pickle").write_bytes(content)
        outcome = _draw(place, platform, timeout, job["kind"])
        if outcome.file is None:
            return outcome
        picture = outcome.poster
        kept = None if picture is None or not picture.exists() else _keep(picture, poster)
        return replace(outcome, file=_keep(outcome.file, file), poster=kept)


def frame_steps(
    ends: Sequence[int], fell: Sequence[bool], max_frames: int, *, most_apart: int = 4, parted: int | None = None
) -> list[int]:
    """The environment steps to draw so that the first fall is seen, or where nobody falls how agents part.

    Args:
        ends: for each agent the number of steps of its episode.
        fell: whether it ended before the time limit.
        max_frames: the most steps to return.
        most_apart: the most steps between two frames; with more, the motion cannot be followed.
        parted: the step at which the agents are first seen to differ, if they do.

    Returns:
        Steps, rising, evenly spaced. With a fall about a quarter of them follow it; without one they begin a quarter of
        them before the agents part, or at 0.

    >>> frame_steps([1000, 10], [False, True], 5)
    [0, 4, 8, 12, 16]
    >>> frame_steps([1000, 1000], [False, False], 4)
    [0, 4, 8, 12]
    >>> frame_steps([1000, 1000], [False, False], 4, parted=500)
    [496, 500, 504, 508]
    """
    falls = [end for end, down in zip(ends, fell, strict=True) if down]
    if not falls:
        apart = max(1, min(most_apart, -(-max(ends) // max_frames)))
        span = (max_frames - 1) * apart
        start = max(0, min(0 if parted is None else parted - max_frames // 4 * apart, max(ends) - span))
        return list(range(start, max(ends) + 1, apart))[:max_frames]
    first = min(falls)
    before = max(1, max_frames - max_frames // 4 - 1)  # frames up to the fall
    apart = max(1, min(most_apart, -(-first // before)))
    start = max(0, first - before * apart)
    return list(range(start, start + apart * max_frames, apart))


def _specification(environment: str | EnvSpec) -> EnvSpec:
    if not isinstance(environment, str):
        return environment
    import_module_of(environment)
    return specification(environment)


def _actions(actions: npt.ArrayLike, side: str) -> npt.NDArray[Any]:
    try:
        array = np.asarray(actions)
        fits = array.ndim in (1, 2) and len(array) > 0 and bool(np.isfinite(array).all())
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise DtLensError(
            f"The {side} agent's actions must be finite numbers, [steps, act_dim] or, where they are discrete, [steps]."
        )
    return array


def _platforms() -> list[str | None]:
    """The OpenGL platforms to try: the user's choice, or on Linux EGL, which needs no screen, then a screen's own."""
    chosen = os.environ.get("MUJOCO_GL")
    if chosen or not sys.platform.startswith("linux"):
        return [chosen or None]
    return ["egl", *(["glfw"] if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") else [])]


def _draw(place: Path, platform: str | None, timeout: float, kind: str = "mp4") -> SideBySide:
    """Run the drawing process in ``place`` and report how it ended."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYGAME_HIDE_SUPPORT_PROMPT": "1"}
    if platform is not None:
        environ["MUJOCO_GL"] = platform
    environ.setdefault("SDL_VIDEODRIVER", "dummy")  # environments drawn by pygame need no screen either
    command = [sys.executable, "-m", "dt_lens.behaviour.video.rendering", str(place)]
    why = "There is no video: "
    try:
        process = subprocess.run(
            command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return SideBySide(None, f"{why}{_stage(place)} did not end within {timeout:g} seconds.")
    except OSError as error:
        return SideBySide(None, f"{why}no process could be started for it ({error.strerror}).")
    try:
        result = json.loads((place / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        code = process.returncode
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        opengl = _stage(place) == "starting OpenGL"
        return SideBySide(
            None,
            f"{why}the process that draws it ended {how} while {_stage(place)}.{_advice() if opengl else ''}",
            opengl=opengl,
        )
    if result.get("opengl") and (os.environ.get("MUJOCO_GL") or "").lower() in _OFF:
        return SideBySide(None, f"{why}MUJOCO_GL={os.environ['MUJOCO_GL']} switches OpenGL off.", opengl=True)
    if "error" in result:
        stage = "starting OpenGL" if result["opengl"] else _stage(place)
        advice = _advice() if result["opengl"] else ""
        return SideBySide(None, f"{why}{stage} failed ({result['error']}).{advice}", opengl=bool(result["opengl"]))
    lengths, returns = tuple(result["lengths"]), tuple(float(value) for value in result["returns"])
    return SideBySide(place / f"video.{kind}", "", result["frames"], lengths, returns, place / "poster.jpg")


def _stage(place: Path) -> str:
    """What the drawing process last said it was doing."""
    try:
        return (place / "stage").read_text(encoding="utf-8")
    except OSError:
        return "starting Python"


def _advice() -> str:
    chosen = os.environ.get("MUJOCO_GL")
    if chosen:
        return f" MUJOCO_GL is set to {chosen!r}; unset it to let dt-lens choose."
    if sys.platform.startswith("linux"):
        return " On Debian and Ubuntu `apt-get install libegl1 libegl-mesa0` provides what is needed."
    return ""


def _keep(made: Path, file: Path) -> Path:
    with atomic_write(file) as part:
        shutil.copyfile(made, part)
    return file
