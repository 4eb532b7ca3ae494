"""Minari episodes as flat arrays, and the windows that a decision transformer is trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from dt_lens.decision_transformer.state_vector import StateVector, part_names
from dt_lens.errors import DtLensError, as_written
from dt_lens.training.minari_episodes import environments_of, flat_episodes, open_dataset, texts_in

__all__ = ["Trajectories", "Windows", "read"]

MOST_TEXTS = 256  # of one part of the observations: more are a language, which one-hot numbers do not learn


@dataclass(frozen=True)
class Trajectories:
    """The episodes of a data set, concatenated: ``N`` steps of ``E`` episodes, in the environment's own units."""

    states: Float32[np.ndarray, "N state_dim"]
    actions: Float32[np.ndarray, "N act_dim"]  # one-hot if actions are discrete
    rewards: Float32[np.ndarray, " N"]
    lengths: Int64[np.ndarray, " E"]
    discrete: bool
    bounded: bool  # every action lies in [-1, 1], so a tanh can reach it
    dataset_id: str = ""
    environment: str | None = None
    environment_kwargs: dict[str, Any] | None = None
    evaluation_environment: dict[str, Any] | None = None  # {"id": ..., "kwargs": {...}}, if it is another one
    ignores: tuple[str, ...] = ()  # parts of the observations that are left out
    texts: Mapping[str, tuple[str, ...]] | None = None  # parts that are texts, one-hot among these
    as_they_are: Bool[np.ndarray, " state_dim"] | None = None  # zeros and ones, which are not normalised
    choices: tuple[int, ...] = ()  # the sizes of several choices made at once, if actions are such
    parts: tuple[str, ...] = ()  # the names of all parts of the observations, also of those left out

    def __post_init__(self) -> None:
        if not len(self.lengths) or self.lengths.min() < 1:
            raise DtLensError(
                f"The data set {self.dataset_id!r} has no episodes, or empty ones; give one to learn from."
            )
        for name in ("states", "actions", "rewards"):
            if not np.isfinite(getattr(self, name)).all():
                raise DtLensError(
                    f"The data set {self.dataset_id!r} has {name} that are not finite; remove or repair those steps."
                )

    @property
    def starts(self) -> Int64[np.ndarray, " E"]:
        """The first step of each episode."""
        starts: np.ndarray[Any, Any] = np.cumsum(self.lengths) - self.lengths
        return starts

    @property
    def returns(self) -> Float32[np.ndarray, " E"]:
        """The undiscounted return of each episode."""
        returns: np.ndarray[Any, Any] = self.returns_to_go[self.starts]
        return returns

    @property
    def returns_to_go(self) -> Float32[np.ndarray, " N"]:
        """The sum of rewards from each step, inclusive, to the end of its episode."""
        backwards = np.cumsum(self.rewards[::-1].astype(np.float64))[::-1]  # to the end of the whole data set
        ends = self.starts + self.lengths
        after = np.append(backwards, 0.0)[ends]
        returns: np.ndarray[Any, Any] = (backwards - np.repeat(after, self.lengths)).astype(np.float32)
        return returns

    @property
    def state_mean(self) -> Float32[np.ndarray, " state_dim"]:
        """The mean state over all steps; 0 for what is not normalised."""
        mean: np.ndarray[Any, Any] = self.states.mean(0, dtype=np.float64).astype(np.float32)
        return mean if self.as_they_are is None else np.where(self.as_they_are, np.float32(0), mean)

    @property
    def state_std(self) -> Float32[np.ndarray, " state_dim"]:
        """The standard deviation over all steps; 1 for a constant entry, and for what is not normalised."""
        std = self.states.std(0, dtype=np.float64)
        own = std > 1e-6 if self.as_they_are is None else (std > 1e-6) & ~self.as_they_are
        return np.where(own, std, 1.0).astype(np.float32)

    @property
    def normalised(self) -> bool:
        """Whether any entry of a state is."""
        return self.as_they_are is None or not self.as_they_are.all()

    @property
    def return_scale(self) -> float:
        """The power of ten that brings the largest return below 10: 1,000 for Hopper, as in the original code."""
        largest = float(np.abs(self.returns).max())
        return 10.0 ** math.floor(math.log10(largest)) if largest > 0 else 1.0


def read(dataset_id: str, ignores: Sequence[str] | None = None) -> Trajectories:
    """Read a Minari data set, downloading it if it is not stored locally.

    Observations may be a Box of any shape, a Discrete, a MultiDiscrete, a MultiBinary, a text, or a Dict or Tuple of
    these, flattened as by ``StateVector``. Numbers that are zeros and ones by their space, or by an image of whole
    numbers that holds no others, are not normalised. Actions may be a Box, a Discrete or a MultiDiscrete.

    Args:
        dataset_id: a Minari id.
        ignores: parts of the observations to leave out, by name, as in ``RunFacts``. Texts that are always the same
            are left out too.

    Raises:
        DtLensError: if the data set is neither local nor downloadable, has other spaces, or is damaged: an episode that
            is missing, cannot be read, or whose states, actions, rewards and terminations do not belong together is
            named by its number.
    """
    dataset = open_dataset(dataset_id)
    action_space = dataset.action_space
    choices: tuple[int, ...] = ()
    if isinstance(action_space, gym.spaces.Discrete):
        discrete, bounded = True, False
    elif isinstance(action_space, gym.spaces.MultiDiscrete):
        discrete, bounded, choices = True, False, tuple(map(int, np.ravel(action_space.nvec)))
    elif isinstance(action_space, gym.spaces.Box):
        discrete, bounded = False, bool(np.all(action_space.low >= -1) and np.all(action_space.high <= 1))
    else:
        raise DtLensError(
            f"The actions of {dataset_id!r} are {action_space}; only Box, Discrete and MultiDiscrete can be learned."
        )
    left_out, texts = _declared(dataset, ignores)
    episodes = list(flat_episodes(dataset, left_out, texts))
    if not episodes:
        raise DtLensError(f"The data set {dataset_id!r} has no episodes.")
    environment, kwargs, evaluation = environments_of(dataset)
    states = np.concatenate([episode.states for episode in episodes])
    return Trajectories(
        states,
        np.concatenate([episode.actions for episode in episodes]),
        np.concatenate([episode.rewards for episode in episodes]),
        np.array([len(episode.rewards) for episode in episodes]),
        discrete,
        bounded,
        dataset_id,
        environment,
        kwargs,
        evaluation,
        left_out,
        texts or None,
        _zeros_and_ones(StateVector.of(dataset.observation_space, left_out, texts), states),
        choices,
        tuple(part_names(dataset.observation_space)),
    )


