"""Episodes of one agent as arrays, one entry per episode: what evaluations hold and comparisons take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dt_lens.arguments import is_finite_number
from dt_lens.errors import DtLensError
from dt_lens.lens.environment_names import same_environment
from dt_lens.statistics.outcomes import SurvivalCurve, kaplan_meier

if TYPE_CHECKING:
    from dt_lens.behaviour.agents.environment import ScoreReference
    from dt_lens.behaviour.agents.rollouts import Outcome
    from dt_lens.decision_transformer.facts import RunFacts

__all__ = ["Episodes", "FailureRule", "check_rule", "guess_rule", "known_rule"]

FailureRule = Literal["terminated", "truncated"] | float | Callable[[pd.DataFrame], Any]

# These environments end an episode when the goal is reached; running out of time is the failure.
_ENDS_IN_SUCCESS = ("MountainCar", "Acrobot", "PointMaze", "AntMaze")
# These may end with the goal, with a collision or with the wrong object; only the goal pays, 0.1 or more.
_PAYS_FOR_SUCCESS = ("MiniGrid", "BabyAI")
_PAID = 0.05
GUESSED = ("  this rule is a guess", "say terminated, truncated or a number by --failure, failure= or dt_lens.json")


@dataclass(frozen=True, eq=False)
class Episodes:
    """Episodes of one model, in one environment, at one target return; one episode is one unit of evidence.

    Attributes:
        seeds: ``[n]``, ascending; episode ``i`` began with ``env.reset(seed=seeds[i])``.
        returns: ``[n]``, undiscounted, in the environment's units.
        lengths: ``[n]``, in steps.
        terminated: ``[n]``, the environment ended the episode.
        truncated: ``[n]``, the time limit cut it.
        failure: what counts as failing: ``"terminated"`` (falling: the environment ended the episode before the time
            limit), ``"truncated"`` (a goal not reached in time), a number (a return below it), or a function of
            ``to_frame()`` that gives a truth value per row. If it is not given, it is that of the model's facts; if
            they have none, it is guessed by the environment's name: ``"truncated"`` where environments of that name end
            in success, such as MountainCar; 0.05 for MiniGrid's, where reaching the goal pays 0.1 or more and nothing
            else pays; ``"terminated"`` for any other.
        failure_guessed: whether ``failure`` is such a guess; what is printed then says so.
        environment_role: ``"training"`` or ``"evaluation"``, where the model's facts know an environment for each.
        model_id: hash of the weights and facts that ran, edits included.
        edits: records of the edits that were active.
        notes: what was assumed of the model, and whether it is half-trained, in sentences.
    """

    seeds: NDArray[np.int64]
    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    environment: str
    target_return: float
    time_limit: int
    environment_kwargs: Mapping[str, Any] = field(default_factory=dict)
    model_id: str = ""
    edits: tuple[dict[str, Any], ...] = ()
    failure: FailureRule = "terminated"
    notes: tuple[str, ...] = ()
    environment_role: str = ""
    failure_guessed: bool = False

    @classmethod
    def from_outcomes(
        cls,
        outcomes: Iterable[Outcome],
        *,
        environment: str,
        failure: FailureRule | None = None,
        failure_guessed: bool = False,
        **rest: Any,
    ) -> Self:
        """Collect outcomes, given in any order; ``rest`` are the other attributes. ``failure`` may be guessed."""
        ordered = sorted(outcomes)
        if failure is None:
            failure, failure_guessed = guess_rule(environment), True
        failure = check_rule(failure)
        return cls(
            seeds=np.array([o.seed for o in ordered], dtype=np.int64),
            returns=np.array([o.total for o in ordered], dtype=np.float64),
            lengths=np.array([o.length for o in ordered], dtype=np.int64),
            terminated=np.array([o.terminated for o in ordered], dtype=bool),
            truncated=np.array([o.truncated for o in ordered], dtype=bool),
            environment=environment,
            failure=failure,
            failure_guessed=failure_guessed,
            **rest,
        )

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def reference(self) -> ScoreReference | None:
        """The D4RL reference returns of this environment, ``None`` where D4RL defines none."""
        from dt_lens.behaviour.agents.environment import score_reference

        return score_reference(self.environment)

    @cached_property
    def scores(self) -> NDArray[np.float64] | None:
        """``[n]`` D4RL-normalised returns, ``None`` where D4RL defines none for this environment."""
        return None if self.reference is None else self.reference.score(self.returns)

    @cached_property
    def failed(self) -> NDArray[np.bool_]:
        """``[n]``, by the rule ``failure``."""
        if callable(self.failure):
            failed = np.asarray(self.failure(self.to_frame()))
            if failed.shape != self.seeds.shape:
                raise DtLensError(
                    f"The failure function gave {list(failed.shape)} values; it must give one per episode, {len(self)}."
                )
            if failed.dtype.kind not in "biuf" or not np.isin(failed, (0, 1)).all():
                raise DtLensError(
                    f"The failure function gave {failed[~np.isin(failed, (0, 1))][:1]}; it must give True or False for "
                    "each episode."
                )
            return failed.astype(bool)
        if self.failure == "terminated":
            return self.terminated
        if self.failure == "truncated":
            return self.truncated
        return self.returns < float(self.failure)

    @property
    def failure_rule(self) -> str:
        """The rule ``failure`` in words."""
        if callable(self.failure):
            return getattr(self.failure, "__name__", "a function")
        match self.failure:
            case "terminated":
                return "ended before the time limit"
            case "truncated":
                return "not ended within the time limit"
        return f"return below {float(self.failure):g}"

    @property
    def failure_note(self) -> str:
        """What to do if the rule is a guess; empty if it is not."""
        if not self.failure_guessed:
            return ""
        return (
            f"what counts as failing in {self.environment} is not known, and this is a guess; say it with "
            "failure= (--failure): terminated, truncated or a return to fall below, or in dt_lens.json"
        )

    @cached_property
    def survival(self) -> SurvivalCurve:
        """Share of episodes still running after each step; episodes cut by the time limit are censored."""
        return kaplan_meier(self.lengths, self.terminated)

    def with_failure(self, failure: FailureRule) -> Self:
        """The same episodes under another failure rule."""
        return replace(self, failure=check_rule(failure), failure_guessed=False)

    def to_frame(self) -> pd.DataFrame:
        """A row per episode: seed, return, length, terminated, truncated, and score where D4RL defines one."""
        columns: dict[str, Any] = {
            "seed": self.seeds,
            "return": self.returns,
            "length": self.lengths,
            "terminated": self.terminated,
            "truncated": self.truncated,
        }
        if self.scores is not None:
            columns["score"] = self.scores
        return pd.DataFrame(columns)


def known_rule(failure: FailureRule | None, facts: RunFacts, environment: str) -> FailureRule | None:
    """The given rule, or that of the model's facts if the environment is theirs; ``None`` if it must be guessed.

    Raises:
        DtLensError: unless ``failure`` is a rule or ``None``.
    """
    if failure is not None:
        return check_rule(failure)
    own = (facts.environment, (facts.evaluation_environment or {}).get("id"))
    known = any(same_environment(environment, name) for name in own)
    return cast("FailureRule | None", facts.failure) if known else None


def guess_rule(environment: str) -> FailureRule:
    """The failure rule that an environment's name suggests.

    >>> guess_rule("MountainCar-v0"), guess_rule("module:MiniGrid-Empty-5x5-v0"), guess_rule("Hopper-v5")
    ('truncated', 0.05, 'terminated')
    """
    name = environment.rpartition(":")[2].rpartition("/")[2]
    if name.startswith(_PAYS_FOR_SUCCESS):
        return _PAID
    return "truncated" if name.startswith(_ENDS_IN_SUCCESS) else "terminated"


def check_rule(failure: FailureRule) -> FailureRule:
    """``failure``, with a number as a ``float``, which files can keep.

    Raises:
        DtLensError: unless it is a failure rule.
    """
    if callable(failure) or (isinstance(failure, str) and failure in ("terminated", "truncated")):
        return failure
    if is_finite_number(failure):
        return float(failure)
    raise DtLensError(
        f"failure is {failure!r}; it must be 'terminated', 'truncated', a return to fall below, "
        "or a function of the frame."
    )
