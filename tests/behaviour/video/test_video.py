"""Videos of two agents: drawn if OpenGL works, else one sentence, and never a crash of the calling process."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dt_lens.behaviour.video import video
from dt_lens.behaviour.video.video import SideBySide, frame_steps, side_by_side
from dt_lens.errors import DtLensError

STILL = np.zeros((60, 3), dtype=np.float32)
WILD = np.random.default_rng(0).uniform(-1, 1, (300, 3)).astype(np.float32)


@functools.cache
def opengl() -> bool:
    """Whether MuJoCo can draw here; tried in a process of its own."""
    environ = {**os.environ, "MUJOCO_GL": os.environ.get("MUJOCO_GL") or "egl"}
    code = "import mujoco; c = mujoco.GLContext(8, 8); c.make_current()"
    return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, check=False).returncode == 0


def needs_opengl() -> None:
    if not opengl():
        pytest.skip("no OpenGL library here")


def frames_of(file: Path) -> tuple[dict[str, object], np.ndarray]:
    from imageio_ffmpeg import read_frames

    reader = read_frames(str(file))
    about = next(reader)
    width, height = about["size"]
    return about, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_two_hoppers_and_the_fallen_one_stands_still(tmp_path: Path) -> None:
    needs_opengl()
    made = side_by_side(
        "Hopper-v5", STILL, WILD, seed=3, file=tmp_path / "new" / "v.mp4",
        captions=("unedited", "blocks.0.mlp.W_in · σ"), ended="fell", size=96, max_frames=16,
    )  # fmt: skip
    assert made.reason == "" and made.file == tmp_path / "new" / "v.mp4"
    assert sorted(made.file.parent.iterdir()) == [tmp_path / "new" / "v.jpg", made.file]
    assert made.poster == tmp_path / "new" / "v.jpg" and made.note == ""
    assert poster_of(made)[60:, 150:, 0].mean() > 0, "it can be read"
    about, film = frames_of(made.file)
    assert about["codec"] == "h264" and str(about["pix_fmt"]).startswith("yuv420p")
    assert len(film) == made.frames == 16
    assert film.shape[2] == 2 * 96 + 4 and film.shape[1] > 96

    left, right = film[:, :, :96].astype(int), film[:, :, 100:].astype(int)
    assert np.abs(np.diff(left[-3:], axis=0)).max() > 10, "the standing one goes on"
    inside = right[-2:, 40:110, 10:-10]
    assert np.abs(np.diff(inside, axis=0)).max() < 10, "the fallen one does not move"
    below = film[:, -4:].astype(int)  # orange below the fallen one, and only after its fall
    assert below[-1, :, 100:, 0].mean() > 150 > below[0, :, 100:, 0].mean()
    assert below[-1, :, :96, 0].mean() < 100


def test_the_replay_is_the_episode(tmp_path: Path) -> None:
    """Lengths and returns are those of the same actions in another copy of the environment."""
    needs_opengl()
    import gymnasium as gym

    made = side_by_side("Hopper-v5", STILL, WILD, seed=3, file=tmp_path / "v.mp4", size=64, max_frames=12)
    for number, actions in enumerate((STILL, WILD)):
        env = gym.make("Hopper-v5")
        env.reset(seed=3)
        total, steps = 0.0, 0
        for action in actions:
            _, reward, terminated, truncated, _ = env.step(action)
            total, steps = total + float(reward), steps + 1
            if terminated or truncated:
                break
        assert (made.lengths[number], made.returns[number]) == (steps, pytest.approx(total, abs=1e-9))


FAR = """
import gymnasium as gym
from dt_lens.behaviour.video.rendering import _make, _picture

def brown(x):
    env = _make({"spec": gym.spec("Hopper-v5"), "kwargs": {}, "size": 96})
    env.reset(seed=0)
    position = env.unwrapped.data.qpos.copy()
    position[0] = x
    env.unwrapped.set_state(position, env.unwrapped.data.qvel.copy())
    red, _, blue = _picture(env).astype(int).transpose(2, 0, 1)
    return int((red > 1.5 * blue + 20).sum())

near, far = brown(0.0), brown(50.0)
assert near > 100 and abs(near - far) < 0.2 * near, (near, far)
"""


def test_the_camera_follows_the_agent() -> None:
    """Gymnasium's default camera stays where the episode began, and an agent that runs is soon out of the picture."""
    needs_opengl()
    environ = {**os.environ, "MUJOCO_GL": os.environ.get("MUJOCO_GL") or "egl"}
    subprocess.run([sys.executable, "-c", FAR], env=environ, check=True)


