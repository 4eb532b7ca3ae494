"""Environments whose dynamics are a table: every state, every action's outcome, and which actions are optimal.

Gymnasium's toy-text environments have such a table, ``env.unwrapped.P[state][action]``, a list of (probability, next
state, reward, terminated).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from gymnasium import spaces
from jaxtyping import Bool, Float64, Int64

from dt_lens.errors import DtLensError

__all__ = ["Tabular"]

DISCOUNT = 0.99
EXACT = 1e-10  # the largest error of a value, in the reward's unit
MOST = 100_000  # sweeps over all states
TIED = 1e-7  # values of actions that are closer than this are equal


@dataclass(frozen=True)
class Tabular:
    """The dynamics of an environment with discrete states and actions: ``n`` states, ``m`` actions, ``k`` outcomes.

    An action in a state has up to ``k`` outcomes; those that it does not have are of probability 0.

    Attributes:
        probability: of each outcome.
        following: the state that it leads to.
        reward: what it pays.
        ends: whether it ends the episode.
        initial: the probability of beginning in each state.
    """

    probability: Float64[np.ndarray, "n m k"]
    following: Int64[np.ndarray, "n m k"]
    reward: Float64[np.ndarray, "n m k"]
    ends: Bool[np.ndarray, "n m k"]
    initial: Float64[np.ndarray, " n"]

    @classmethod
    def of(cls, env: Any) -> Self | None:
        """The table of a Gymnasium environment; ``None`` for one that has none.

        Raises:
            DtLensError: for a table that is not one of (probability, state, reward, terminated) for its own spaces.
        """
        bare = env.unwrapped
        table, states, actions = getattr(bare, "P", None), env.observation_space, env.action_space
        if not (table and isinstance(states, spaces.Discrete) and isinstance(actions, spaces.Discrete)):
            return None
        n, m = int(states.n), int(actions.n)
        try:
            listed = [[table[state][action] for action in range(m)] for state in range(n)]
            k = max(len(outcomes) for row in listed for outcomes in row)
            found = np.zeros((4, n, m, k))
            for state, row in enumerate(listed):
                for action, outcomes in enumerate(row):
                    found[:, state, action, : len(outcomes)] = np.array(outcomes, dtype=np.float64).T
            following = found[1].astype(np.int64)
            initial = np.asarray(getattr(bare, "initial_state_distrib", np.full(n, 1 / n)), dtype=np.float64)
            sound = following.min() >= 0 and following.max() < n and np.allclose(found[0].sum(2), 1)
            sound = sound and np.isfinite(found).all() and initial.shape == (n,)
        except (KeyError, IndexError, TypeError, ValueError):
            sound = False
        if not sound:
            name = type(bare).__name__
            raise DtLensError(
                f"The table of dynamics of {name} (its attribute P) does not give (probability, next state, reward, "
                f"terminated) for each of its {n} states and {m} actions; mend it."
            )
        return cls(found[0], following, found[2], found[3] > 0, initial)

    def action_values(self, discount: float = DISCOUNT) -> Float64[np.ndarray, "n m"]:
        """The optimal value of every action in every state, by value iteration (Sutton and Barto, 2018, section 4.4).

        Args:
            discount: between 0 and 1. At 1 the iteration may not end: then it is an error.

        Raises:
            DtLensError: if the values do not converge.
        """
        values = np.zeros(len(self.initial))
        for _ in range(MOST):
            gain = self.reward + discount * np.where(self.ends, 0.0, values[self.following])
            found = np.einsum("nmk,nmk->nm", self.probability, gain)
            best = found.max(1)
            if np.abs(best - values).max() <= EXACT * (1 - discount if discount < 1 else 1):
                return np.asarray(found)
            values = best
        raise DtLensError(f"Value iteration with discount={discount} did not converge; give a smaller discount.")

    def optimal_actions(self, discount: float = DISCOUNT) -> Bool[np.ndarray, "n m"]:
        """Which actions are optimal in each state; several where they are equally good."""
        values = self.action_values(discount)
        return np.asarray(values >= values.max(1, keepdims=True) - TIED)

    @property
    def reachable(self) -> Bool[np.ndarray, " n"]:
        """The states in which an episode can be and act: those that some actions lead to from a first state."""
        seen = self.initial > 0
        while True:
            can = (self.probability > 0) & ~self.ends & seen[:, None, None]
            new = seen.copy()
            new[self.following[can]] = True
            if (new == seen).all():
                return np.asarray(seen)
            seen = new
