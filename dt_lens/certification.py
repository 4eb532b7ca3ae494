"""Proof by forward pass that every matrix's name, orientation, scale and heads are right.

A wrong reshape raises nothing when d_model equals n_heads * d_head, and a transposed square matrix has every size
right. So each catalogued matrix is applied to the activation on its one side, and must give the activation on its other
side, both cached from the original model wherever there is one: a copy of the weights cannot vouch for itself.

Between the matrices, each part of the lens (LayerNorms, attention, activation function, heads) is fed the original's
activation and must give the original's next one. So no error hides another, and none grows on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from dt_lens.diagnosis import Check, explain
from dt_lens.errors import DtLensError, because
from dt_lens.matrices import Snapshot, catalogue

if TYPE_CHECKING:
    from dt_lens.lens import Lens

__all__ = ["Certificate", "certify"]

# Relative to the activation's own size: rounding through one part of the model in the weights' dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}
# Where the lens's activation is noted and the original's goes on.
EXCHANGED = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_q", "hook_k", "hook_v", "hook_pre")
# What is read off the last activations, and the part whose fault a difference there is.
READ_OFF = {
    "hook_final": "ln_final",
    "hook_action_pre": "predict.action.W",
    "action_preds": "action_tanh",
    "state_preds": "predict.state.W",
    "return_preds": "predict.return_to_go.W",
    "logits": "the unembedding",
}


@dataclass(frozen=True)
class Certificate:
    """What was proven: the largest relative error of each part, and whose activations it was held against.

    ``errors`` is keyed by the names of matrices, raw and with the LayerNorm folded, and of the parts between them.
    """

    errors: Mapping[str, float]
    against: str  # "the original model" or "the lens's own forward pass"

    @property
    def worst(self) -> float:
        """The largest relative error of all."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        proven = f"{len(self.errors)} matrices and parts reproduce their activations in {self.against}"
        return f"{proven}; largest relative error {self.worst:.1e}"


def certify(model: Lens, seed: int = 0) -> Certificate:
    """Prove the catalogue on one random batch.

    The order is that of the forward pass and a matrix is only asked about once everything before it holds, so the first
    failure is the culprit. ``OV.h`` and ``QK.h`` are proven through the cached pattern and scores.

    Returns:
        the errors: the largest difference, beyond what rounding explains, over the root mean square of the activation.

    Raises:
        DtLensError: naming the first matrix or part that does not reproduce its activation, and what would have.
    """
    weights = model.weights
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise DtLensError(f"certify: the weight {name!r} holds NaN or infinite values; the model is damaged.")
    dtype = _arithmetic(next(iter(weights.values())))
    tolerance = TOLERANCE[dtype]
    against = "the original model" if model.reference is not None else "the lens's own forward pass"
    batch = model.probe(seed)
    try:
        truth = {} if model.reference is None else _without_padding(model.reference.activations(batch), batch)
        own = _activations(model, batch, truth)
    except DtLensError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise DtLensError(f"certify: the model cannot run on a random batch: {because(error)}.") from error
    for name, tensor in truth.items():
        if not name.endswith(("hook_pattern", "hook_attn_scores")) and not bool(torch.isfinite(tensor).all()):
            raise DtLensError(
                f"certify: {name} of {against} is NaN or infinite on a random batch, so nothing can be held against "
                "it; bring the model to a wider type with .float()."
            )
    errors: dict[str, float] = {}
    with torch.inference_mode():
        for check in _Walk(model, truth or own, own, batch.get("attention_mask"), dtype).checks():
            size = check.error()
            # "not <=" rather than ">", so that a NaN fails.
            if not size <= tolerance:
                raise DtLensError(
                    f"certify: {check.part} does not reproduce its activation in {against} (relative error "
                    f"{size:.2g}, allowed {tolerance:.0e}){explain(check, model, tolerance)}; the adapter maps this "
                    "part wrongly."
                )
            errors[check.part] = max(size, errors.get(check.part, 0.0))
    unproven = [name for name in catalogue(model) if name not in errors]
    if unproven:
        raise DtLensError(
            f"certify: no activation proves {unproven[0]}; the adapter's reference must give both its sides."
        )
    return Certificate(errors, against)


