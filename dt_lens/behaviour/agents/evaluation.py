"""The result of ``evaluate`` for an agent: an ``Evaluation`` whose units are episodes, with their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dt_lens.behaviour.agents.environment import ScoreReference, score_reference
from dt_lens.behaviour.agents.failure import FAILURES, check_rule, guess_note, guess_rule
from dt_lens.behaviour.agents.rollouts import Outcome
from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.printing import span
from dt_lens.behaviour.terms import FailureRule, Measure, Terms
from dt_lens.decision_transformer.environment_wrappers import environment_in_words
from dt_lens.errors import DtLensError
from dt_lens.lens.environment_names import FileKeywords

__all__ = ["AgentEvaluation", "terms_of_episodes"]

MEASURES: dict[str, Measure] = {"return": "real", "length": "integer", "terminated": "boolean", "truncated": "boolean"}


def terms_of_episodes(
    environment: str,
    target_return: float,
    time_limit: int,
    environment_kwargs: Mapping[str, Any] | None = None,
    failure: FailureRule | None = None,
    *,
    guessed: bool = False,
    deterministic: bool = True,
    **more: Any,
) -> Terms:
    """The terms of episodes in an environment; ``failure`` is guessed by its name if it is ``None``.

    Args:
        environment: its id.
        target_return: what the agent is asked for, in the environment's units.
        time_limit: steps after which an episode is cut.
        environment_kwargs: of ``gymnasium.make``.
        failure: what counts as failing: ``"terminated"`` (falling: the environment ended the episode before the time
            limit), ``"truncated"`` (a goal not reached in time), a number (a return below it), or a function of
            ``to_frame()`` that gives a truth value per row. The guess is ``"truncated"`` where environments of that
            name end in success, such as MountainCar and Taxi; 0.05 for MiniGrid's and FrozenLake, where reaching the
            goal pays 0.1 or more and nothing else pays; 0 for Blackjack; ``"terminated"`` for any other.
        guessed: whether ``failure`` itself is such a guess.
        deterministic: whether discrete actions are the largest logit, or sampled.
        more: other fields of ``Terms``; ``measures`` are added to an episode's own.
    """
    if failure is None:
        failure, guessed = guess_rule(environment), True
    measures = MEASURES | more.pop("measures", {})
    own: dict[str, Any] = {"task": "episodes", "outcome": "return", "better": "more"}
    return Terms(
        **{**own, **more},
        measures=measures,
        unit="episode",
        index="seed",
        setting={
            "environment": environment,
            "environment_kwargs": {} if environment_kwargs is None else environment_kwargs,
            "target_return": target_return,
            "time_limit": time_limit,
            **({} if deterministic else {"actions": "sampled"}),  # older files do not say it
        },
        titles={
            "environment_kwargs": "environment_kwargs",
            **({} if deterministic else {"actions": "choice of actions"}),
        },
        place=f"{environment}, target return {target_return:g}{'' if deterministic else ', actions sampled'}",
        actor="agent",
        failures=FAILURES,
        failure=check_rule(failure),
        failure_note=guess_note(environment) if guessed else "",
        lasts=("length", "terminated"),
        limit=time_limit,
    )


@dataclass(frozen=True, eq=False, repr=False)
class AgentEvaluation(Evaluation):
    """Episodes of one model, in one environment, at one target return; one episode is one unit of evidence.

    Episode ``i`` began with ``env.reset(seed=seeds[i])``. ``details`` may say ``environment_role``: ``"training"`` or
    ``"evaluation"``, where the model's facts know an environment for each.
    """

    @classmethod
    def from_outcomes(
        cls,
        outcomes: Iterable[Outcome],
        *,
        environment: str,
        target_return: float,
        time_limit: int,
        environment_kwargs: Mapping[str, Any] | None = None,
        failure: FailureRule | None = None,
        failure_guessed: bool = False,
        environment_role: str = "",
        **about: Any,
    ) -> Self:
        """Collect outcomes, given in any order; ``about`` are other attributes. ``failure`` may be guessed."""
        terms = terms_of_episodes(
            environment, target_return, time_limit, environment_kwargs, failure, guessed=failure_guessed
        )
        return cls.of_outcomes(terms, outcomes, details={"environment_role": environment_role}, **about)

    @classmethod
    def of_outcomes(cls, terms: Terms, outcomes: Iterable[Outcome], **about: Any) -> Self:
        """Collect outcomes under terms that are known."""
        rows = [(outcome.seed, *outcome.measures) for outcome in sorted(outcomes)]
        seeds, *columns = zip(*rows, strict=True)
        named = dict(zip(terms.measures, (np.asarray(column) for column in columns), strict=True))
        return cls(terms, np.asarray(seeds, dtype=np.int64), named, **about)

    @property
    def seeds(self) -> NDArray[np.int64]:
        """``[n]``, ascending."""
        return self.units

    @property
    def returns(self) -> NDArray[np.float64]:
        """``[n]``, undiscounted, in the environment's units."""
        return np.asarray(self.columns["return"])

    @property
    def terminated(self) -> NDArray[np.bool_]:
        """``[n]``, the environment ended the episode."""
        return np.asarray(self.columns["terminated"])

    @property
    def truncated(self) -> NDArray[np.bool_]:
        """``[n]``, the time limit cut it."""
        return np.asarray(self.columns["truncated"])

    @property
    def environment(self) -> str:
        """Its id."""
        return str(self.terms.setting["environment"])

    @property
    def environment_kwargs(self) -> Mapping[str, Any]:
        """Of ``gymnasium.make``."""
        found: Mapping[str, Any] = self.terms.setting["environment_kwargs"]
        return found

    @property
    def environment_role(self) -> str:
        """``"training"`` or ``"evaluation"``, where the model's facts know both; else empty."""
        return str(self.details.get("environment_role", ""))

    @property
    def target_return(self) -> float:
        """What the agent was asked for, in the environment's units."""
        return float(self.terms.setting["target_return"])

    @property
    def time_limit(self) -> int:
        """Steps after which an episode was cut."""
        return int(self.terms.setting["time_limit"])

    @property
    def deterministic(self) -> bool:
        """Whether discrete actions were the largest logit; else they were sampled, by the episode's seed."""
        return "actions" not in self.terms.setting

    @property
    def failure(self) -> Any:
        """What counts as failing."""
        return self.terms.failure

    @property
    def failure_rule(self) -> str:
        """The rule ``failure`` in words."""
        return self.terms.failure_rule

    @property
    def failure_note(self) -> str:
        """What to do if the rule is a guess; empty if it is not."""
        return self.terms.failure_note

    @property
    def failure_guessed(self) -> bool:
        """Whether the rule is a guess."""
        return bool(self.terms.failure_note)

    @property
    def reference(self) -> ScoreReference | None:
        """The D4RL reference returns of this environment, ``None`` where D4RL defines none."""
        return score_reference(self.environment)

    @cached_property
    def scores(self) -> NDArray[np.float64] | None:
        """``[n]`` D4RL-normalised returns, ``None`` where D4RL defines none for this environment."""
        return None if self.reference is None else self.reference.score(self.returns)

    def to_frame(self) -> pd.DataFrame:
        """A row per episode: seed, return, length, terminated, truncated, and score where D4RL defines one."""
        frame = super().to_frame()
        return frame if self.scores is None else frame.assign(score=self.scores)

    def summary(self, *, confidence: float = 0.95, seed: int = 0) -> dict[str, Any]:
        """As ``Evaluation.summary``; where D4RL defines a score also ``score`` (its mean) and ``score_interval``."""
        result = super().summary(confidence=confidence, seed=seed)
        if self.reference is not None and self.terms.outcome == "return":
            score = self.reference.score
            result["score"] = float(score(np.array(self.mean)))
            result["score_interval"] = tuple(float(s) for s in score(np.array(result["mean_interval"])))
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``to_dict``, to the last bit; a failure function that was left out becomes the default rule.

        Files of dt-lens 0.3 and before, which do not hold the task's terms, are read too.

        Raises:
            DtLensError: for a value that is missing or of the wrong kind.
        """
        if "task" not in values:
            return cls._from_old(values)
        found = super().from_dict(values)
        terms = found.terms
        try:
            setting = {**terms.setting, "environment_kwargs": FileKeywords(terms.setting["environment_kwargs"])}
            failure = terms.failure
            if failure is None:
                terms = replace(terms, failure=guess_rule(str(setting["environment"])))
        except (KeyError, TypeError, ValueError) as error:
            raise DtLensError(f"These are not the values of an evaluation's to_dict: {error!r}.") from error
        return found.with_terms(replace(terms, setting=setting))

    @classmethod
    def _from_old(cls, values: Mapping[str, Any]) -> Self:
        names = ("environment", "target_return", "time_limit", "model_id", "failure")
        try:
            columns = (values["per_episode"][name] for name in ("seed", "return", "length", "terminated", "truncated"))
            return cls.from_outcomes(
                [Outcome(*row) for row in zip(*columns, strict=True)],
                edits=tuple(values["edits"]),
                notes=tuple(values.get("notes", ())),
                failure_guessed=bool(values.get("failure_guessed", False)),
                **{name: values[name] for name in names},
                environment_kwargs=FileKeywords(values["environment_kwargs"]),
                environment_role=str(values.get("environment_role", "")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DtLensError(f"These are not the values of an evaluation's to_dict: {error!r}.") from error

    def _rows(self) -> list[tuple[str, str]]:
        role, made = self.environment_role, environment_in_words(self.environment_kwargs)
        place = " with ".join(part for part in (f"the {role} environment" if role else "", made) if part)
        return [*([("environment", place)] if place else []), *super()._rows()]

    def more_rows(self, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        if "score" not in summary:
            return []
        return [("D4RL-normalised score", f"{summary['score']:.1f}  {span(summary['score_interval'])}")]