LAMP = """
import gymnasium as gym
import numpy as np

class Lamp(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Discrete(2)
    action_space = gym.spaces.Discrete(2, start=5)

    def __init__(self, render_mode=None, level=0):
        self.render_mode, self.level, self.on = render_mode, level, 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.on, self.steps = 0, 0
        return 0, {}

    def step(self, action):
        assert action in (5, 6)
        self.on, self.steps = action - 5, self.steps + 1
        return self.on, float(self.on), self.steps == 4 and self.level > 0, self.steps == 20, {}

    def render(self):
        return np.full((30, 60, 3), 250 * self.on, np.uint8)
"""


@pytest.mark.parametrize("actions", [np.array([6, 5] * 6), np.eye(2, dtype=np.float32)[[1, 0] * 6]])
def test_discrete_actions_and_an_environment_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, actions: np.ndarray
) -> None:
    """The drawing process finds what this one can import, and pictures of another shape keep their proportions."""
    from gymnasium.envs.registration import EnvSpec

    (tmp_path / "lamp_environment.py").write_text(LAMP)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = EnvSpec("Lamp-v0", entry_point="lamp_environment:Lamp")
    made = side_by_side(
        spec, actions, np.full(30, 6), seed=0, file=tmp_path / "v.mp4", size=64, environment_kwargs={"level": 0}
    )
    assert made.reason == ""
    assert made.lengths == (12, 20) and made.returns == (6.0, 20.0)
    assert made.file is not None
    film = frames_of(made.file)[1]
    assert film[2, 58, 100].mean() > 200 > 100 > film[2, 58, 32].mean(), "on at the right, off at the left"
    ending = side_by_side(
        spec, actions, actions, seed=0, file=tmp_path / "v.mp4", size=64, environment_kwargs={"level": 1}
    )
    assert ending.lengths == (4, 4) and ending.file is not None
    about, film = frames_of(ending.file)
    assert about["fps"] == 4 and len(film) == ending.frames == 5 + 4, "four steps take a second, and so does their end"


def test_an_end_that_is_no_failure_is_not_in_the_colour_of_failures(tmp_path: Path) -> None:
    """FrozenLake ends at its goal and in a hole alike: down, down, right, right, down, right or right, down."""
    walks = np.array([1, 1, 2, 2, 1, 2]), np.array([2, 1])
    made = side_by_side(
        "FrozenLake-v1", *walks, seed=0, file=tmp_path / "v.mp4", size=64, failed=(False, True),
        environment_kwargs={"is_slippery": False},
    )  # fmt: skip
    assert made.lengths == (6, 2) and made.returns == (1.0, 0.0) and made.file is not None
    below = frames_of(made.file)[1][-1, -8:].astype(int)
    redness = [float(side[..., 0].mean() - side[..., 2].mean()) for side in (below[:, :64], below[:, 68:])]
    assert redness[0] < 20 and redness[1] > 80


def poster_of(made: SideBySide) -> np.ndarray:
    from PIL import Image

    assert made.poster is not None
    return np.asarray(Image.open(made.poster)).astype(int)


def test_without_opengl_an_agent_is_a_stick_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "disable")
    made = side_by_side("Hopper-v5", STILL, WILD, seed=3, file=tmp_path / "v.mp4", ended="fell", size=96, max_frames=16)
    assert made.reason == "" and made.file == tmp_path / "v.mp4" and made.frames == 16
    assert made.note == "Drawn as a stick figure: MUJOCO_GL=disable switches OpenGL off."
    film = frames_of(made.file)[1].astype(int)
    left, right = film[:, 26:-26, :96], film[:, 26:-26, 100:]
    blue = [(side[..., 2] > side[..., 0] + 60).sum(axis=(1, 2)) for side in (left, right)]
    assert min(blue[0]) > 60, "there is a figure"
    assert np.abs(np.diff(left[:4], axis=0)).max() > 60, "it moves"
    poster = poster_of(made)
    assert np.abs(poster[26:-26, :96] - poster[26:-26, 100:196]).mean() > 3, "the moment where the two part"
    assert poster[-8:, 100:196, 0].mean() > 150, "after the fall"


def test_only_agents_of_mujoco_are_stick_figures(tmp_path: Path) -> None:
    walk = np.array([1, 1, 2])
    made = side_by_side("FrozenLake-v1", walk, walk, seed=0, file=tmp_path / "v.mp4", stick=True)
    assert made.file is None and "has no bodies to draw" in made.reason


def test_a_humanoid_stays_in_the_picture_as_a_stick_figure() -> None:
    import gymnasium as gym

    from dt_lens.behaviour.video.stick_figure import stick_figure

    env = gym.make("Humanoid-v5")
    env.reset(seed=0)
    picture = stick_figure(env, 128).astype(int)
    blue = picture[..., 2] > picture[..., 0] + 60
    rows, columns = np.nonzero(blue)
    assert 200 < blue.sum() < 5000 and rows.min() > 5 and rows.max() < 123 and 5 < columns.min() < columns.max() < 123


