"""The claims, the finding on a claim, and the rule of its verdict: ``docs/court_registered.md`` as code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dt_lens.behaviour.terms import Terms
from dt_lens.errors import DtLensError

__all__ = [
    "ALPHA",
    "CLAIMS",
    "WAYS",
    "Claim",
    "Finding",
    "NotApplicable",
    "Verdict",
    "Way",
    "claims_in",
    "verdict_of",
    "why_undecided",
]

Way = Literal["proper", "note"]  # as a claim should be computed, and as the note's code computed it
Verdict = Literal["supported", "not supported", "undecided", "not applicable"]
WAYS: tuple[Way, ...] = ("proper", "note")
ALPHA = 0.05


@dataclass(frozen=True)
class Claim:
    """One claim: its number, what it says, and whether weights or behaviour decide it.

    All but the eighth are the note's.
    """

    number: int
    title: str
    words: str
    about: Literal["weights", "behaviour"]
    statistic: str


CLAIMS: tuple[Claim, ...] = (
    Claim(
        1,
        "W_in matches the action output more than W_out does",
        "Cosines are generally high with the action output for K; V shows much lower ones.",
        "weights",
        "mean over actions of the best |cosine| of any direction, W_in less W_out",
    ),
    Claim(
        2,
        "The first direction of W_in is the most common action",
        "The first singular vector seems to correspond with the most common output actions.",
        "weights",
        "|cosine| with the most common action less that with the others",
    ),
    Claim(
        3,
        "Editing W_in hurts more than editing W_out, at equal energy",
        "Editing K has a very significant effect, and the effects appear much smaller for V.",
        "behaviour",
        "share of the return lost by an edit of typical energy, W_in less W_out",
    ),
    Claim(
        4,
        "W_in and OV of the first block read the state input",
        "The state input shows in the K weights and in the OV circuit of the first block.",
        "weights",
        "mean over inputs of the best |cosine| of any direction, over chance's, less one; the smaller of W_in and OV",
    ),
    Claim(
        5,
        "The reward embedding's best match beats chance",
        "The cosine is only 0.24, which is still more than one would expect of a random vector of length 128.",
        "weights",
        "largest |cosine| with the reward input anywhere",
    ),
    Claim(
        6,
        "W_out of the first block follows time",
        "V of the first block reacts to the time embedding; there does not seem to be any structure to it.",
        "weights",
        "smoothness over time of its directions' cosines",
    ),
    Claim(
        7,
        "The cosine with actions predicts damage",
        "Where the cosine with actions is stronger, edits cause the agent to fail; elsewhere they do not.",
        "behaviour",
        "rank correlation of |cosine| with damage, inside kinds of matrices or matrices",
    ),
    Claim(
        8,
        "A direction that clusters by a factor acts where the factor matters",
        "Not a claim of the note, which asks what clusters of labels become in a discrete environment.",
        "weights",
        "mean change of the actions' probabilities where a direction's factor matters, less elsewhere",
    ),
)


def claims_in(terms: Terms | None, output: str = "action", given: str = "state") -> tuple[Claim, ...]:
    """The claims in the words of a model and its task.

    Args:
        terms: of the task: the third claim's statistic is in what it measures damage in; ``None`` for no task.
        output: what the model puts out, as the kind of its output embedding says it: ``"action"``, ``"token"``.
        given: what it is given, likewise.
    """
    several = f"{output}{'es' if output.endswith('s') else 's'}"
    claims = {claim.number: claim for claim in CLAIMS}
    claims[1] = replace(
        claims[1],
        title=f"W_in matches the {output} output more than W_out does",
        statistic=f"mean over {several} of the best |cosine| of any direction, W_in less W_out",
    )
    claims[2] = replace(
        claims[2],
        title=f"The first direction of W_in is the most common {output}",
        statistic=f"|cosine| with the most common {output} less that with the others",
    )
    claims[4] = replace(claims[4], title=f"W_in and OV of the first block read the {given} input")
    claims[7] = replace(claims[7], title=f"The cosine with {several} predicts damage")
    if terms is not None and (terms.large is not None or terms.outcome != "return"):
        share = (
            f"share of the {terms.outcome} lost"
            if terms.large is None
            else f"{terms.lost}, in {terms.scale or 'its own units'},"
        )
        claims[3] = replace(claims[3], statistic=f"{share} by an edit of typical energy, W_in less W_out")
    return tuple(claims.values())


class NotApplicable(DtLensError):
    """A claim cannot be tried on this model; the message is the reason, as it follows "not applicable: "."""


@dataclass(frozen=True)
class Finding:
    """A claim's statistic, computed one way, with what a verdict needs.

    Attributes:
        statistic: in the claim's unit.
        low, high: for weights the null's central 95 %, for behaviour the statistic's 95 % interval.
        effect: what is compared with the margin: for weights the excess over the null's mean, for behaviour the
            statistic itself.
        margin: the smallest effect of interest.
        p_value: one-sided, before Holm's correction.
        critical: for weights the null's 95 % point less its mean; ``nan`` for behaviour.
        quiet: whether the claim's control came out as it should; ``docs/court_registered.md`` calls that quiet.
        said: the sentence with the numbers.
        numbers: what else was computed.
        units: what the values of a claim about behaviour are called, such as ``"episodes"``.
    """

    statistic: float
    low: float
    high: float
    effect: float
    margin: float
    p_value: float
    critical: float = math.nan
    quiet: bool = True
    said: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    units: str = "units"


def verdict_of(about: str, found: Finding, p_value: float) -> Verdict:
    """The verdict on a claim about ``"weights"`` or ``"behaviour"``, with Holm's ``p_value``.

    >>> strong = Finding(0.5, 0.1, 0.2, effect=0.3, margin=0.1, p_value=0.001, critical=0.05)
    >>> verdict_of("weights", strong, 0.007), verdict_of("weights", strong, 0.2)
    ('supported', 'undecided')
    >>> verdict_of("behaviour", Finding(0.01, -0.01, 0.03, effect=0.01, margin=0.05, p_value=0.3), 1.0)
    'not supported'
    """
    sure = p_value < ALPHA and found.quiet
    if about == "weights":
        if found.effect >= found.margin:
            return "supported" if sure else "undecided"
        return "not supported" if found.effect < found.margin and found.critical <= found.margin else "undecided"
    if found.high < found.margin:
        return "not supported"
    return "supported" if sure and found.low > 0 else "undecided"


def why_undecided(about: str, found: Finding, p_value: float) -> str:
    """Why a claim is undecided, in one sentence."""
    if not math.isfinite(found.effect):
        return "Undecided: one of the two numbers does not vary, so the statistic is not defined."
    if about == "behaviour" and math.isnan(found.low):
        return "Undecided: there is no interval, because the values are too few or do not vary."
    reached = found.effect >= found.margin if about == "weights" else found.low > 0
    if reached and not found.quiet:
        return "Undecided: the control is not quiet."
    if reached:
        return f"Undecided: p = {p_value:.2g} after Holm's correction."
    if about == "weights":
        return (
            f"Undecided: the effect is below the margin of {found.margin:.2g}, but chance reaches {found.critical:.2g} "
            "one time in 20, so the test could have missed one of that size."
        )
    return f"Undecided at this number of {found.units} or edits: the interval includes both 0 and the margin."
