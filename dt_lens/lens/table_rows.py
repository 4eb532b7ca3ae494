"""Which rows of the tables of positions, timesteps and tokens a batch says anything about.

A table is read a row at a time, and a batch reads few of its rows. A certificate lists the others: nothing shows that
an adapter reads them rightly, or that the model reads them at all.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dt_lens.errors import DtLensError
from dt_lens.lens.forward_mode import evaluating

if TYPE_CHECKING:
    from dt_lens.lens.protocol import Lens

__all__ = ["counted", "hooks_of_tables", "unproven_rows"]

SMALL = 1_000_000  # numbers in the outputs of a batch


def unproven_rows(model: Lens, batch: Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, tuple[range, ...]]:
    """The rows of each table that change no output of the model on ``batch``, as ranges.

    One backward pass perturbs every row by itself: an output changes with a row if its derivative along the row is not
    zero. The stream after the last block counts as an output, so that a head of zeros hides nothing.

    Args:
        model: a wrapped model that says which rows it reads (``rows_read``).
        batch: what it is called with.
        own: its activations on this batch at ``hooks_of_tables``.

    Raises:
        DtLensError: naming a table that is not read where the model says, or none of whose rows changes an output.
    """
    reads = _reads(model, batch)
    slopes = _slopes(model, batch, [hook for hook, _ in reads.values()])
    found: dict[str, tuple[range, ...]] = {}
    for name, (hook, index) in reads.items():
        table = model.weights[name]
        index = index.to(table.device)
        looked_up = own.get(hook)
        rows = table[index] * getattr(model, "table_scale", 1.0) if name == "embed.W_E" else table[index]
        if looked_up is None or not torch.equal(rows.expand_as(looked_up), looked_up.to(table)):
            raise DtLensError(
                f"certify: {hook} does not hold the rows of {name} that this batch names; the model looks them up "
                "wrongly."
            )
        # A sum over everything that read the same row.
        total = torch.zeros(len(table), dtype=torch.float64, device=table.device)
        size = slopes[hook].abs().sum(-1).double()
        total.index_add_(0, index.expand(size.shape).flatten(), size.flatten())
        silent = (total == 0).cpu()
        # Of one or two features a LayerNorm leaves no more than a sign, so that nothing in the stream has a slope.
        if bool(silent.all()) and table.shape[1] > 2:
            raise DtLensError(
                f"certify: no row of {name} changes an output, so nothing is proven of it; if the original does not "
                "use the table either, the adapter should declare its tensor unused."
            )
        found[name] = _ranges(silent)
    return found


def hooks_of_tables(model: Lens, batch: Mapping[str, Any]) -> set[str]:
    """The hooks at which a model looks rows of its tables up."""
    return {hook for hook, _ in _reads(model, batch).values()}


def _reads(model: Lens, batch: Mapping[str, Any]) -> Mapping[str, tuple[str, Tensor]]:
    """For each table the hook at which it is read, and the rows that this batch reads there."""
    reads: Mapping[str, tuple[str, Tensor]] = getattr(model, "rows_read", lambda batch: {})(batch)
    return reads


def counted(unproven: Mapping[str, tuple[range, ...]]) -> str:
    """``"968 rows of embed.timestep.W"`` and the like, for a sentence; empty where there is nothing."""
    sizes = {name: sum(map(len, rows)) for name, rows in unproven.items()}
    return ", ".join(f"{n:,} row{'s' * (n > 1)} of {name}" for name, n in sizes.items() if n)


def _slopes(model: Any, batch: Mapping[str, Any], hooks: list[str]) -> dict[str, Tensor]:
    """The derivative of a random sum of all outputs along each vector at these hooks."""
    if not hooks:
        return {}
    with torch.inference_mode(False), torch.enable_grad():
        if any(weight.is_inference() for weight in model.weights.values()):
            model = copy.deepcopy(model)  # what was made in inference mode cannot be differentiated through
        leaves: dict[str, Tensor] = {}

        def leaf(x: Tensor, hook: Any) -> Tensor:
            leaves[hook.name] = x.detach().clone().requires_grad_()
            return leaves[hook.name]

        batch = {name: x.clone() if isinstance(x, Tensor) else x for name, x in batch.items()}
        with evaluating(model), model.hooks(fwd_hooks=[(name, leaf) for name in hooks]):
            out = model(**batch)
        outputs = [out] if isinstance(out, Tensor) else [x for x in vars(out).values() if isinstance(x, Tensor)]
        generator = torch.Generator().manual_seed(0)
        kept = [_without_padding(x, batch.get("attention_mask")) for x in outputs]
        kept = [x for x in kept if x.requires_grad]  # a head of another kind of weights may have no slope at all
        noise = [torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x) for x in kept]
        read = [name for name in hooks if name in leaves]
        grads: Sequence[Tensor | None] = [None] * len(read)
        if kept:
            given: dict[str, Any] = {"outputs": kept, "grad_outputs": noise}
            # One number has the same derivatives, and PyTorch imports sympy to look at the shapes of others. But logits
            # may be larger than all else, and a sum would hold them again.
            if sum(x.numel() for x in kept) <= SMALL and len({x.device for x in kept}) == 1:
                of_each = [x.flatten().dot(n.flatten()) for x, n in zip(kept, noise, strict=True)]
                given = {"outputs": sum(of_each[1:], of_each[0])}
            grads = torch.autograd.grad(inputs=[leaves[name] for name in read], allow_unused=True, **given)
    zeros = {name: torch.zeros_like(leaves[name]) for name in read}
    return zeros | {name: grad for name, grad in zip(read, grads, strict=True) if grad is not None}


def _without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """The outputs of real steps, ``[real, feature]``; nobody reads the others."""
    if mask is None:
        return x
    real = mask.bool().repeat_interleave(-(-x.shape[1] // mask.shape[1]), 1)
    return x[real[:, : x.shape[1]]]


def _ranges(chosen: Tensor) -> tuple[range, ...]:
    """The indices where ``chosen`` is true, as runs."""
    edges = torch.nn.functional.pad(chosen.to(torch.int8), (1, 1)).diff().nonzero().flatten().tolist()
    return tuple(range(start, stop) for i, (start, stop) in enumerate(pairwise(edges)) if i % 2 == 0)
