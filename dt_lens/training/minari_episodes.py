"""What a Minari data set holds: its episodes as flat arrays, each checked, and the environments that it names."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
from jaxtyping import Float32

from dt_lens.decision_transformer.environment_wrappers import describe_environment
from dt_lens.decision_transformer.state_vector import is_text, leaves, ordered
from dt_lens.errors import DtLensError, as_written, because, nearest

__all__ = ["FlatEpisode", "environments_of", "flat_episodes", "open_dataset", "require_dataset_id", "texts_in"]

CONNECT, PAUSE = 10.0, 1.0  # seconds: for the hub to answer, and between two attempts to reach it


class FlatEpisode(NamedTuple):
    """The ``n`` steps of one episode."""

    states: Float32[np.ndarray, "n state_dim"]
    actions: Float32[np.ndarray, "n act_dim"]  # one-hot if actions are discrete
    rewards: Float32[np.ndarray, " n"]


def open_dataset(dataset_id: str) -> Any:
    """The Minari data set, downloaded if it is not stored locally.

    No code that a data set names is run. For one that lacks a space, Minari would make the environment that its
    metadata describe, with an entry point and arguments that may be any function and command; such a set is refused.

    Raises:
        DtLensError: if it is neither local nor downloadable, or stored locally and damaged or without its spaces.
    """
    import minari
    from minari.dataset.minari_storage import MinariStorage
    from minari.storage import hosting
    from minari.storage.datasets_root_dir import get_dataset_path

    here: Path | None = None
    try:
        folder = Path(get_dataset_path(dataset_id))
        if not (folder / "data").exists():
            require_dataset_id(dataset_id)
            with _quietly():
                _require_connection(dataset_id)
                hosting.download_dataset(dataset_id)  # reads the metadata, and makes nothing of them
        here = folder
        metadata = MinariStorage.read_raw_metadata(folder / "data")
        lacking = [name for name in ("observation_space", "action_space") if not isinstance(metadata.get(name), str)]
        if lacking:
            raise ValueError(
                f"its metadata.json lacks {' and '.join(lacking)}, and dt-lens makes no environment that a file "
                "describes to find out"
            )
        return minari.load_dataset(dataset_id)
    except DtLensError:
        raise
    except Exception as error:
        if here is not None:
            raise DtLensError(
                f"The Minari data set {dataset_id!r} in {here} is damaged or of another version ({because(error)}); "
                "delete that folder, then download or record it again."
            ) from error
        raise DtLensError(
            f"The Minari data set {dataset_id!r} is not stored locally and cannot be downloaded ({because(error)}); "
            "`minari list local` and `minari list remote` list the data sets that exist."
            + nearest(dataset_id, _stored_here(_root()))
        ) from error


def _require_connection(dataset_id: str) -> None:
    """Raise ``DtLensError`` at once where the hub of the data sets cannot be reached at all.

    Minari lists what the hub has first, and the hub's library then waits 23 s in six attempts. A hub that answers
    slowly, or with an error, is left to it; so is any other place of data sets.
    """
    from huggingface_hub import constants, get_session

    if not os.getenv("MINARI_REMOTE", "hf://").startswith("hf://"):
        return
    for attempt in range(2):
        try:
            get_session().head(constants.ENDPOINT, timeout=CONNECT)
            return
        except Exception as error:
            kinds = {kind.__name__ for kind in type(error).__mro__}  # its HTTP client differs between versions
            if not kinds & {"ConnectError", "ConnectionError"} or any("Timeout" in kind for kind in kinds):
                return
            if not attempt:  # a single failure may pass
                time.sleep(PAUSE)
                continue
            raise DtLensError(
                f"The Minari data set {dataset_id!r} is not stored locally, and {constants.ENDPOINT} cannot be reached "
                f"to download it ({because(error)}); check the id and the connection."
                + nearest(dataset_id, _stored_here(_root()))
            ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out the warnings about each of six attempts to reach the hub: the error that follows says it once."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _root() -> Path:
    """Minari's folder."""
    from minari.storage.datasets_root_dir import get_dataset_path

    return Path(get_dataset_path(""))


