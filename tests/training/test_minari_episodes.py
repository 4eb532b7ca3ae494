"""A damaged or malformed Minari data set is one sentence that names the episode, before anything is trained."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from minari.data_collector.episode_buffer import EpisodeBuffer

from dt_lens.errors import DtLensError
from dt_lens.training.dataset import read

ID = "test/whole-v0"
SPACES = {
    "observation_space": gym.spaces.Dict({"box": gym.spaces.Box(-9, 9, (2,)), "kind": gym.spaces.Discrete(3, start=1)}),
    "action_space": gym.spaces.Discrete(3, start=2),
}


def _store(dataset_id: str, **options: Any) -> None:
    """Three episodes of four steps."""
    buffers = [
        EpisodeBuffer(
            id=number,
            observations={"box": np.full((5, 2), number, np.float32), "kind": np.array([1, 2, 3, 1, 2])},
            actions=np.array([2, 3, 4, 2]),
            rewards=[1.0, 0.0, 0.0, 1.0],
            terminations=[False] * 4,
            truncations=[False] * 3 + [True],
        )
        for number in range(3)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(dataset_id, buffers, **SPACES, **options)


@pytest.fixture(scope="module")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        _store(ID)
    return root


@pytest.fixture
def data(_whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a copy of the data set, to be damaged."""
    shutil.copytree(_whole, tmp_path / "sets")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    return tmp_path / "sets" / ID / "data"


def _replaced(names: str, change: Callable[[Any], Any], episode: int = 1) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        group = file[f"episode_{episode}"]
        for name in names.split():
            new = change(group[name][()])
            del group[name]
            group[name] = new

    return damage


def _put(index: Any, value: Any) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        values[index] = value
        return values

    return change


MALFORMED: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "actions too few": (_replaced("actions", lambda a: a[:3]), "Episode 1 .* has 4 rewards and 3 actions"),
    "actions too many": (_replaced("actions", lambda a: np.append(a, 2)), "Episode 1 .* has 4 rewards and 5 actions"),
    "observations too few": (
        _replaced("observations/box observations/kind", lambda a: a[:3]),
        "Episode 1 .* has 4 rewards and 3 observations, in place of 5",
    ),
    "rewards too few": (_replaced("rewards", lambda a: a[:3]), "Episode 1 .* 3 rewards, and its metadata counts 4"),
    "terminations too few": (
        _replaced("terminations", lambda a: a[:2]),
        r"Episode 1 .* has 4 rewards and terminations of shape \[2\]",
    ),
    "truncations too many": (
        _replaced("truncations", lambda a: np.append(a, False)),
        r"Episode 1 .* truncations of shape \[5\]",
    ),
    "parts of two lengths": (
        _replaced("observations/kind", lambda a: a[:4]),
        "Episode 1 .* has observations whose parts have 5, 4 rows",
    ),
    "a class below start": (
        _replaced("actions", _put(2, 1)),
        "Episode 1 .* has actions of 1 at step 2; its classes are 2 to 4",
    ),
    "a class above the last": (
        _replaced("observations/kind", _put(3, 4)),
        r"Episode 1 .* has observations 'kind' of 4 at step 3; its classes are 1 to 3",
    ),
    "half a class": (
        _replaced("actions", lambda a: a + 0.5),
        r"Episode 1 .* has actions of 2\.5 at step 0; its classes are 2 to 4",
    ),
    "states of another size": (
        _replaced("observations/box", lambda a: np.repeat(a, 2, 1)),
        r"Episode 1 .* has observations 'box' of shape \[4\] in place of \[2\]",
    ),
    "NaN among states": (
        _replaced("observations/box", _put((2, 1), np.nan)),
        "Episode 1 .* has states that are not finite, first at step 2",
    ),
    "an infinite reward": (
        _replaced("rewards", _put(3, np.inf), episode=2),
        "Episode 2 .* has rewards that are not finite, first at step 3",
    ),
    "a reward that float32 cannot hold": (
        _replaced("rewards", _put(0, 1e300), episode=0),
        "Episode 0 .* has rewards that are not finite, first at step 0",
    ),
    "rewards as text": (
        _replaced("rewards", lambda _: np.array([b"one"] * 4)),
        "Episode 1 .* has rewards that are not numbers",
    ),
    "two rewards a step": (
        _replaced("rewards", lambda a: np.stack([a, a], 1)),
        r"Episode 1 .* has rewards of shape \[4, 2\] in place of one number a step",
    ),
    "no rewards": (lambda file: file["episode_1"].pop("rewards"), "Episode 1 .* cannot be read"),
    "a part is missing": (lambda file: file["episode_1/observations"].pop("kind"), "Episode 1 .* without 'kind'"),
    "an episode is missing": (lambda file: file.pop("episode_2"), "Episode 2 .* cannot be read"),
    "an episode without steps": (
        _replaced("rewards actions", lambda a: a[:0]),
        "Episode 1 .* has no steps",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_episode_is_named(data: Path, case: str) -> None:
    damage, sentence = MALFORMED[case]
    with h5py.File(data / "main_data.hdf5", "a") as file:
        damage(file)
    with pytest.raises(DtLensError, match=sentence) as caught:
        read(ID)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_damaged_and_not_absent(data: Path) -> None:
    file = data / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DtLensError, match=r"Episode 0 .* cannot be read .*download or record it again"):
        read(ID)


