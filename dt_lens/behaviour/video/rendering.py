"""The process that draws a video: replays actions, draws the agents, encodes. Only ``video.py`` starts it.

``python -m dt_lens.behaviour.video.rendering FOLDER`` reads ``job.pickle`` there and leaves ``video.mp4`` or
``video.gif``, ``poster.jpg`` and ``result.json``. Its file ``stage`` says in words what it is doing, in case it dies.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dt_lens.behaviour.video.stick_figure import stick_figure
from dt_lens.behaviour.video.video import frame_steps

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

_GAP = 4  # pixels between the two pictures
_STRIP = 26  # pixels of the lines of text above and below
_FELL = (213, 94, 0)  # the colour of edits in the figures: an episode that ended in failure
_ENDED = (72, 84, 99)  # one that did not
_FEWEST = 12  # frames: fewer do not make a video
_SLOWEST = 4  # frames per second: of a few steps each must be seen
_SHORT = 4  # seconds that a short episode lasts
_PARTED = 0.25  # of the spread of what an agent observes: beyond it two agents are seen to differ
_BYTES = 1e9  # of memory that the pictures may take; the film takes as much again

Picture = npt.NDArray[np.uint8]  # [height, width, 3]


@dataclass(frozen=True)
class _Replay:
    """One agent's episode: the return after each step, ``[steps + 1]``, and whether the environment ended it.

    ``seen`` is what the agent observed, ``[steps + 1, numbers]``; no row where that is not numbers.
    """

    returns: npt.NDArray[np.float64]
    fell: bool
    seen: npt.NDArray[np.float64]

    @property
    def length(self) -> int:
        return len(self.returns) - 1


def main(place: Path) -> None:
    """Do the job in ``place``; an error is written to ``result.json``."""
    try:
        result = _video(place)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        result = {"error": (lines[0].rstrip(".") if lines else type(error).__name__)[:300], "opengl": _is_opengl(error)}
    (place / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _is_opengl(error: BaseException | None) -> bool:
    """Whether an error comes from finding or starting OpenGL, which may happen as early as MuJoCo's import."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            name = str(frame.f_globals.get("__name__"))
            if re.match(
                r"OpenGL\b|glfw\b|mujoco\.(egl|osmesa|glfw|rendering)\b|gymnasium\.envs\.mujoco\.mujoco_rend", name
            ):
                return True
        error = error.__cause__ or error.__context__
    return False