def _declared(dataset: Any, ignores: Sequence[str] | None) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The parts of the observations to leave out, and the texts of those that are texts."""
    if isinstance(ignores, str) or not all(isinstance(name, str) for name in ignores or ()):
        raise DtLensError(f"ignores is {as_written(ignores)}; it must be a list of names, such as ['mission'].")
    found = texts_in(dataset, ignores or ())
    constant = [name for name, texts in found.items() if len(texts) == 1]
    texts = {name: tuple(some) for name, some in found.items() if name not in constant}
    for name, some in texts.items():
        if len(some) > MOST_TEXTS:
            raise DtLensError(
                f"The text {name!r} of {dataset.id!r} has {len(some):,} different values, and at most {MOST_TEXTS} are "
                f"read one-hot; leave it out with ignores=[{name!r}] (--ignores {name} on the command line)."
            )
    return (*(ignores or ()), *constant), texts


def _zeros_and_ones(vector: StateVector, states: np.ndarray[Any, Any]) -> Bool[np.ndarray, " state_dim"]:
    """Which numbers of a state say one of two things: those of discrete parts, and of images that hold no others."""
    found, end = vector.one_hot, 0
    for part in vector.parts:
        begin, end = end, end + part.size
        if isinstance(part.space, gym.spaces.Box) and np.issubdtype(part.space.dtype, np.integer):
            found[begin:end] = np.isin(states[:, begin:end], (0, 1)).all()
    return found


class Windows:
    """Batches of windows of ``context`` steps, with Hugging Face's keywords.

    As in the original code (Chen et al. 2021): an episode is drawn in proportion to its length, the window starts at
    any of its steps, and if the episode ends before the window does, the window is padded on the left, with an
    attention mask of 0. States are normalised and returns-to-go divided by the scale; padding is zeros.
    """

    def __init__(self, data: Trajectories, context: int, device: str | torch.device = "cpu") -> None:
        self.context = context
        self.device = torch.device(device)

        def put(array: np.ndarray[Any, Any]) -> Tensor:
            return torch.as_tensor(array, device=self.device)

        self._states = put((data.states - data.state_mean) / data.state_std)
        self._actions = put(data.actions)
        self._returns = put(data.returns_to_go / np.float32(data.return_scale)).unsqueeze(-1)
        self._starts, self._lengths = torch.as_tensor(data.starts), torch.as_tensor(data.lengths)
        # For each step of the data set, its episode's first step and the step after its last.
        self._first = put(np.repeat(data.starts, data.lengths))
        self._end = put(np.repeat(data.starts + data.lengths, data.lengths))

    def __len__(self) -> int:
        return len(self._states)

    def sample(self, batch_size: int, early: float = 0.0, shortened: float = 0.0) -> dict[str, Tensor]:
        """Draw ``batch_size`` windows with torch's global generator of the CPU.

        The past reveals which policy made an episode, so a model has little reason to use its target unless there is
        little past. So a share ``early`` of the windows begins within the first ``context`` steps of an episode (every
        episode equally likely), and in a share ``shortened`` all steps before a random one are masked.
        """
        # A uniform step of the whole data set draws an episode in proportion to its length.
        starts = torch.randint(len(self), (batch_size,))
        if early:
            episode = torch.randint(len(self._lengths), (batch_size,))
            within = torch.minimum(torch.randint(self.context, (batch_size,)), self._lengths[episode] - 1)
            starts = torch.where(torch.rand(batch_size) < early, self._starts[episode] + within, starts)
        batch = self.at(starts)
        if not shortened:
            return batch
        hidden = torch.randint(self.context, (batch_size,)) * (torch.rand(batch_size) < shortened)
        seen = (torch.arange(self.context) >= hidden.unsqueeze(1)).to(self.device)
        mask = batch["attention_mask"] & seen
        # A window that would lose every step keeps them all.
        mask = torch.where(mask.any(1, keepdim=True), mask, batch["attention_mask"])
        return {
            name: mask if name == "attention_mask" else value * (mask if value.ndim == 2 else mask.unsqueeze(-1))
            for name, value in batch.items()
        }

    def at(self, starts: Int64[Tensor, " batch"]) -> dict[str, Tensor]:
        """The windows that start at these steps of the data set."""
        starts = starts.to(self.device)
        first, end = self._first[starts], self._end[starts]
        padding = (starts + self.context - end).clamp(min=0)
        step = (starts - padding).unsqueeze(1) + torch.arange(self.context, device=self.device)
        mask = step >= starts.unsqueeze(1)
        step = torch.where(mask, step, starts.unsqueeze(1))
        real = mask.unsqueeze(-1)
        return {
            "states": self._states[step] * real,
            "actions": self._actions[step] * real,
            "returns_to_go": self._returns[step] * real,
            "timesteps": (step - first.unsqueeze(1)) * mask,
            "attention_mask": mask,
        }