def test_one_agent_alone_as_a_gif_for_so_many_steps(tmp_path: Path) -> None:
    from PIL import Image

    made = side_by_side("FrozenLake-v1", np.array([0, 0, 0, 0, 0, 0]), None, seed=0, file=tmp_path / "v.gif", size=64,
                        steps=4, environment_kwargs={"is_slippery": False})  # fmt: skip
    assert made.reason == "" and made.lengths == (6,) and made.returns == (0.0,)
    with Image.open(tmp_path / "v.gif") as film:
        assert film.size == (64, 64 + 52) and film.n_frames == made.frames == 5
    with pytest.raises(DtLensError, match=r"v\.avi ends in \.avi; a video is written as \.mp4 or \.gif"):
        side_by_side("FrozenLake-v1", np.array([0]), None, seed=0, file=tmp_path / "v.avi")


def test_opengl_that_cannot_start_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    made = side_by_side("Hopper-v5", STILL, WILD, seed=0, file=tmp_path / "v.mp4", size=64)
    assert made.file is not None and "starting OpenGL failed" in made.note and "unset it" in made.note
    real = side_by_side("Hopper-v5", STILL, WILD, seed=0, file=tmp_path / "w.mp4", stick=False)
    assert real.file is None and "starting OpenGL failed" in real.reason and "\n" not in real.reason


def test_the_drawing_process_has_a_time_limit(tmp_path: Path) -> None:
    made = side_by_side("Hopper-v5", STILL, WILD, seed=0, file=tmp_path / "v.mp4", timeout=0.01)
    assert made.file is None and "did not end within 0.01 seconds" in made.reason


def test_a_process_that_dies_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a broken driver: the process dies and writes nothing."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\nprintf "starting OpenGL" > "$3/stage"\nkill -SEGV $$\n')
    program.chmod(0o755)
    monkeypatch.setattr(video.sys, "executable", str(program))
    monkeypatch.setenv("MUJOCO_GL", "egl")
    made = side_by_side("Hopper-v5", STILL, WILD, seed=0, file=tmp_path / "v.mp4")
    assert made.file is None and "ended by signal SIGSEGV while starting OpenGL" in made.reason


def test_an_environment_that_cannot_be_drawn_is_a_sentence(tmp_path: Path) -> None:
    import gymnasium as gym

    class Blind(gym.Env):  # type: ignore[type-arg]
        pass

    spec = gym.envs.registration.EnvSpec("Blind-v0", entry_point=Blind)
    made = side_by_side(spec, STILL, WILD, seed=0, file=tmp_path / "v.mp4")
    assert made.file is None and made.reason.startswith("There is no video: ")


@pytest.mark.parametrize("actions", [[], [np.nan], "word", np.zeros((1, 1, 1)), [[1, 2], [3]]])
def test_actions_that_are_not_numbers_are_refused(tmp_path: Path, actions: object) -> None:
    with pytest.raises(DtLensError, match="The right agent's actions must be finite numbers"):
        side_by_side("Hopper-v5", STILL, actions, seed=0, file=tmp_path / "v.mp4")  # type: ignore[arg-type]


def test_an_unknown_environment_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(DtLensError, match=r"'Hoper-v5'.*Did you mean 'Hopper"):
        side_by_side("Hoper-v5", STILL, WILD, seed=0, file=tmp_path / "v.mp4")


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    film = tmp_path / "film.mp4"
    film.write_bytes(b"film")
    monkeypatch.setattr(video, "_draw", lambda *_: SideBySide(film, "", 1, (1, 1), (0.0, 0.0)))
    with pytest.raises(DtLensError, match="cannot be written"):
        side_by_side("Hopper-v5", STILL, WILD, seed=0, file=tmp_path / "file" / "v.mp4")


def test_importing_video_does_not_import_mujoco() -> None:
    code = "import sys, dt_lens.behaviour.video.video; sys.exit('mujoco' in sys.modules or 'gymnasium' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(
    st.lists(st.tuples(st.integers(1, 2000), st.booleans()), min_size=2, max_size=2),
    st.integers(4, 120),
)
def test_the_first_fall_is_among_the_frames(episodes: list[tuple[int, bool]], frames: int) -> None:
    ends, fell = [end for end, _ in episodes], [down for _, down in episodes]
    steps = frame_steps(ends, fell, frames)
    assert 1 <= len(steps) <= frames and steps[0] >= 0
    assert len({b - a for a, b in itertools.pairwise(steps)}) <= 1, "evenly spaced"
    if not any(fell):
        late = frame_steps(ends, fell, frames, parted=max(ends) // 2)
        assert late[0] <= max(ends) // 2 < late[-1] + 4, "the moment is among them"
    if any(fell):
        first = min(end for end, down in episodes if down)
        assert steps[0] < first <= steps[-1], "before the fall and after it"
        assert sum(step >= first for step in steps) >= frames // 4
