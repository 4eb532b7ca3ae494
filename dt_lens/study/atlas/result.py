"""What an atlas holds: a table of directions, and what it says about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.terms import Terms
from dt_lens.lens.printing import Printed, Rows, frame_html, listed

__all__ = ["Atlas"]


@dataclass(frozen=True, repr=False)
class Atlas(Printed):
    """What the removal of each direction of a model does, and what predicts it; ``write_atlas`` writes it.

    Attributes:
        directions: a row per direction that was measured.

            - ``matrix kind layer head sv block sigma energy`` (the Frobenius norm of what was removed) and, if known,
              ``output_energy`` (the root mean square of its output on real inputs).
            - the number of units and the mean outcome, under the names of the task's terms (``episodes`` and
              ``mean_return``, ``windows`` and ``mean_loss``), and ``damage``: how much worse the mean outcome is than
              the unedited model's over paired units, positive where it is worse, with its interval, ``p_value`` and
              ``q_value``; ``damage_odd`` and ``damage_even`` are the damage over units of odd and of even number
              (``nan`` with successive halving, which selects by damage). Where failing has a meaning
              ``failure_rate``, where units end ``mean_length``.
            - ``controls``: how many random changes were measured in the same place; ``control_damage``: their mean
              damage; ``controls_large``: how many of them cost more than ``large``.
            - ``beyond`` (damage beyond the controls' over the same units) with its interval and ``beyond_p_value``:
              these are about the controls that were drawn, not about random changes in general; ``beyond_odd`` and
              ``beyond_even`` are ``beyond`` over units of odd and of even number.
            - ``controls_as_costly``: how many of the controls lost at least as much as the direction, and
              ``rank_p_value``: that plus one over ``controls`` plus one, the probability of a rank as high for one
              more random change. This is about random changes in general, and needs many controls.
            - ``damage_per_energy``, ``damage_per_output_energy``.
            - for each side and embedding the absolute cosine with its best label, in columns such as
              ``"write action_out"``.
        shares: how many directions matter, for each matrix, each kind of matrix, and all: ``hurts`` counts those with
            q < 0.05, ``large`` those of them that cost more than ``Atlas.large``. Of the ``controlled`` directions
            (those with controls) ``controlled_large`` cost as much, and of their ``controls`` ``controls_large``, both
            counted over the same units and whatever their q. ``beyond`` is what the controlled directions cost beyond
            their controls on average, with an interval and ``beyond_p_value`` over directions, since each has controls
            of its own.
        correlations: for each kind of matrix and each matrix, and each side and embedding: the rank correlation of the
            cosine with ``damage``, with ``damage at equal size`` (among directions of near-equal energy, on real inputs
            if that is known), and with ``beyond`` and ``beyond at equal size`` (a large direction may cost more than an
            equally large change, and match better, because of its size alone); with interval, ``p_value``, and
            ``q_value`` over the table. ``damage_per_energy`` has no p: all damages share the noise of the unedited
            model, and divided by the energy that noise correlates with whatever correlates with the energy. Rows need
            at least five pairs.
        reliability: how well damage (``of`` is ``damage``) and damage beyond the control (``beyond``) repeat: the rank
            correlation of odd and even units (``halves``), and from it by Spearman and Brown's formula that of all
            units (``reliability``), with an interval; ``inside`` matrices, and among directions of equal size. A
            correlation with either is about the correlation with what it measures times the square root of its
            reliability.
        predictors: how well sizes predict damage, and which does better: ``sigma``, and on real inputs
            ``output_energy``; if the sweep removed activation-aware directions too, their ``sigma`` and the plain one,
            each with the damage of its own directions, over the same matrices and indices.
        weighted: as ``directions``, for the activation-aware directions that were removed; often empty.
        baseline: the unedited model.
        planned: how many plain directions the sweep has, measured or not.
        planned_controls: how many of them are to get controls; not those that successive halving stopped.
        unit: the size of the unedited model's mean outcome, of which losses are shares; ``nan`` where shares of it
            mean nothing: if that mean's interval includes 0, or the task says by itself what a large loss is.
        untrained: names of embeddings that were never trained: they should predict nothing.
        options: the sweep's.
        large: what counts as a large loss of outcome, in its own units: a tenth of ``unit``, or what the task says.
        matches: for each kind of matrix the columns of cosines that may predict damage: with the output embedding, and
            on a read side of a model whose outputs are no actions with the input embeddings as well.
        value: which edit it is of: ``"zero"``, a removal, or another value of ``SingularEdit``.
    """

    directions: pd.DataFrame
    shares: pd.DataFrame
    correlations: pd.DataFrame
    reliability: pd.DataFrame
    predictors: pd.DataFrame
    weighted: pd.DataFrame
    baseline: Evaluation
    planned: int
    planned_controls: int
    unit: float
    untrained: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    large: float = float("nan")
    matches: dict[str, list[str]] = field(default_factory=dict)
    value: str = "zero"

    @property
    def words(self) -> tuple[str, str, str]:
        """What the edit is called: "removal", "Removing", "removed"; "edit", "Editing", "edited" for other values."""
        return ("removal", "Removing", "removed") if self.value == "zero" else ("edit", "Editing", "edited")

    def _shown(self) -> tuple[str, Rows]:
        terms, table = self.baseline.terms, self.directions
        hurt = int((table["q_value"] < 0.05).sum())
        damage = f"{hurt} directions with q < 0.05; a loss of {self.large:.3g} or more counts as large"
        rows = [
            ("measured", f"{len(table)} of {self.planned} directions of {listed(table['matrix'].unique(), 3)}"),
            ("unedited", f"mean {terms.outcome_name} {self.baseline.mean:.4g} over {len(self.baseline)} {terms.units}"),
            ("damage", damage),
        ]
        return f"Atlas of {terms.place}", [
            *rows,
            ("next", "directions, shares, correlations, predictors; write_atlas(atlas, folder)"),
        ]

    def _more_html(self) -> str:
        return frame_html(self.shares, ("what", "directions", "hurts", "large", "worst", "worst_damage"))

    @property
    def terms(self) -> Terms:
        """What was measured, and the words for it."""
        return self.baseline.terms
