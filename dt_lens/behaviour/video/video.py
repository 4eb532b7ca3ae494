"""Replay the recorded actions of two agents and draw them side by side into one video.

The drawing happens in a process of its own. OpenGL can only be chosen before MuJoCo is imported, and where its library
is missing or broken, starting it may raise, hang or end the process, and none of that may reach the calling process.
If drawing fails, the result holds a sentence that says why.
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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dt_lens.arguments import atomic_write, local_path, require_writable
from dt_lens.decision_transformer.environment_wrappers import specify
from dt_lens.errors import DtLensError
from dt_lens.lens.environment_names import import_module_of, specification

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec

__all__ = ["SideBySide", "frame_steps", "side_by_side"]

_OFF = ("disable", "disabled", "off", "false", "0")  # the values of MUJOCO_GL that switch MuJoCo's OpenGL off


@dataclass(frozen=True)
class SideBySide:
    """A video, or the reason why there is none; and the length and the return of both replays."""

    file: Path | None
    reason: str = ""  # one sentence, empty where there is a video
    frames: int = 0
    lengths: tuple[int, int] = (0, 0)  # environment steps
    returns: tuple[float, float] = (0.0, 0.0)


def side_by_side(
    environment: str | EnvSpec,
    left: npt.ArrayLike,
    right: npt.ArrayLike,
    *,
    seed: int,
    file: str | Path,
    captions: tuple[str, str] = ("left", "right"),
    environment_kwargs: Mapping[str, Any] | None = None,
    ended: str = "ended",
    failed: tuple[bool, bool] = (True, True),
    size: int = 288,
    max_frames: int = 80,
    fps: int = 20,
    budget: float = 8.0,
    timeout: float = 60.0,
) -> SideBySide:
    """Replay two recorded action sequences from the same seed and write them, side by side, as one H.264 mp4.

    The frames are spread so that the first fall is among them. An agent whose episode ended stands still, greyed, with
    ``ended`` and the step below it, while the other goes on. Short episodes are shown slowly.

    Args:
        environment: a Gymnasium id, or a specification if the id is registered by your own code.
        left: the actions as they were given to ``env.step``: ``[steps, act_dim]``, or for discrete actions
            ``[steps]`` whole numbers, or one-hot rows.
        right: the other agent's actions; the number of steps may differ.
        seed: the episode's seed: ``env.reset(seed=seed)``.
        file: the mp4 to write; its folder is made if it does not exist.
        captions: what stands above each agent.
        environment_kwargs: as for ``evaluate``, when the actions were recorded.
        ended: the word for a terminated episode: an agent that hops ``"fell"``.
        failed: whether an episode that ended ended in failure: it then has the colour of edits, else grey.
        size: width and height of each picture, pixels.
        max_frames: most frames; fewer are drawn if drawing them would take more than ``budget``.
        fps: frames per second of the video; fewer for episodes of few steps.
        budget: seconds that drawing may take, roughly.
        timeout: seconds after which the drawing process is ended.

    Returns:
        The video, or why there is none: no OpenGL library, an environment that cannot draw itself, too slow a machine.

    Raises:
        DtLensError: for an unknown environment, actions that are not numbers, or a file that cannot be written.
    """
    file = local_path(file, "file")
    require_writable(file)
    # Whoever recorded the actions has made the environment with these keywords.
    spec, kwargs = specify(_specification(environment), dict(environment_kwargs or {}))
    job = {
        "spec": spec,
        "kwargs": kwargs,
        "seed": seed,
        "actions": [_actions(left, "left"), _actions(right, "right")],
        "captions": captions,
        "ended": ended,
        "failed": failed,
        "size": size - size % 2,
        "max_frames": max_frames,
        "fps": fps,
        "budget": budget,
    }
    try:
        content = pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        return SideBySide(None, f"There is no video: the environment cannot be sent to another process ({error}).")
    outcome = SideBySide(None, "There is no video: nothing was tried.")
    for platform in _platforms():
        with tempfile.TemporaryDirectory(prefix="dt-lens-video-", ignore_cleanup_errors=True) as folder:
            place = Path(folder)
            (place / "job.pickle").write_bytes(content)
            outcome = _draw(place, platform, timeout)
            if outcome.file is not None:
                return SideBySide(_keep(outcome.file, Path(file)), "", outcome.frames, outcome.lengths, outcome.returns)
    return outcome


def frame_steps(ends: Sequence[int], fell: Sequence[bool], max_frames: int, *, most_apart: int = 4) -> list[int]:
    """The environment steps to draw so that the first fall is seen.

    Args:
        ends: for each agent the number of steps of its episode.
        fell: whether it ended before the time limit.
        max_frames: the most steps to return.
        most_apart: the most steps between two frames; with more, the motion cannot be followed.

    Returns:
        Steps, rising, evenly spaced. Without a fall they begin at 0; with one, about a quarter of them follow it.

    >>> frame_steps([1000, 10], [False, True], 5)
    [0, 4, 8, 12, 16]
    >>> frame_steps([1000, 1000], [False, False], 4)
    [0, 4, 8, 12]
    """
    falls = [end for end, down in zip(ends, fell, strict=True) if down]
    if not falls:
        apart = max(1, min(most_apart, -(-max(ends) // max_frames)))
        return list(range(0, max(ends) + 1, apart))[:max_frames]
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


def _draw(place: Path, platform: str | None, timeout: float) -> SideBySide:
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
            None, f"{why}the process that draws it ended {how} while {_stage(place)}.{_advice() if opengl else ''}"
        )
    if result.get("opengl") and (os.environ.get("MUJOCO_GL") or "").lower() in _OFF:
        return SideBySide(None, f"{why}MUJOCO_GL={os.environ['MUJOCO_GL']} switches OpenGL off.")
    if "error" in result:
        stage = "starting OpenGL" if result["opengl"] else _stage(place)
        return SideBySide(None, f"{why}{stage} failed ({result['error']}).{_advice() if result['opengl'] else ''}")
    first, second = result["lengths"], result["returns"]
    return SideBySide(
        place / "video.mp4", "", result["frames"], (first[0], first[1]), (float(second[0]), float(second[1]))
    )


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