def _video(place: Path) -> dict[str, Any]:
    def doing(what: str) -> None:
        (place / "stage").write_text(what, encoding="utf-8")

    doing("reading the job")
    job = pickle.loads((place / "job.pickle").read_bytes())
    doing("making the environment")
    environments = [_make(job) for _ in job["actions"]]
    doing("replaying the actions")
    replays = [_replay(env, job["seed"], a) for env, a in zip(environments, job["actions"], strict=True)]
    draw = stick_figure if job["stick"] else _picture
    doing("drawing a stick figure" if job["stick"] else "starting OpenGL")
    for env in environments:
        env.reset(seed=job["seed"])
    draw(environments[0], job["size"])  # the first picture also sets everything up
    begin = time.monotonic()
    draw(environments[0], job["size"])
    affordable = int(job["budget"] / max(1e-4, len(replays) * (time.monotonic() - begin)))
    doing("drawing")
    longest = max(replay.length for replay in replays)
    fitting = int(_BYTES / (3 * job["size"] ** 2 * len(replays)))  # all pictures are in memory at once
    frames = min(job["max_frames"], max(_FEWEST, min(affordable, fitting)))
    if job["steps"] is not None:  # all that were asked for, from the beginning on
        apart = max(1, -(-job["steps"] // frames))
        steps = list(range(0, job["steps"] + 1, apart))
    else:
        steps = frame_steps([r.length for r in replays], [r.fell for r in replays], frames, parted=_parted(replays))
    moving = [step for step in steps if step <= longest]
    fps = min(job["fps"], max(_SLOWEST, longest // _SHORT))
    steps = moving + steps[len(moving) :][:fps]  # a second of standing still
    drawn = [
        _pictures(env, job["seed"], actions, replay, steps, job["size"], draw)
        for env, actions, replay in zip(environments, job["actions"], replays, strict=True)
    ]
    doing("encoding")
    film = [_frame(job, replays, step, [pictures[i] for pictures in drawn]) for i, step in enumerate(steps)]
    (_animate if job["kind"] == "gif" else _encode)(place / f"video.{job['kind']}", film, fps)
    _save(place / "poster.jpg", film[_telling(replays, steps, drawn)])
    doing("closing")
    return {
        "frames": len(film),
        "lengths": [r.length for r in replays],
        "returns": [float(r.returns[-1]) for r in replays],
    }


def _parted(replays: list[_Replay]) -> int | None:
    """The first step at which two agents observe clearly different things; ``None`` if they never do."""
    if len(replays) < 2:
        return None
    one, other = (replay.seen for replay in replays[:2])
    n = min(len(one), len(other))
    if n == 0 or one.shape[1:] != other.shape[1:]:
        return None
    spread = np.concatenate([one, other]).std(axis=0)
    far = np.sqrt((((one[:n] - other[:n]) / np.where(spread > 0, spread, 1.0)) ** 2).mean(axis=1)) > _PARTED
    return int(far.argmax()) if far.any() else None


def _telling(replays: list[_Replay], steps: list[int], drawn: list[list[Picture]]) -> int:
    """The frame that says most: just after the first fall, else where the pictures differ most, else the last."""
    falls = [replay.length for replay in replays if replay.fell]
    after = [i for i, step in enumerate(steps) if falls and step >= min(falls)]
    if after:
        return after[0]
    if len(drawn) < 2:
        return len(steps) - 1
    differ = [float(np.abs(a.astype(np.int16) - b).mean()) for a, b in zip(*drawn[:2], strict=True)]
    return int(np.argmax(differ))


def _make(job: dict[str, Any]) -> Any:
    import gymnasium as gym

    if job.get("stick"):
        return gym.make(job["spec"], disable_env_checker=True, **job["kwargs"])
    kwargs = {**job["kwargs"], "render_mode": "rgb_array"}
    # MuJoCo's environments draw at the given size, and by default from a camera that stays behind while the agent
    # leaves; their models have another that follows it. Other environments do not take these arguments.
    view: dict[str, int | str] = {"width": job["size"], "height": job["size"]}
    if not {"camera_name", "camera_id", "default_camera_config"} & set(kwargs):
        view["camera_name"] = "track"
    try:
        env = gym.make(job["spec"], disable_env_checker=True, **{**view, **kwargs})
    except TypeError:
        env = gym.make(job["spec"], disable_env_checker=True, **kwargs)
    quality = getattr(getattr(getattr(env.unwrapped, "model", None), "vis", None), "quality", None)
    if quality is not None:  # a software renderer spends two thirds of its time on shadows and smooth edges
        quality.shadowsize, quality.offsamples = 1024, 0
    return env


def _action(env: Any, action: npt.NDArray[Any]) -> Any:
    """A recorded action as the environment takes it."""
    from gymnasium.spaces import Discrete

    if isinstance(env.action_space, Discrete):
        return int(action) if action.ndim == 0 else int(env.action_space.start) + int(action.argmax())
    return np.asarray(action, dtype=env.action_space.dtype)


def _replay(env: Any, seed: int, actions: npt.NDArray[Any]) -> _Replay:
    """Replay an episode without drawing: its returns and how it ended."""
    first, _ = env.reset(seed=seed)
    returns, terminated, seen = [0.0], False, [_numbers(first)]
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(_action(env, action))
        returns.append(returns[-1] + float(reward))
        seen.append(_numbers(observation))
        if terminated or truncated:
            break
    same = len({len(row) for row in seen}) == 1 and len(seen[0])
    return _Replay(np.array(returns), bool(terminated), np.array(seen) if same else np.empty((0, 0)))


def _numbers(observation: Any) -> npt.NDArray[np.float64]:
    """An observation as a vector; empty where it is not numbers."""
    if isinstance(observation, dict):
        parts = [_numbers(part) for part in observation.values()]
        return np.concatenate(parts) if parts else np.empty(0)
    try:
        return np.asarray(observation, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        return np.empty(0)


def _pictures(
    env: Any,
    seed: int,
    actions: npt.NDArray[Any],
    replay: _Replay,
    steps: list[int],
    size: int,
    draw: Callable[[Any, int], Picture],
) -> list[Picture]:
    """Replay the episode again and draw it after each of ``steps``; after its end the last picture is repeated."""
    env.reset(seed=seed)
    now = 0
    out: list[Picture] = []
    for step in steps:
        moved = False
        while now < min(step, replay.length):
            env.step(_action(env, actions[now]))
            now, moved = now + 1, True
        out.append(_fitted(draw(env, size), size) if moved or not out else out[-1])
    return out


def _picture(env: Any, _size: int = 0) -> Picture:
    picture = env.render()
    if not (isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.shape[2] == 3):
        raise RuntimeError(f"{env.spec.id} cannot draw itself as an rgb array")
    return picture.astype(np.uint8)


def _fitted(picture: Picture, size: int) -> Picture:
    """The picture in a square of ``size`` pixels, its proportions kept."""
    from PIL import Image

    if picture.shape[:2] == (size, size):
        return picture
    scale = size / max(picture.shape[:2])
    small = Image.fromarray(picture).resize(
        (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))), Image.Resampling.BILINEAR
    )
    square = Image.new("RGB", (size, size), "white")
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return np.asarray(square, dtype=np.uint8)


def _frame(job: dict[str, Any], replays: list[_Replay], step: int, pictures: list[Picture]) -> Picture:
    """One frame: captions, the pictures, and below each the step and the return so far."""
    from PIL import Image, ImageDraw

    size, across = job["size"], len(pictures)
    frame = Image.new("RGB", (across * size + (across - 1) * _GAP, size + 2 * _STRIP), (24, 27, 32))
    draw = ImageDraw.Draw(frame)
    digits = 0 if all((r.returns == r.returns.round()).all() or np.abs(r.returns).max() >= 100 for r in replays) else 2
    for number, (replay, picture) in enumerate(zip(replays, pictures, strict=True)):
        x = number * (size + _GAP)
        over = replay.fell and step >= replay.length
        image = Image.fromarray(picture)
        if over:
            image = Image.blend(image, Image.new("RGB", image.size, (128, 128, 128)), 0.45)
        frame.paste(image, (x, _STRIP))
        at = min(step, replay.length)
        text = f"{job['ended']} at step {at}" if over else f"step {at}"
        if over:
            colour = _FELL if job["failed"][number] else _ENDED
            draw.rectangle((x, _STRIP, x + size - 1, _STRIP + size - 1), outline=colour, width=5)
            draw.rectangle((x, _STRIP + size, x + size - 1, size + 2 * _STRIP), fill=colour)
        _write(draw, job["captions"][number], x + size / 2, _STRIP / 2, size)
        _write(draw, f"{text} · return {replay.returns[at]:,.{digits}f}", x + size / 2, _STRIP * 1.5 + size, size)
    return np.asarray(frame, dtype=np.uint8)


def _write(draw: Any, text: str, x: float, y: float, width: int) -> None:
    """White text in the middle of a strip, as large as fits."""
    for points in range(14, 6, -1):
        font, readable = _font(points, text)
        if draw.textlength(readable, font=font) <= width - 8 or points == 7:
            draw.text((x, y), readable, font=font, fill="white", anchor="mm")
            return


def _font(points: int, text: str) -> tuple[FreeTypeFont | ImageFont, str]:
    """A font, and the text in letters that it has: Pillow's own has little more than ASCII."""
    from PIL import ImageFont

    try:
        return ImageFont.truetype("DejaVuSans.ttf", points - 1), text
    except OSError:
        swapped = text.replace("σ", "sigma").translate(str.maketrans("×–−—", "x---"))
        letters = [
            c if c == "·" else unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode() for c in swapped
        ]
        return ImageFont.load_default(points), "".join(letters)


def _encode(file: Path, film: list[Picture], fps: int) -> None:
    """H.264 in the pixel format that every browser plays, its index in front."""
    from imageio_ffmpeg import write_frames

    height, width = film[0].shape[:2]
    writer = write_frames(
        str(file),
        (width, height),
        fps=fps,
        codec="libx264",
        quality=None,
        macro_block_size=2,
        output_params=["-crf", "24", "-preset", "veryfast", "-movflags", "+faststart"],
    )
    writer.send(None)
    for picture in film:
        writer.send(np.ascontiguousarray(picture))
    writer.close()


def _animate(file: Path, film: list[Picture], fps: int) -> None:
    """A GIF that repeats. Its frames share one palette, so that colours do not flicker."""
    from PIL import Image

    images = [Image.fromarray(picture) for picture in film]
    palette = images[len(images) // 2].quantize(colors=256, dither=Image.Dither.NONE)
    first, *rest = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    first.save(file, format="GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def _save(file: Path, picture: Picture) -> None:
    from PIL import Image

    Image.fromarray(picture).save(file, format="JPEG", quality=85)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