def _stored_here(root: Path) -> list[str]:
    """The ids of the data sets in Minari's folder."""
    return [file.parents[1].relative_to(root).as_posix() for file in root.rglob("data/metadata.json")]


def require_dataset_id(dataset_id: str) -> None:
    """Raise ``DtLensError`` unless ``dataset_id`` has the form of a Minari id."""
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:  # a TypeError for an id without a version
        raise DtLensError(
            f"{dataset_id!r} is not a Minari id; write name-v0 or namespace/name-v0, of letters, digits, - and _, with "
            "at least two characters in a namespace."
        ) from error


def environments_of(dataset: Any) -> tuple[str | None, dict[str, Any] | None, dict[str, Any] | None]:
    """The environment of the data, with what it has besides its id, and the one to evaluate in, if that is another."""
    spec, evaluation = dataset.env_spec, getattr(dataset, "_eval_env_spec", None)  # Minari has no public name for it
    environment, kwargs = (None, None) if spec is None else describe_environment(spec)
    if evaluation is None:
        return environment, kwargs, None
    place, other = describe_environment(evaluation)
    return environment, kwargs, None if (place, other) == (environment, kwargs) else {"id": place, "kwargs": other}


def texts_in(dataset: Any, ignores: Sequence[str] = ()) -> dict[str, list[str]]:
    """The different texts of each part of the observations that is one, sorted, without the parts that are ignored."""
    found: dict[str, set[str]] = {}
    paths = {name: path for name, path, part in leaves(dataset.observation_space, ignores) if is_text(part)}
    for number, episode in _episodes(dataset) if paths else ():
        for name, path in paths.items():
            values = episode.observations
            try:
                for key in path:
                    values = values[key]
                found.setdefault(name, set()).update(map(str, values))
            except (KeyError, IndexError, TypeError) as error:
                raise DtLensError(
                    f"Episode {number} of the data set {dataset.id!r} has observations without {name!r}; repair the "
                    "data set or record it again."
                ) from error
    return {name: sorted(texts) for name, texts in found.items()}


def flat_episodes(
    dataset: Any, ignores: Sequence[str] = (), texts: Mapping[str, Sequence[str]] | None = None
) -> Iterator[FlatEpisode]:
    """Read and check one episode after the other.

    Observations are flattened as ``StateVector`` does; the last one, after the last action, is left out. ``ignores``
    and ``texts`` are as in ``RunFacts``. An episode whose steps go on after a termination or truncation is a warning:
    its returns-to-go run on to its last step.

    Raises:
        DtLensError: for an episode that is missing, cannot be read, or whose parts do not belong together, with its
            number.
    """
    checks = _Checks(dataset, ignores, texts or {})
    counted: Iterator[Any] = iter(
        dataset.storage.get_episode_metadata([int(number) for number in dataset.episode_indices])
    )
    for number, episode in _episodes(dataset):
        steps = None
        with suppress(Exception):  # not every version of Minari counts them
            steps = next(counted).get("total_steps")
        yield checks.flat(number, episode, steps)
    checks.warn_of_early_ends()


def _episodes(dataset: Any) -> Iterator[tuple[int, Any]]:
    """Minari's episodes with their numbers; ``DtLensError`` for one that is missing or cannot be read."""
    numbers = [int(number) for number in dataset.episode_indices]
    try:
        episodes = iter(dataset.iterate_episodes())
    except Exception as error:
        _first_unreadable(dataset, numbers, error)
    for number in numbers:
        try:
            episode = next(episodes)
        except StopIteration:
            raise DtLensError(
                f"The data set {dataset.id!r} lacks episode {number} of the {len(numbers)} that its metadata counts; "
                "download or record it again."
            ) from None
        except Exception as error:
            _unreadable(dataset, number, error)
        yield number, episode


def _first_unreadable(dataset: Any, numbers: list[int], error: Exception) -> NoReturn:
    """Arrow and Parquet open all episodes at once, so the one that cannot be opened is looked for."""
    for number in numbers:
        try:
            list(dataset.iterate_episodes([number]))
        except Exception as its:
            _unreadable(dataset, number, its)
    raise DtLensError(f"The data set {dataset.id!r} cannot be read ({because(error)}).") from error


