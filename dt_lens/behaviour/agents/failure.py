"""What counts as failing in an environment: what the user says, what the model's facts say, or a guess by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from dt_lens.arguments import is_finite_number
from dt_lens.behaviour.terms import FailureRule
from dt_lens.errors import DtLensError, nearest
from dt_lens.lens.environment_names import same_environment

if TYPE_CHECKING:
    from dt_lens.decision_transformer.facts import RunFacts

__all__ = ["FAILURES", "check_rule", "guess_note", "guess_rule", "known_rule"]

FAILURES = {"terminated": "ended before the time limit", "truncated": "not ended within the time limit"}

# These environments end an episode when the goal is reached; running out of time is the failure.
_ENDS_IN_SUCCESS = ("MountainCar", "Acrobot", "PointMaze", "AntMaze", "Taxi", "CliffWalking")
# These may end with the goal, with a collision or with the wrong object; only the goal pays, 0.1 or more.
_PAYS_FOR_SUCCESS = ("MiniGrid", "BabyAI")
_PAID = 0.05
# These end every episode, and pay at its end: a goal 1 and a hole nothing; a hand won 1 or more, a tie 0, one lost -1.
_PAYS_AT_THE_END = {"FrozenLake": _PAID, "Blackjack": 0.0}


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
    >>> guess_rule("Taxi-v4"), guess_rule("FrozenLake8x8-v1")
    ('truncated', 0.05)
    """
    name = environment.rpartition(":")[2].rpartition("/")[2]
    if name.startswith(_PAYS_FOR_SUCCESS):
        return _PAID
    for start, least in _PAYS_AT_THE_END.items():
        if name.startswith(start):
            return least
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
        "or a function of the frame." + nearest(failure, ("terminated", "truncated"))
    )


def guess_note(environment: str) -> str:
    """What to say where the rule is a guess."""
    return (
        f"what counts as failing in {environment} is not known, and this is a guess; say it with "
        "failure= (--failure): terminated, truncated or a return to fall below, or in dt_lens.json"
    )
