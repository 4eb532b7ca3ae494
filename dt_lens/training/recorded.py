"""What every recording does with its episodes: play them in chunks that an interruption keeps, and store them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from dt_lens.arguments import atomic_write
from dt_lens.errors import unwritable
from dt_lens.training.expert import in_order

__all__ = ["RecordedEpisode", "in_chunks", "store"]

Job = TypeVar("Job")


class RecordedEpisode(Protocol):
    """An episode of ``T`` steps."""

    @property
    def observations(self) -> Any:
        """``[T + 1, ...]``, or such an array by name."""

    @property
    def actions(self) -> np.ndarray[Any, Any]: ...

    @property
    def rewards(self) -> np.ndarray[Any, Any]: ...

    @property
    def terminated(self) -> bool: ...


Played = TypeVar("Played", bound=RecordedEpisode)


def in_chunks(
    jobs: list[Job],
    play: Callable[[Job], Played],
    workers: int,
    size: int,
    *,
    recipe: Mapping[str, Any],
    kept: Path,
    file: Callable[[int], Path],
    stale: Iterable[Path],
    read: Callable[[Path], list[Played] | None],
    write: Callable[[Path, list[Played]], None],
    told: Callable[[int, Played], None],
) -> list[Played]:
    """Play all jobs in order; files of ``size`` episodes that exist already are read instead.

    Args:
        jobs: what is played.
        play: a pure function of a job.
        workers: number of processes.
        size: how many episodes a file holds.
        recipe: JSON values, of which the files are; ``kept`` holds it, and under another one ``stale`` is deleted.
        kept: the file of the recipe.
        file: a chunk's file, by the number of its first episode.
        stale: the files of a recipe that was changed.
        read, write: of a file; ``read`` gives ``None`` for one that does not exist or is damaged.
        told: called after every episode with the number of those that are done.
    """
    if not _holds(kept, recipe):
        for old in stale:
            old.unlink()
    with atomic_write(kept) as part:
        part.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    episodes: list[Played] = []
    with in_order(play, workers) as play_all:
        for first in range(0, len(jobs), size):
            chunk = read(file(first))
            if chunk is None:
                chunk = []
                for episode in play_all(jobs[first : first + size]):
                    chunk.append(episode)
                    told(len(episodes) + len(chunk), episode)
                write(file(first), chunk)
            episodes += chunk
    return episodes


def _holds(file: Path, recipe: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")) == json.loads(json.dumps(recipe)))
    except (OSError, ValueError):
        return False


def store(episodes: Iterable[RecordedEpisode], dataset_id: str, **about: Any) -> None:
    """Store episodes with Minari; a data set that cannot be finished is deleted.

    Args:
        episodes: in order.
        dataset_id: the Minari id.
        about: what else ``minari.create_dataset_from_buffers`` takes: ``env``, ``description`` and so on.

    Raises:
        DtLensError: if it cannot be written.
    """
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer
    from minari.storage.datasets_root_dir import get_dataset_path

    buffers = []
    for index, episode in enumerate(episodes):
        last = np.arange(1, len(episode.rewards) + 1) == len(episode.rewards)
        buffers.append(
            EpisodeBuffer(
                id=index,
                observations=episode.observations,
                actions=episode.actions,
                rewards=episode.rewards.tolist(),
                terminations=(last & episode.terminated).tolist(),
                truncations=(last & (not episode.terminated)).tolist(),
            )
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about missing authors, e-mail and links
            minari.create_dataset_from_buffers(dataset_id, buffers, **about)
    except BaseException as error:
        shutil.rmtree(get_dataset_path(dataset_id), ignore_errors=True)
        if isinstance(error, OSError):
            raise unwritable(f"The data set {dataset_id!r}", error) from error
        raise
