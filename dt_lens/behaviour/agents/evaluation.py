"""What ``evaluate`` found: an outcome for every episode, and what they add up to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dt_lens.behaviour.printing import html_table, span, text_table
from dt_lens.errors import DtLensError
from dt_lens.statistics.outcomes import SurvivalCurve, bootstrap_interval, iqm, kaplan_meier, wilson

if TYPE_CHECKING:
    from dt_lens.behaviour.agents.comparison import Comparison
    from dt_lens.behaviour.agents.environment import ScoreReference
    from dt_lens.behaviour.agents.rollouts import Outcome

__all__ = ["Evaluation", "FailureRule"]

FailureRule = Literal["terminated", "truncated"] | float | Callable[[pd.DataFrame], Any]

# Here the environment ends an episode when the goal is reached, and running out of time is failing.
_ENDS_IN_SUCCESS = ("MountainCar", "Acrobot", "PointMaze", "AntMaze")
# Here it may end with the goal, with a collision or with the wrong object; the goal alone pays, 0.1 or more.
_PAYS_FOR_SUCCESS = ("MiniGrid", "BabyAI")
_PAID = 0.05

_KEPT = ("environment", "environment_kwargs", "target_return", "time_limit", "model_id", "failure")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Episodes of one model, in one environment, at one target return; one episode is one unit of evidence.

    Intervals are over episodes of this one checkpoint: they say nothing about how another training run would do.

    Attributes:
        seeds: ``[n]``, ascending; episode ``i`` began with ``env.reset(seed=seeds[i])``.
        returns: ``[n]``, undiscounted, in the environment's units.
        lengths: ``[n]``, in steps.
        terminated: ``[n]``, the environment ended the episode.
        truncated: ``[n]``, the time limit cut it.
        failure: what counts as failing: ``"terminated"`` (falling: the environment ended the episode before the time
            limit), ``"truncated"`` (a goal not reached in time), a number (a return below it), or a function of
            ``to_frame()`` that gives a truth value per row. The default is ``"terminated"``; ``"truncated"`` for
            environments known to end in success, such as MountainCar; and 0.05 for MiniGrid's, where reaching the goal
            pays 0.1 or more and nothing else pays.
        model_id: hash of the weights and facts that ran, edits included.
        edits: records of the edits that were active.
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

    @classmethod
    def from_outcomes(
        cls, outcomes: Iterable[Outcome], *, environment: str, failure: FailureRule | None = None, **rest: Any
    ) -> Evaluation:
        """An evaluation of outcomes in any order; ``rest`` are the other attributes."""
        ordered = sorted(outcomes)
        if failure is None:
            name = environment.rpartition(":")[2].rpartition("/")[2]
            failure = "truncated" if name.startswith(_ENDS_IN_SUCCESS) else "terminated"
            failure = _PAID if name.startswith(_PAYS_FOR_SUCCESS) else failure
        check_rule(failure)
        return cls(
            seeds=np.array([o.seed for o in ordered], dtype=np.int64),
            returns=np.array([o.total for o in ordered], dtype=np.float64),
            lengths=np.array([o.length for o in ordered], dtype=np.int64),
            terminated=np.array([o.terminated for o in ordered], dtype=bool),
            truncated=np.array([o.truncated for o in ordered], dtype=bool),
            environment=environment,
            failure=failure,
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
        """The D4RL reference returns of this environment, where there are some."""
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
            failed = np.asarray(self.failure(self.to_frame()), dtype=bool)
            if failed.shape != self.seeds.shape:
                raise DtLensError(
                    f"The failure function gave {list(failed.shape)} values; it must give one per episode, {len(self)}."
                )
            return failed
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

    @cached_property
    def survival(self) -> SurvivalCurve:
        """Share of episodes still running after each step; episodes cut by the time limit are censored."""
        return kaplan_meier(self.lengths, self.terminated)

    def with_failure(self, failure: FailureRule) -> Evaluation:
        """The same episodes, judged by another rule."""
        check_rule(failure)
        return replace(self, failure=failure)

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

    def summary(self, *, confidence: float = 0.95, seed: int = 0) -> dict[str, Any]:
        """The numbers of the evaluation, as plain values.

        ``mean``, ``mean_interval``, ``iqm``, ``iqm_interval`` (bootstrap), ``std`` (of returns, n - 1), ``min``,
        ``max``, ``mean_length``, ``failures``, ``failure_rate``, ``failure_interval`` (Wilson), ``failure_rule``, and,
        where D4RL defines a score, ``score`` (its mean) and ``score_interval``.

        Args:
            confidence: of the intervals.
            seed: of the bootstrap.
        """
        failures, n = int(self.failed.sum()), len(self)
        interval = bootstrap_interval(self.returns, confidence=confidence, seed=seed)
        result: dict[str, Any] = {
            "environment": self.environment,
            "target_return": self.target_return,
            "episodes": n,
            "time_limit": self.time_limit,
            "mean": self.mean,
            "mean_interval": tuple(interval),
            "iqm": float(iqm(self.returns)),
            "iqm_interval": tuple(bootstrap_interval(self.returns, iqm, confidence=confidence, seed=seed)),
            "std": float(self.returns.std(ddof=1)) if n > 1 else float("nan"),
            "min": float(self.returns.min()),
            "max": float(self.returns.max()),
            "mean_length": float(self.lengths.mean()),
            "failures": failures,
            "failure_rate": failures / n,
            "failure_interval": tuple(wilson(failures, n, confidence)),
            "failure_rule": self.failure_rule,
        }
        if self.reference is not None:
            score = self.reference.score
            result["score"] = float(score(np.array(self.mean)))
            result["score_interval"] = tuple(float(s) for s in score(np.array(interval)))
        return result

    def compare(self, baseline: Evaluation, *, confidence: float = 0.95, seed: int = 0) -> Comparison:
        """This evaluation against ``baseline``, paired by seed; differences are this one's minus the baseline's.

        Raises:
            DtLensError: when the two differ in environment, target return, time limit, failure rule or seeds: then the
                difference would not be the model's.
        """
        from dt_lens.behaviour.agents.comparison import Comparison

        return Comparison.of(self, baseline, confidence=confidence, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """Provenance, ``summary()`` and the episodes, as plain JSON values; a failure function is left out."""
        return {
            "model_id": self.model_id,
            "edits": list(self.edits),
            "environment_kwargs": dict(self.environment_kwargs),
            "failure": self._plain_failure(),
            **self.summary(),
            "per_episode": {name: column.tolist() for name, column in self.to_frame().items()},
        }

    def _plain_failure(self) -> str | float | None:
        if callable(self.failure):
            return None
        return self.failure if isinstance(self.failure, str) else float(self.failure)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """The inverse of ``to_dict``, to the last bit; a failure function that was left out becomes the default rule.

        Raises:
            DtLensError: for a value that is missing or of the wrong kind.
        """
        from dt_lens.behaviour.agents.rollouts import Outcome

        try:
            columns = (values["per_episode"][name] for name in ("seed", "return", "length", "terminated", "truncated"))
            return cls.from_outcomes(
                [Outcome(*row) for row in zip(*columns, strict=True)],
                edits=tuple(values["edits"]),
                **{name: values[name] for name in _KEPT},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DtLensError(f"These are not the values of an evaluation's to_dict: {error!r}.") from error

    def _rows(self) -> list[tuple[str, str]]:
        s = self.summary()
        rows = [
            ("mean return", f"{s['mean']:.1f}  {span(s['mean_interval'])}"),
            ("interquartile mean", f"{s['iqm']:.1f}  {span(s['iqm_interval'])}"),
            ("standard deviation", f"{s['std']:.1f}"),
            ("range", f"{s['min']:.1f} to {s['max']:.1f}"),
            ("mean length", f"{s['mean_length']:.1f} of {self.time_limit} steps"),
            (
                f"failed ({self.failure_rule})",
                f"{s['failures']} of {len(self)}  {span(s['failure_interval'], percent=True)}",
            ),
        ]
        if "score" in s:
            rows.append(("D4RL-normalised score", f"{s['score']:.1f}  {span(s['score_interval'])}"))
        return rows

    def _title(self) -> str:
        edits = f", {len(self.edits)} edit{'s' * (len(self.edits) != 1)}" if self.edits else ""
        return (
            f"{self.environment}, target return {self.target_return:g}: {len(self)} episodes, "
            f"seeds {self.seeds[0]} to {self.seeds[-1]}{edits}"
        )

    def __str__(self) -> str:
        return text_table(self._title(), self._rows())

    def __repr__(self) -> str:
        return f"<Evaluation {self._title()}; mean return {self.mean:.1f}>"

    def _repr_html_(self) -> str:
        return html_table(self._title(), self._rows())


def check_rule(failure: FailureRule) -> None:
    """Raise ``DtLensError`` for what is no failure rule."""
    number = isinstance(failure, int | float | np.number) and not isinstance(failure, bool)
    if not (callable(failure) or number or (isinstance(failure, str) and failure in ("terminated", "truncated"))):
        raise DtLensError(
            f"failure is {failure!r}; it must be 'terminated', 'truncated', a return to fall below, "
            "or a function of the frame."
        )
