"""Proof by forward pass that every matrix's name, orientation, scale and heads are right.

A wrong reshape raises nothing when d_model equals n_heads * d_head, and a transposed square matrix has every size
right. So each catalogued matrix is applied to the activation on its one side, and must give the activation on its other side,
both cached from the original model wherever there is one: a copy of the weights cannot vouch for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from dt_lens.errors import DtLensError

if TYPE_CHECKING:
    from dt_lens.lens import Lens

__all__ = ["Certificate", "certify"]

# Relative to the activation's own size: rounding through one matrix product in the weights' dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Certificate:
    """What was proven: the largest relative error of each matrix, and whose activations it was held against."""

    errors: Mapping[str, float]
    against: str  # "the original model" or "the lens's own forward pass"

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        proven = f"{len(self.errors)} matrices reproduce their activations in {self.against}"
        return f"{proven}; largest relative error {self.worst:.1e}"


@dataclass(frozen=True)
class _Check:
    """What a matrix made of its input, and what was cached.

    With ``weight``, ``source @ weight + bias`` is the computed side.
    """

    matrix: str
    computed: Tensor
    expected: Tensor
    weight: Tensor | None = None
    source: Tensor | None = None
    bias: Tensor | float = 0.0
    head_axis: int | None = None  # along which heads lie side by side in ``weight``


def _linear(
    matrix: str, x: Tensor, W: Tensor, b: Tensor | None, expected: Tensor, head_axis: int | None = None
) -> _Check:
    bias = 0.0 if b is None else b
    return _Check(matrix, x @ W + bias, expected, W, x, bias, head_axis)


def certify(model: Lens, seed: int = 0) -> Certificate:
    """Prove the catalogue on one random batch.

    The order is that of the forward pass and a matrix is only asked about once everything before it holds, so the first
    failure is the culprit. ``OV.h`` and ``QK.h`` are proven through the cached pattern and scores.

    Returns:
        the errors, relative to the root mean square of each activation.

    Raises:
        DtLensError: naming the first matrix that does not reproduce its activation, and what would have.
    """
    dtype = next(iter(model.weights.values())).dtype
    tolerance = TOLERANCE.get(dtype, 1e-4)
    batch = model.probe(seed)
    module: Any = model
    training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            out, cache = model.run_with_cache(**batch)
    finally:
        module.train(training)
    own = dict(cache.items()) | _outputs(out)
    truth = model.reference.activations(batch) if model.reference is not None else own
    against = "the original model" if model.reference is not None else "the lens's own forward pass"
    errors: dict[str, float] = {}
    with torch.inference_mode():
        for check in _checks(model, truth, own, batch):
            error = _error(check.computed, check.expected)
            # "not <=" rather than ">", so that a NaN fails.
            if not error <= tolerance:
                raise DtLensError(
                    f"certify: {check.matrix} does not reproduce its activation in {against} (relative error "
                    f"{error:.2g}, allowed {tolerance:.0e}){_diagnosis(check, model.structure.n_heads, tolerance)}; "
                    "the adapter's map of this weight is wrong."
                )
            errors[check.matrix] = max(error, errors.get(check.matrix, 0.0))
    return Certificate(errors, against)


def _outputs(out: Any) -> dict[str, Tensor]:
    return {name: getattr(out, name) for name in ("state_preds", "action_preds", "return_preds") if hasattr(out, name)}


def _error(computed: Tensor, expected: Tensor) -> float:
    if computed.shape != expected.shape:
        return float("inf")
    computed, expected = computed.double(), expected.double()
    scale = expected.pow(2).mean().sqrt().clamp_min(1e-12)
    return float((computed - expected).abs().max() / scale)


def _checks(
    model: Lens, truth: Mapping[str, Tensor], own: Mapping[str, Tensor], batch: Mapping[str, Any]
) -> Iterator[_Check]:
    """All checks in the order of the forward pass."""
    weights, structure = model.weights, model.structure
    real = batch.get("attention_mask")

    def kept(tokens: Tensor) -> Tensor:
        """Only real tokens: what padding computes is nobody's concern and differs between implementations."""
        if real is None or tokens.shape[0] != real.shape[0]:
            return tokens
        per_step = tokens.shape[1] // real.shape[1]
        return tokens[real.bool().repeat_interleave(per_step, 1)]

    def merged(name: str, pattern: str) -> Tensor:
        return rearrange(weights[name], pattern)

    for name in own:
        if name.startswith("hook_embed_") and name in truth:
            yield _Check(_weight_named(name, weights), own[name], truth[name])
    for layer in range(structure.n_layers):
        attn, mlp = f"blocks.{layer}.attn", f"blocks.{layer}.mlp"
        yield _Check(
            f"the input of block {layer}",
            kept(own[f"blocks.{layer}.hook_resid_pre"]),
            kept(truth[f"blocks.{layer}.hook_resid_pre"]),
        )
        x = _read(truth, f"blocks.{layer}", "attn", structure.attn_norm[layer], weights)
        for letter in "QKV":
            W, b = merged(f"{attn}.W_{letter}", "h d e -> d (h e)"), merged(f"{attn}.b_{letter}", "h e -> (h e)")
            hook = rearrange(truth[f"{attn}.hook_{letter.lower()}"], "n t h e -> n t (h e)")
            yield _linear(f"{attn}.W_{letter}", x, W, b, hook, head_axis=1)
        yield from _circuits(model, layer, x, truth, kept)
        z, out = rearrange(truth[f"{attn}.hook_z"], "n t h e -> n t (h e)"), truth[f"blocks.{layer}.hook_attn_out"]
        W_O = merged(f"{attn}.W_O", "h e d -> (h e) d")
        yield _linear(f"{attn}.W_O", kept(z), W_O, weights.get(f"{attn}.b_O"), kept(out), head_axis=0)
        x = _read(truth, f"blocks.{layer}", "mlp", structure.mlp_norm[layer], weights)
        yield _linear(f"{mlp}.W_in", x, weights[f"{mlp}.W_in"], weights.get(f"{mlp}.b_in"), truth[f"{mlp}.hook_pre"])
        post, out = truth[f"{mlp}.hook_post"], truth[f"blocks.{layer}.hook_mlp_out"]
        yield _linear(f"{mlp}.W_out", post, weights[f"{mlp}.W_out"], weights.get(f"{mlp}.b_out"), out)
    for name in _outputs_in(own, truth):
        yield _Check(f"the model's {name}", kept(own[name]), kept(truth[name]))