def _arithmetic(weight: Tensor) -> torch.dtype:
    """The type whose rounding the forward pass has."""
    # On CUDA float32 products may be made of 10 bits (TF32), as many as float16 has.
    short = weight.dtype == torch.float32 and weight.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return torch.float16 if short else weight.dtype


def _without_padding(truth: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Zeros where there is padding: some implementations compute NaN there, and nobody looks at it."""
    mask = batch.get("attention_mask")
    if mask is None:
        return dict(truth)

    def blank(name: str, tensor: Tensor) -> Tensor:
        if name.endswith(("hook_pattern", "hook_attn_scores")):
            return tensor  # queries by keys: keys that are padding have no weight, and those queries are left out
        real = mask.bool().repeat_interleave(tensor.shape[1] // mask.shape[1], 1)
        return tensor.where(rearrange(real, f"n t -> n t{' 1' * (tensor.ndim - 2)}"), 0)

    return {name: blank(name, tensor) for name, tensor in truth.items()}


def _activations(model: Lens, batch: Mapping[str, Any], truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The lens's activations and outputs, every part fed what the original's was fed."""
    made: dict[str, Tensor] = {}

    def exchange(x: Tensor, hook: Any) -> Tensor:
        made[hook.name] = x.detach()
        given = truth[hook.name]
        return given.to(x) if given.shape == x.shape else x

    points = [name for name in truth if name.startswith("blocks.") and name.rpartition(".")[2] in EXCHANGED]
    module: Any = model
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), model.hooks(fwd_hooks=[(name, exchange) for name in points]):
            out, cache = model.run_with_cache(**batch)
    finally:
        module.train(training)
    outputs = {name: getattr(out, name) for name in READ_OFF if isinstance(getattr(out, name, None), Tensor)}
    return {name: tensor.detach() for name, tensor in {**cache, **outputs}.items()} | made


