"""``Arm``: what the edits in force make of an agent: its weights without them, and their low-rank changes.

All arms of an evaluation or a sweep act with one copy of the unedited weights, each with its own changes; see
``dt_lens.decision_transformer.changes``. The edited weight is not used, so that nothing is lost to its rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from dt_lens.behaviour.agents.packed_arms import packed
from dt_lens.decision_transformer.changes import Change
from dt_lens.decision_transformer.policy import acting_shapes
from dt_lens.edits.edit import Edit, edited_weight
from dt_lens.edits.state import unedited, unsuspended
from dt_lens.lens.weights import memory_of, weight_bytes

if TYPE_CHECKING:
    from dt_lens.decision_transformer.model import HookedDecisionTransformer

__all__ = ["Arm", "acting_weights", "arm_of", "packed_arm"]


class Arm(NamedTuple):
    """An agent as it is now.

    Attributes:
        weights: the weights that acting takes, by name, without the edits in force.
        changes: the edits' changes, in an order that does not depend on when they came.
        own: weights that were written while an edit of them was in force, and are not what the edits make of them:
            whole, in place of those in ``weights``. Empty otherwise.
    """

    weights: Mapping[str, Tensor]
    changes: tuple[Change, ...] = ()
    own: Mapping[str, Tensor] = {}


def acting_weights(model: HookedDecisionTransformer) -> dict[str, Tensor]:
    """The live weights that acting takes, by name."""
    weights = model.weights
    return {name: weights[name] for name in acting_shapes(model.cfg) if name in weights}


def arm_of(model: HookedDecisionTransformer) -> Arm:
    """What the edits in force make of ``model``. Edits that are suspended are not in force."""
    live = acting_weights(model)
    # Others, of a kind of the user's own, have written into the weights what they change.
    edits = [edit for edit in unsuspended(model) if isinstance(edit, Edit)]
    if not edits:
        return Arm(live)
    bare = unedited(model).weights
    changes, own = list[Change](), dict[str, Tensor]()
    for name, weight in live.items():
        if weight_bytes(weight) == weight_bytes(bare[name]):
            continue
        # Layers may share a weight: an edit under one name is then in force under the other too.
        of_it = [edit for edit in edits if memory_of(model.weights[edit._weight]) == memory_of(weight)]
        if of_it and weight_bytes(edited_weight(model, of_it[0]._weight)) == weight_bytes(weight):
            changes += [_change(edit, name) for edit in of_it]
        else:
            own[name] = weight.detach().clone()
    ordered = sorted(changes, key=lambda c: (c.weight, -1 if c.head is None else c.head, *map(weight_bytes, c[2:])))
    return Arm({name: bare[name] for name in live}, tuple(ordered), own)


def _change(edit: Edit, name: str) -> Change:
    """An edit's change of the weight ``name``, as ``x @ W`` reads it."""
    factor, left, right = edit._placed
    before, after = factor.pattern.split(" -> ")
    if sorted(before.split()) == sorted(after.split()) and before != after:  # the key side of QK is W_K transposed
        left, right = right.T, left.T
    return Change(name, factor.head, left.detach().cpu().contiguous(), right.detach().cpu().contiguous())


def packed_arm(arm: Arm) -> dict[str, Tensor]:
    """What an arm differs in from the unedited agent, as named tensors; see ``packed_arms``."""
    return packed(arm.changes, arm.own)