def _outputs_in(own: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> list[str]:
    return [
        name
        for name in ("hook_final", "state_preds", "action_preds", "return_preds", "logits")
        if name in own and name in truth
    ]


def _weight_named(hook: str, weights: Mapping[str, Tensor]) -> str:
    name = f"embed.{hook.removeprefix('hook_embed_')}.W"
    return name if name in weights else hook


def _read(
    truth: Mapping[str, Tensor], block: str, part: str, norm: str | None, weights: Mapping[str, Tensor]
) -> Tensor:
    """What a sublayer's matrices are applied to: the stream, or the stream behind its LayerNorm."""
    if f"{block}.{part}_in" in truth:
        return truth[f"{block}.{part}_in"]
    if norm is None:
        return truth[f"{block}.{'hook_resid_pre' if part == 'attn' else 'hook_resid_mid'}"]
    return truth[f"{norm}.hook_normalized"] * weights[f"{norm}.w"] + weights[f"{norm}.b"]


def _circuits(model: Lens, layer: int, x: Tensor, truth: Mapping[str, Tensor], kept: Any) -> Iterator[_Check]:
    """QK through scores and pattern, OV through the pattern, head by head, from the catalogue's own products."""
    from dt_lens.matrices import catalogue

    found, weights, attn = catalogue(model), model.weights, f"blocks.{layer}.attn"
    scale = model.structure.attn_scale[layer]
    pattern = truth[f"{attn}.hook_pattern"].to(x)
    visible = pattern > 0
    for head in range(model.structure.n_heads):
        M = found[f"{attn}.QK.{head}"].dense(model, fold_layernorm=False).to(x)
        W_Q, b_Q, W_K, b_K = (weights[f"{attn}.{name}"][head] for name in ("W_Q", "b_Q", "W_K", "b_K"))
        scores = (
            einsum(x, M, x, "n q a, a b, n k b -> n q k")
            + (x @ W_Q @ b_K)[:, :, None]
            + (x @ W_K @ b_Q)[:, None]
            + b_Q @ b_K
        )
        mine = torch.softmax((scores * scale).masked_fill(~visible[:, head], float("-inf")), -1)
        yield _Check(f"{attn}.QK.{head}", kept(mine), kept(pattern[:, head]))
        M = found[f"{attn}.OV.{head}"].dense(model, fold_layernorm=False).to(x)
        W_O, b_V = weights[f"{attn}.W_O"][head], weights[f"{attn}.b_V"][head]
        moved = einsum(pattern[:, head], x @ M, "n q k, n k d -> n q d") + b_V @ W_O
        yield _Check(f"{attn}.OV.{head}", kept(moved), kept(truth[f"{attn}.hook_z"][:, :, head] @ W_O))


def _diagnosis(check: _Check, n_heads: int, tolerance: float) -> str:
    """Which simple mistake explains the failure, when one does."""
    if check.weight is None or check.source is None:
        return ""
    x, W, bias = check.source.double(), check.weight.double(), check.bias
    target = check.expected.double() - (bias.double() if isinstance(bias, Tensor) else bias)

    def fits(candidate: Tensor) -> bool:
        return _error(x @ candidate, target) <= 10 * tolerance

    if W.shape[0] == W.shape[1] and fits(W.T):
        return ": it looks transposed"
    if check.head_axis is not None and 1 < n_heads <= 6:
        heads = W.tensor_split(n_heads, check.head_axis)
        for order in permutations(range(n_heads)):
            if fits(torch.cat([heads[h] for h in order], check.head_axis)):
                return f": its heads look permuted, in the order {list(order)} they fit"
    y = x @ W
    factor = float((y * target).sum() / y.pow(2).sum().clamp_min(1e-30))
    if fits(W * factor):
        return f": it looks rescaled, {factor:.4g} times it fits"
    return ""