class _Walk:
    """All checks that one batch's activations allow, in the order of the forward pass, in float64."""

    def __init__(
        self,
        model: Lens,
        truth: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        mask: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.model = Snapshot.of(model)
        self.weights, self.structure = self.model
        self.found = catalogue(model)
        self.truth = truth
        self.own = own
        self.mask = mask
        self.eps = torch.finfo(dtype).eps

    def kept(self, tokens: Tensor) -> Tensor:
        """Real tokens only: what padding computes is nobody's concern and differs between implementations."""
        if self.mask is None or tokens.shape[0] != self.mask.shape[0]:
            return tokens.double()
        per_step = tokens.shape[1] // self.mask.shape[1]
        return tokens[self.mask.bool().repeat_interleave(per_step, 1)].double()

    def check(
        self,
        part: str,
        computed: Tensor,
        expected: Tensor,
        slack: Tensor | float = 0.0,
        weight: Tensor | None = None,
        source: Tensor | None = None,
    ) -> Check:
        # Both sides may be rounded, each to half a unit in the last place.
        return Check(part, computed, expected, slack + self.eps * expected.abs(), weight, source)

    def same(self, part: str, name: str, slack: Tensor | float = 0.0) -> Iterator[Check]:
        """The lens's own activation against the original's, where both are."""
        if name in self.truth and name in self.own and self.truth is not self.own:
            yield self.check(part, self.kept(self.own[name]), self.kept(self.truth[name]), slack)

    def checks(self) -> Iterator[Check]:
        for name in self.own:
            if name.startswith("hook_embed_"):
                weight = f"embed.{name.removeprefix('hook_embed_')}.W"
                yield from self.same(weight if weight in self.weights else name, name)
        yield from self.same("the order of the tokens", "hook_embed")
        layers = range(self.structure.n_layers)
        for layer in layers:
            before = "embed_ln or embed.position.W" if layer == 0 else f"the sum at the end of block {layer - 1}"
            yield from self.same(before, f"blocks.{layer}.hook_resid_pre")
            yield from self.attention(layer)
            yield from self.same(f"the sum after the attention of block {layer}", f"blocks.{layer}.hook_resid_mid")
            yield from self.mlp(layer)
        yield from self.same(f"the sum at the end of block {layers[-1]}", f"blocks.{layers[-1]}.hook_resid_post")
        for name, part in READ_OFF.items():
            yield from self.same(part, name)

    def attention(self, layer: int) -> Iterator[Check]:
        block, attn = f"blocks.{layer}", f"blocks.{layer}.attn"
        norm = self.structure.attn_norm[layer]
        yield from self.layernorm(f"{block}.attn_in", norm)
        x = self.entry(f"{block}.attn_in", norm, f"{block}.hook_resid_pre")
        for kind, hook in (("W_Q", "hook_q"), ("W_K", "hook_k"), ("W_V", "hook_v")):
            yield from self.linear(f"{attn}.{kind}", x, norm, self.truth[f"{attn}.{hook}"].flatten(-2))
            yield from self.same(f"{attn}.{kind}", f"{attn}.{hook}")
        # Rounded scores: an error of a score is one of the pattern's logarithm.
        q, k, v = (self.truth[f"{attn}.hook_{name}"].double() for name in "qkv")
        scores = 2 * self.eps * einsum(q.norm(dim=-1), k.norm(dim=-1), "n q h, n k h -> n h q k")
        pattern = self.truth[f"{attn}.hook_pattern"].double()
        rounded = 2 * abs(self.structure.attn_scale[layer]) * scores.amax(-1, keepdim=True) * pattern
        yield from self.circuits(layer, x.double(), norm, scores, rounded)
        slack = self.kept(einsum(rounded, v.abs(), "n h q k, n k h e -> n q h e"))
        yield from self.same(f"the attention mask of block {layer}", f"{attn}.hook_z", slack)
        z, out = self.truth[f"{attn}.hook_z"].flatten(-2), self.truth[f"{block}.hook_attn_out"]
        yield from self.linear(f"{attn}.W_O", z, None, out)

    def mlp(self, layer: int) -> Iterator[Check]:
        block, mlp = f"blocks.{layer}", f"blocks.{layer}.mlp"
        norm = self.structure.mlp_norm[layer]
        yield from self.layernorm(f"{block}.mlp_in", norm)
        x = self.entry(f"{block}.mlp_in", norm, f"{block}.hook_resid_mid")
        yield from self.linear(f"{mlp}.W_in", x, norm, self.truth[f"{mlp}.hook_pre"])
        yield from self.same(f"{mlp}.W_in", f"{mlp}.hook_pre")
        yield from self.same(f"the activation function of block {layer}", f"{mlp}.hook_post")
        yield from self.linear(
            f"{mlp}.W_out", self.truth[f"{mlp}.hook_post"], None, self.truth[f"{block}.hook_mlp_out"]
        )

    def layernorm(self, entry: str, norm: str | None) -> Iterator[Check]:
        if norm is not None and entry in self.truth:
            mine = self.bare(norm) * self.weights[f"{norm}.w"].double() + self.weights[f"{norm}.b"].double()
            yield self.check(norm, self.kept(mine), self.kept(self.truth[entry]))

    def bare(self, norm: str) -> Tensor:
        """The stream centred and divided by its scale, which is all that folding leaves of a LayerNorm."""
        return self.own[f"{norm}.hook_normalized"].double()

    def entry(self, entry: str, norm: str | None, stream: str) -> Tensor:
        """What a sublayer's matrices are applied to: the stream, or the stream behind its LayerNorm."""
        if norm is None:
            return self.truth[stream]
        if entry in self.truth:
            return self.truth[entry]
        return self.bare(norm) * self.weights[f"{norm}.w"].double() + self.weights[f"{norm}.b"].double()

    def linear(self, name: str, x: Tensor, norm: str | None, output: Tensor) -> Iterator[Check]:
        """A matrix with all its heads side by side, raw and with its LayerNorm folded."""
        matrix = self.found[name]
        head, _, leaf = name.rpartition(".")
        bias = self.weights.get(f"{head}.b{leaf[1:]}")
        b = 0.0 if bias is None else bias.double().flatten()
        x, output, M = self.kept(x), self.kept(output), matrix.dense(self.model, fold_layernorm=False)
        # Where large terms cancel, the sum's rounding goes by the terms (Higham, "Accuracy and Stability of Numerical
        # Algorithms", section 3.1); products of half-precision numbers are summed in float32.
        slack = 4 * min(self.eps, torch.finfo(torch.float32).eps) * (x.abs() @ M.abs())
        yield self.check(name, x @ M + b, output, slack, M, x)
        if norm is not None:
            folded = self.kept(self.bare(norm)) @ matrix.dense(self.model) + self.weights[f"{norm}.b"].double() @ M + b
            yield self.check(f"{name} with its LayerNorm folded", folded, output, slack)

    def circuits(
        self, layer: int, x: Tensor, norm: str | None, score_slack: Tensor, pattern_slack: Tensor
    ) -> Iterator[Check]:
        """QK through the scores, OV through the pattern, head by head, from the catalogue's own products."""
        attn, scale = f"blocks.{layer}.attn", self.structure.attn_scale[layer]
        pattern = self.truth[f"{attn}.hook_pattern"].double()
        q, k, z = (self.truth[f"{attn}.hook_{name}"].double() for name in "qkz")
        for head in range(self.structure.n_heads):
            W_Q, W_K, W_V, W_O = (self.weights[f"{attn}.W_{letter}"][head].double() for letter in "QKVO")
            b_Q, b_K, b_V = (self.head_bias(f"{attn}.b_{letter}", head, W_Q) for letter in "QKV")
            QK, OV = self.found[f"{attn}.QK.{head}"], self.found[f"{attn}.OV.{head}"]
            expected = einsum(q[:, :, head], k[:, :, head], "n q e, n k e -> n q k")
            scores = _bilinear(x, QK.dense(self.model, fold_layernorm=False)) + (x @ W_Q @ b_K)[:, :, None]
            scores = scores + (x @ W_K @ b_Q)[:, None] + b_Q @ b_K
            seen = pattern[:, head] > 0
            yield self.check(
                QK.name,
                self.kept(scores.where(seen, 0)),
                self.kept(expected.where(seen, 0)),
                self.kept(score_slack[:, head]),
            )
            attended = torch.softmax((expected * scale).masked_fill(~seen, float("-inf")), -1)
            slack = self.kept(pattern_slack[:, head])
            part = f"the attention scale of block {layer}"
            yield self.check(part, self.kept(attended), self.kept(pattern[:, head]), slack)
            moved = einsum(pattern[:, head], x @ OV.dense(self.model, fold_layernorm=False), "n q k, n k d -> n q d")
            yield self.check(OV.name, self.kept(moved + b_V @ W_O), self.kept(z[:, :, head] @ W_O))
            if norm is not None:
                # Folding is exact whatever the activations, so the matrices just proven vouch for the folded ones.
                bare = self.bare(norm)
                bare = bare - bare.mean(-1, keepdim=True)
                plain = bare * self.weights[f"{norm}.w"].double()
                expected = einsum(plain @ W_Q, plain @ W_K, "n q e, n k e -> n q k")
                folded = _bilinear(bare, QK.dense(self.model))
                yield self.check(f"{QK.name} with its LayerNorm folded", self.kept(folded), self.kept(expected))
                folded = bare @ OV.dense(self.model)
                yield self.check(
                    f"{OV.name} with its LayerNorm folded", self.kept(folded), self.kept(plain @ W_V @ W_O)
                )

    def head_bias(self, name: str, head: int, W: Tensor) -> Tensor:
        return self.weights[name][head].double() if name in self.weights else W.new_zeros(W.shape[1])


def _bilinear(x: Tensor, M: Tensor) -> Tensor:
    return einsum(x @ M, x, "n q d, n k d -> n q k")