def _unreadable(dataset: Any, number: int, error: Exception) -> NoReturn:
    said = f"{type(error).__name__}: {because(error)}"
    raise DtLensError(
        f"Episode {number} of the data set {dataset.id!r} cannot be read ({said}): a part of it is missing or damaged; "
        "download or record it again."
    ) from error


class _Checks:
    """Turns Minari's episodes into ``FlatEpisode``s, or names what is wrong with one."""

    def __init__(self, dataset: Any, ignores: Sequence[str], texts: Mapping[str, Sequence[str]]) -> None:
        self.dataset, self.ignores, self.texts = dataset, ignores, texts
        self.number = 0
        self.ended_early: list[int] = []

    def flat(self, number: int, episode: Any, counted: Any = None) -> FlatEpisode:
        """The episode, whose metadata counts ``counted`` steps, if it does."""
        self.number = number
        rewards = self._numbers(episode.rewards, "rewards")
        if rewards.ndim != 1:
            self._refuse(f"has rewards of shape {list(rewards.shape)} in place of one number a step")
        steps = len(rewards)
        if not steps:
            self._refuse("has no steps")
        if counted is not None and counted != steps:
            self._refuse(f"has {steps} rewards, and its metadata counts {counted} steps")
        for name in ("terminations", "truncations"):
            ends = np.asarray(getattr(episode, name))
            if ends.shape != (steps,):
                self._refuse(f"has {steps} rewards and {name} of shape {list(ends.shape)}")
            if ends[:-1].any() and number not in self.ended_early:
                self.ended_early.append(number)
        actions = self._flat(episode.actions, self.dataset.action_space, "actions")
        if len(actions) != steps:
            self._refuse(f"has {steps} rewards and {len(actions)} actions")
        states = self._flat(episode.observations, self.dataset.observation_space, "observations")
        if len(states) not in (steps, steps + 1):
            self._refuse(f"has {steps} rewards and {len(states)} observations, in place of {steps + 1}")
        found = FlatEpisode(states[:steps], actions, rewards)
        for name, values in found._asdict().items():
            if not np.isfinite(values).all():
                step = int(np.argwhere(~np.isfinite(values))[0, 0])
                self._refuse(f"has {name} that are not finite, first at step {step}")
        return found

    def warn_of_early_ends(self) -> None:
        if self.ended_early:
            shown, more = ", ".join(map(str, self.ended_early[:5])), len(self.ended_early) > 5
            warnings.warn(
                f"The data set {self.dataset.id!r} has episodes whose steps go on after a termination or truncation "
                f"({shown}{', ...' if more else ''}); their returns-to-go run on to the last step.",
                stacklevel=4,
            )

    def _refuse(self, what: str) -> NoReturn:
        raise DtLensError(
            f"Episode {self.number} of the data set {self.dataset.id!r} {what}; repair the data set or record it again."
        )

    def _flat(
        self, values: Any, space: gym.Space[Any], what: str, path: tuple[str, ...] = ()
    ) -> Float32[np.ndarray, "row size"]:
        if isinstance(space, gym.spaces.Box):
            rows, size = self._numbers(values, what), int(np.prod(space.shape))
            if not rows.ndim or rows.size != len(rows) * size:
                self._refuse(f"has {what} of shape {list(rows.shape[1:])} in place of {list(space.shape)}")
            return rows.reshape(len(rows), size)
        if isinstance(space, gym.spaces.Discrete):
            return self._one_hot(values, space, what)
        if isinstance(space, gym.spaces.MultiDiscrete | gym.spaces.MultiBinary):
            return self._multi_hot(values, space, what)
        if isinstance(space, gym.spaces.Dict):
            keys = [key for key in ordered(space) if self._read(space[key], path, key)]
            missing = [key for key in keys if key not in values] if isinstance(values, dict) else keys
            if missing:
                self._refuse(f"has {what} without {missing[0]!r}")
            parts = [self._flat(values[key], space[key], f"{what} {key!r}", (*path, key)) for key in keys]
            return self._joined(parts, what)
        if isinstance(space, gym.spaces.Tuple):
            if len(values) != len(space.spaces):
                self._refuse(f"has {what} of {len(values)} parts in place of {len(space.spaces)}")
            named = [(i, value, space[i]) for i, value in enumerate(values) if self._read(space[i], path, i)]
            return self._joined([self._flat(v, part, f"{what} {i}", (*path, str(i))) for i, v, part in named], what)
        if is_text(space) and (name := ".".join(path)) in self.texts:
            return self._one_hot_text(values, self.texts[name], what)
        raise DtLensError(
            f"The {what} of {self.dataset.id!r} contain {space}; only Box, Discrete, MultiDiscrete and MultiBinary can "
            "be learned from, and texts among observations."
        )

    def _read(self, space: gym.Space[Any], path: tuple[str, ...], key: Any) -> bool:
        """Whether something of this part is read: all that is in it may be ignored by name."""
        return next(leaves(space, self.ignores, (*path, str(key))), None) is not None

    def _joined(self, parts: list[np.ndarray[Any, Any]], what: str) -> Float32[np.ndarray, "row size"]:
        lengths = [len(part) for part in parts]
        if len(set(lengths)) > 1:
            self._refuse(f"has {what} whose parts have {', '.join(map(str, lengths))} rows")
        if not parts:
            raise DtLensError(f"Nothing is left of the {what} of {self.dataset.id!r}; ignore fewer of their parts.")
        return np.concatenate(parts, axis=1)

    def _multi_hot(
        self, values: Any, space: gym.spaces.MultiDiscrete | gym.spaces.MultiBinary, what: str
    ) -> Float32[np.ndarray, "row size"]:
        rows, shape = self._numbers(values, what), list(space.shape)
        if not rows.ndim or list(rows.shape[1:]) != shape:
            self._refuse(f"has {what} of shape {list(rows.shape[1:])} in place of {shape}")
        chosen = rows.reshape(len(rows), -1)
        if isinstance(space, gym.spaces.MultiBinary):
            if not np.isin(chosen, (0, 1)).all():
                self._refuse(f"has {what} that are neither 0 nor 1")
            return chosen
        columns = zip(chosen.T, np.ravel(space.nvec), np.ravel(space.start), strict=True)
        kinds = [gym.spaces.Discrete(int(n), start=int(start)) for _, n, start in columns]
        return self._joined([self._one_hot(c, kind, what) for c, kind in zip(chosen.T, kinds, strict=True)], what)

    def _one_hot_text(self, values: Any, texts: Sequence[str], what: str) -> Float32[np.ndarray, "row n"]:
        index, known = {text: i for i, text in enumerate(texts)}, np.eye(len(texts), dtype=np.float32)
        for text in values:
            if text not in index:
                self._refuse(
                    f"has {what} of {as_written(text)}, which is none of the {len(texts)} texts that are known"
                )
        rows: np.ndarray[Any, Any] = known[[index[text] for text in values]].reshape(-1, len(texts))
        return rows

    def _numbers(self, values: Any, what: str) -> Float32[np.ndarray, ...]:
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold is not finite, and refused as such
                return np.asarray(values).astype(np.float32)
        except (TypeError, ValueError) as error:
            self._refuse(f"has {what} that are not numbers ({because(error)})")

    def _one_hot(self, values: Any, space: gym.spaces.Discrete, what: str) -> Float32[np.ndarray, "row n"]:
        chosen, first, count = np.asarray(values), int(space.start), int(space.n)
        if chosen.dtype.kind not in "iufb" or chosen.size != len(chosen):
            self._refuse(f"has {what} of shape {list(chosen.shape[1:])} in place of one class number a step")
        index = chosen.reshape(-1).astype(np.float64) - first
        wrong = ~((index >= 0) & (index < count) & (index == np.floor(index)))
        if wrong.any():
            step = int(wrong.argmax())
            self._refuse(
                f"has {what} of {chosen.reshape(-1)[step]} at step {step}; its classes are {first} to "
                f"{first + count - 1}"
            )
        rows: np.ndarray[Any, Any] = np.eye(count, dtype=np.float32)
        return rows[index.astype(np.int64)]