@pytest.mark.parametrize("text", ["{", "{}", '{"data_format": "hdf5"}', "[]"])
def test_damaged_metadata_is_damaged_and_not_absent(data: Path, text: str) -> None:
    (data / "metadata.json").write_text(text)
    with pytest.raises(DtLensError, match=f"{ID}' in .* is damaged or of another version") as caught:
        read(ID)
    assert "\n" not in str(caught.value) and "download" in str(caught.value)


@pytest.mark.parametrize("lacking", ["observation_space", "action_space", "observation_space action_space"])
@pytest.mark.parametrize("downloaded", [False, True])
def test_no_code_that_a_data_set_names_is_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str, downloaded: bool
) -> None:
    """Minari makes the environment of a set without its spaces: with any function, here one that leaves a file."""
    trace = tmp_path / "ran"
    spec = {"id": "Any-v0", "entry_point": "subprocess:call", "kwargs": {"args": ["touch", str(trace)]}}
    metadata = json.loads((data / "metadata.json").read_text())
    kept = {name: value for name, value in metadata.items() if name not in lacking.split()}
    (data / "metadata.json").write_text(
        json.dumps(kept | {"env_spec": json.dumps({**spec, "additional_wrappers": []})})
    )
    if downloaded:
        away = data.rename(tmp_path / "away")
        monkeypatch.setenv("MINARI_REMOTE", "gcp://elsewhere")
        monkeypatch.setattr("minari.storage.hosting.download_dataset", lambda _: away.rename(data))
    with pytest.raises(DtLensError) as caught:
        read(ID)
    assert data.exists() and not trace.exists()
    assert f"its metadata.json lacks {lacking.replace(' ', ' and ')}, and dt-lens makes no" in str(caught.value)


@pytest.mark.parametrize("name", ["hopper", "no version", "../x-v0", "a/x-v0"])
def test_what_is_no_id_is_not_said_to_be_away(data: Path, name: str) -> None:
    with pytest.raises(DtLensError, match=f"'{name}' is not a Minari id; write name-v0 or namespace/name-v0"):
        read(name)


def test_metadata_that_counts_more_episodes_than_there_are(data: Path) -> None:
    file = data / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"total_episodes": 5}))
    with pytest.raises(DtLensError, match=r"Episode 3 .* cannot be read"):
        read(ID)


def test_steps_after_an_end_are_a_warning(data: Path) -> None:
    with h5py.File(data / "main_data.hdf5", "a") as file:
        _replaced("terminations", _put(1, True))(file)
    with pytest.warns(UserWarning, match=r"go on after a termination or truncation \(1\); their returns-to-go"):
        assert read(ID).lengths.tolist() == [4, 4, 4]


def test_arrow_data_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    _store("test/arrow-v0", data_format="arrow")
    assert read("test/arrow-v0").lengths.tolist() == [4, 4, 4]
    shutil.rmtree(tmp_path / "test/arrow-v0/data/1")
    with pytest.raises(DtLensError, match=r"Episode 1 .* cannot be read \(FileNotFoundError"):
        read("test/arrow-v0")


NESTED = gym.spaces.Dict(
    {
        "m": gym.spaces.Text(9),
        "x": gym.spaces.Box(-9, 9, (2,)),
        "z": gym.spaces.Dict({"a": gym.spaces.Discrete(2)}),
    }
)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set with a text that is always the same, and its file."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rows = {"m": ["go"] * 3, "x": np.ones((3, 2), np.float32), "z": {"a": np.array([0, 1, 0])}}
    buffers = [
        EpisodeBuffer(number, None, None, rows, np.array([0, 1]), [0.0, 1.0], [False, True], [False] * 2)
        for number in range(3)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            "test/text-v0", buffers, observation_space=NESTED, action_space=gym.spaces.Discrete(2)
        )
    return tmp_path / "test/text-v0/data/main_data.hdf5"


def test_a_missing_text_or_episode_is_named(texts: Path) -> None:
    with h5py.File(texts, "a") as file:
        file["episode_1/observations"].pop("m")
    with pytest.raises(DtLensError, match=r"Episode 1 .* has observations without 'm'"):
        read("test/text-v0")
    with h5py.File(texts, "a") as file:
        file.pop("episode_1")
    with pytest.raises(DtLensError, match=r"Episode 1 .* cannot be read"):
        read("test/text-v0")


def test_all_of_a_nested_part_may_be_ignored_and_a_constant_text_always_is(texts: Path) -> None:
    assert read("test/text-v0", ["m", "z.a"]).states.shape == (6, 2)
    found = read("test/text-v0", ["z"])
    assert found.states.shape == (6, 2) and found.texts is None and set(found.ignores) == {"m", "z"}
    with pytest.raises(DtLensError, match="Nothing is left of the observations of"):
        read("test/text-v0", ["m", "z.a", "x"])
