"""Prove by a forward pass that every matrix's name, orientation, scale and heads are right.

A wrong reshape raises nothing when d_model equals n_heads * d_head, and a transposed square matrix has every size
right. So each catalogued matrix is applied to the activation on its one side, and must give the activation on its other
side, both cached from the original model if there is one: a copy of the weights proves nothing about itself.

Between the matrices, each part of the lens (LayerNorms, attention, activation function, heads) is fed the original's
activation and must give the original's next one. So no error hides another, and none grows from block to block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from dt_lens.arguments import LAST_SEED, whole_number
from dt_lens.errors import DtLensError, because
from dt_lens.lens.certificate import Certificate
from dt_lens.lens.diagnosis import Check, explain
from dt_lens.lens.forward_mode import evaluating, original_at_hand
from dt_lens.lens.matrices import catalogue
from dt_lens.lens.norm_proofs import NormProofs, some_columns, through
from dt_lens.lens.protocol import require_running
from dt_lens.lens.table_rows import hooks_of_tables, unproven_rows
from dt_lens.lens.weights import all_finite
from dt_lens.progress import ProgressCallback, reporting

if TYPE_CHECKING:
    from dt_lens.lens.protocol import Lens, Reference

__all__ = ["Certificate", "certify", "certify_loaded"]

# Relative to the activation's own size: rounding through one part of the model in the weights' dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}
# Here the lens's activation is noted, and the original's takes its place.
EXCHANGED: tuple[str, ...] = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_q",
    "hook_k",
    "hook_v",
    "hook_pre",
)
EXCHANGED += ("hook_pre_linear",)
# A language model's tables, which are looked up or read off, and so are not in the catalogue of matrices.
TABLES = ("embed.W_E", "pos_embed.W_pos", "unembed.W_U")
# The model's outputs, and the part that is wrong if an output differs.
READ_OFF = {
    "hook_final": "ln_final",
    "hook_action_pre": "predict.action.W",
    "action_preds": "action_tanh",
    "state_preds": "predict.state.W",
    "return_preds": "predict.return_to_go.W",
    "logits": "the unembedding",
}


def certify(model: Lens, seed: int = 0, *, progress: bool | ProgressCallback | None = None) -> Certificate:
    """Prove every matrix and part of a model on one random batch.

    The order is that of the forward pass, and a matrix is checked only after everything before it, so the first failure
    is the cause. ``OV.h`` and ``QK.h`` are proven through the cached pattern and scores. Of a table only the rows that
    the batch reads can be proven; the certificate lists the others.

    Args:
        model: a wrapped model that can run.
        seed: of the batch.
        progress: ``True`` for a bar, ``False`` for none, or a function of (what is being done, share done); by default
            a bar in a notebook and none elsewhere.

    Returns:
        the error of each part: the largest difference, beyond what rounding explains, over the root mean square of the
        activation.

    Raises:
        DtLensError: naming the first matrix or part that does not reproduce its activation, and what would have; or a
            table none of whose rows changes an output; or if ``model`` is not a wrapped model that can run.
    """
    require_running(model, "certify")
    with reporting(progress) as tell:
        return _certified(model, seed, tell, model.reference)


def certify_loaded(model: Lens, progress: ProgressCallback) -> Certificate:
    """``certify`` of a model that has just been loaded.

    A bundled agent is held against its own forward pass: the files are the ones that our tests certify against the
    original, which takes longer to import than all else.
    """
    require_running(model, "certify")
    made = original_at_hand(model) is not None or getattr(model, "_make_original", None) is None
    return _certified(model, 0, progress, model.reference if made else None)


def _certified(model: Lens, seed: int, tell: ProgressCallback, reference: Reference | None) -> Certificate:
    """The certificate of a model that can run, against a reference's activations or, without one, its own."""
    tell("certifying", 0.0)
    weights = model.weights
    for name, weight in weights.items():
        if not all_finite(weight):
            raise DtLensError(f"certify: the weight {name!r} holds NaN or infinite values; the model is damaged.")
    dtype = getattr(model, "arithmetic", None) or _arithmetic(next(iter(weights.values())))
    tolerance = TOLERANCE[dtype]
    against = "the original model" if reference is not None else "the lens's own forward pass"
    batch = model.probe(whole_number(seed, "seed", 0, LAST_SEED))
    try:
        truth = {} if reference is None else _without_padding(reference.activations(batch), batch)
        own = _activations(model, batch, truth)
    except DtLensError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise DtLensError(f"certify: the model cannot run on a random batch: {because(error)}.") from error
    for name, tensor in truth.items():
        if not name.endswith(("hook_pattern", "hook_attn_scores")) and not bool(torch.isfinite(tensor).all()):
            raise DtLensError(
                f"certify: {name} of {against} is NaN or infinite on a random batch, so nothing can be compared "
                "with it; convert the model to a wider type with .float()."
            )
    errors: dict[str, float] = {}
    with torch.inference_mode():
        for check in _Walk(model, truth or own, own, batch, dtype).checks():
            tell(f"certifying {check.part}", _share_of(check.part, model))
            size = check.error()
            # "not <=" rather than ">", so that a NaN fails.
            if not size <= tolerance:
                raise DtLensError(
                    f"certify: {check.part} does not reproduce its activation in {against} (relative error "
                    f"{size:.2g}, allowed {tolerance:.0e}){explain(check, model, tolerance)}; the adapter maps this "
                    "part wrongly."
                )
            errors[check.part] = max(size, errors.get(check.part, 0.0))
    unproven = [name for name in (*catalogue(model), *(t for t in TABLES if t in weights)) if name not in errors]
    if unproven:
        raise DtLensError(
            f"certify: no activation proves {unproven[0]}; the adapter's reference must give both its sides."
        )
    del check, truth  # logits may be larger than all else, and the rows need room of their own
    looked_up = {hook: own[hook] for hook in hooks_of_tables(model, batch) if hook in own}
    del own
    rows = unproven_rows(model, batch, looked_up)
    return Certificate(errors, against, rows, dict(getattr(model, "assumed", {})))


def _share_of(part: str, model: Lens) -> float:
    """How much of the walk is done at this part, by the block that it is in."""
    block = re.search(r"\bblocks?[. ](\d+)", part)
    return 0.1 + 0.8 * int(block[1]) / model.structure.n_layers if block else 0.1


def _arithmetic(weight: Tensor) -> torch.dtype:
    """The type whose rounding the forward pass has."""
    # On CUDA float32 products may be made of 10 bits (TF32), as many as float16 has.
    short = weight.dtype == torch.float32 and weight.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return torch.float16 if short else weight.dtype


def _without_padding(truth: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Zeros where there is padding: some implementations compute NaN there, and nothing reads it."""
    mask = batch.get("attention_mask")
    if mask is None:
        return dict(truth)

    def blank(name: str, tensor: Tensor) -> Tensor:
        if name.endswith(("hook_pattern", "hook_attn_scores")):
            return tensor  # queries by keys: padded keys have no weight, and padded queries are left out
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
    with evaluating(model), torch.no_grad(), model.hooks(fwd_hooks=[(name, exchange) for name in points]):
        out, cache = model.run_with_cache(**batch)
    outputs = {name: getattr(out, name) for name in READ_OFF if isinstance(getattr(out, name, None), Tensor)}
    return {name: tensor.detach() for name, tensor in {**cache, **outputs}.items()} | made


class _Walk(NormProofs):
    """All checks that one batch's activations allow, in the order of the forward pass, in float64."""

    def __init__(
        self,
        model: Lens,
        truth: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        batch: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(model)
        self.table_scale: Tensor | float = getattr(model, "table_scale", 1.0)
        self.found = catalogue(model)
        self.truth = truth
        self.own = own
        self.mask: Tensor | None = batch.get("attention_mask")
        self.tokens: Tensor | None = batch.get("tokens")
        self.eps = torch.finfo(dtype).eps

    def kept(self, tokens: Tensor) -> Tensor:
        """Real tokens only: what is computed for padding is not used, and differs between implementations."""
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
        weight: Callable[[], Tensor] | None = None,
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
        yield from self.tables()
        yield from self.same("the order of the tokens", "hook_embed")
        layers = range(self.structure.n_layers)
        for layer in layers:
            before = "embed_ln or embed.position.W" if layer == 0 else f"the sum at the end of block {layer - 1}"
            yield from self.same(before, f"blocks.{layer}.hook_resid_pre")
            yield from self.attention(layer)
            yield from self.same(f"the sum after the attention of block {layer}", f"blocks.{layer}.hook_resid_mid")
            yield from self.mlp(layer)
        yield from self.same(f"the sum at the end of block {layers[-1]}", f"blocks.{layers[-1]}.hook_resid_post")
        yield from self.unembedding()
        for name, part in READ_OFF.items():
            yield from self.same(part, name)

    def tables(self) -> Iterator[Check]:
        """A language model's token and position tables, whose rows are the embeddings."""
        for name, hook in (("embed.W_E", "hook_embed"), ("pos_embed.W_pos", "hook_pos_embed")):
            if name in self.weights and hook in self.truth and self.tokens is not None:
                expected = self.truth[hook].double()
                rows = self.tokens if name == "embed.W_E" else torch.arange(expected.shape[-2])
                made = self.weights[name][rows.to(self.weights[name].device)].double().expand_as(expected)
                made = made * self.table_scale if name == "embed.W_E" else made
                yield self.check(name, made, expected)
        if "embed_ln.w" in self.weights and self.tokens is not None:
            stream = self.truth["blocks.0.hook_resid_pre"]
            yield self.check("embed_ln", self.kept(self.normalized("embed_ln")), self.kept(stream))

    def unembedding(self) -> Iterator[Check]:
        """A language model's logits from what its last norm leaves."""
        if "unembed.W_U" not in self.weights or not {"hook_final", "logits"} <= set(self.truth):
            return
        x = self.truth["hook_final"]
        if "ln_final.w" in self.weights:
            yield self.check("ln_final", self.kept(self.normalized("ln_final")), self.kept(x))
        W_U, b_U, logits = self.weights["unembed.W_U"], self.weights.get("unembed.b_U"), self.truth["logits"]
        for chosen in some_columns(W_U):  # logits too are many
            b = 0.0 if b_U is None else b_U[chosen].double()
            part = W_U[:, chosen]
            yield self.product("unembed.W_U", self.kept(x), part, part.double, logits[..., chosen], b)

    def attention(self, layer: int) -> Iterator[Check]:
        block, attn = f"blocks.{layer}", f"blocks.{layer}.attn"
        norm = self.structure.attn_norm[layer]
        yield from self.layernorm(f"{block}.attn_in", norm)
        x = self.entry(f"{block}.attn_in", norm, f"{block}.hook_resid_pre")
        for kind, hook in (("W_Q", "hook_q"), ("W_K", "hook_k"), ("W_V", "hook_v")):
            yield from self.linear(f"{attn}.{kind}", x, norm, self.truth[f"{attn}.{hook}"].flatten(-2))
            yield from self.same(f"{attn}.{kind}", f"{attn}.{hook}")
        yield from self.qk_norms(layer)
        # Rounded scores: an error of a score is one of the pattern's logarithm.
        q, k, v = (self.by_query(layer, name) for name in (*self.scored, "v"))
        scores = 2 * self.eps * einsum(q.norm(dim=-1), k.norm(dim=-1), "n q h, n k h -> n h q k")
        pattern = self.truth[f"{attn}.hook_pattern"].double()
        rounded = 2 * abs(self.structure.attn_scale[layer]) * scores.amax(-1, keepdim=True) * pattern
        yield from self.circuits(layer, x.double(), norm, scores, rounded)
        slack = self.kept(einsum(rounded, v.abs(), "n h q k, n k h e -> n q h e"))
        yield from self.same(f"the attention mask of block {layer}", f"{attn}.hook_z", slack)
        z = self.truth[f"{attn}.hook_z"].flatten(-2)
        behind = self.structure.attn_post_norm[layer] if self.structure.attn_post_norm else None
        yield from self.linear(
            f"{attn}.W_O", z, None, self.truth[f"{block}.{'hook_' if behind is None else ''}attn_out"]
        )
        yield from self.written(f"{attn}.W_O", z, behind, "attn")

    def mlp(self, layer: int) -> Iterator[Check]:
        block, mlp = f"blocks.{layer}", f"blocks.{layer}.mlp"
        norm, stream = self.structure.mlp_norm[layer], "pre" if self.structure.parallel else "mid"
        shared = self.structure.parallel and norm == self.structure.attn_norm[layer]
        entry = f"{block}.attn_in" if shared else f"{block}.mlp_in"
        if not shared:
            yield from self.layernorm(entry, norm)
        x = self.entry(entry, norm, f"{block}.hook_resid_{stream}")
        gated = f"{mlp}.W_gate" in self.weights
        # Where the gate has a bias both biases are added before the product; elsewhere the one bias comes after it.
        with_bias = not gated or f"{mlp}.b_gate" in self.weights
        for kind, hook in (("W_gate", "hook_pre"), ("W_in", "hook_pre_linear")) if gated else (("W_in", "hook_pre"),):
            yield from self.linear(f"{mlp}.{kind}", x, norm, self.truth[f"{mlp}.{hook}"], with_bias=with_bias)
            yield from self.same(f"{mlp}.{kind}", f"{mlp}.{hook}")
        yield from self.same(f"the activation function of block {layer}", f"{mlp}.hook_post")
        post = self.truth[f"{mlp}.hook_post"]
        behind = self.structure.mlp_post_norm[layer] if self.structure.mlp_post_norm else None
        out = self.truth[f"{block}.{'hook_' if behind is None else ''}mlp_out"]
        yield from self.linear(f"{mlp}.W_out", post, None, out)
        yield from self.written(f"{mlp}.W_out", post, behind, "mlp")

    def linear(self, name: str, x: Tensor, norm: str | None, output: Tensor, with_bias: bool = True) -> Iterator[Check]:
        """A matrix with all its heads side by side, raw and with its LayerNorm folded."""
        matrix = self.found[name]
        head, _, leaf = name.rpartition(".")
        bias = self.weights.get(f"{head}.b{leaf[1:]}") if with_bias else None
        b = 0.0 if bias is None else bias.double().flatten()
        (factor,) = matrix.factors
        W = factor.view(self.weights)

        def whole() -> Tensor:
            return matrix.dense(self.model, fold_layernorm=False)

        raw = self.product(name, self.kept(x), W, whole, output, b)
        yield raw
        if norm is not None:
            bare, shift = self.kept(self.bare(norm)), self.shift(norm)
            folded = torch.empty_like(raw.computed)
            for chosen in some_columns(W):
                M = W[:, chosen].double()
                folded[..., chosen] = bare @ matrix.fold_change(self.model, M)[0] + shift @ M
            yield Check(f"{name} with its LayerNorm folded", folded + b, raw.expected, raw.slack)

    def product(
        self, part: str, x: Tensor, W: Tensor, whole: Callable[[], Tensor], output: Tensor, b: Tensor | float
    ) -> Check:
        """A weight and its bias, applied to ``x`` a few columns at a time."""
        # Into one tensor each: separate results would lie between the chunks and keep their memory from being reused.
        made, terms = (x.new_empty((*x.shape[:-1], W.shape[1])) for _ in range(2))
        for chosen in some_columns(W):
            M = W[:, chosen].double()
            made[..., chosen] = x @ M
            terms[..., chosen] = x.abs() @ M.abs()
        # Where large terms cancel, the sum's rounding goes by the terms (Higham, "Accuracy and Stability of Numerical
        # Algorithms", section 3.1); products of half-precision numbers are summed in float32.
        slack = 4 * min(self.eps, torch.finfo(torch.float32).eps) * terms
        return self.check(part, made + b, self.kept(output), slack, whole, x)

    @property
    def scored(self) -> tuple[str, str]:
        """The queries and keys whose products are the scores."""
        return ("rot_q", "rot_k") if self.structure.rotary else ("q", "k")

    def by_query(self, layer: int, which: str) -> Tensor:
        """``q``, ``k``, ``v`` or ``z`` in float64 with a head for every query head."""
        x = self.truth[f"blocks.{layer}.attn.hook_{which}"].double()
        shared = self.structure.queries_per_key
        return x if shared == 1 or not which.endswith(("k", "v")) else x.repeat_interleave(shared, 2)

    def circuits(
        self, layer: int, x: Tensor, norm: str | None, score_slack: Tensor, pattern_slack: Tensor
    ) -> Iterator[Check]:
        """QK through the scores, OV through the pattern, head by head, from the catalogue's own products."""
        attn, scale = f"blocks.{layer}.attn", self.structure.attn_scale[layer]
        pattern = self.truth[f"{attn}.hook_pattern"].double()
        q, k, z = (self.by_query(layer, name) for name in "qkz")
        scored = [self.by_query(layer, name) for name in self.scored]
        for head in range(self.structure.n_heads):
            shared = head // self.structure.queries_per_key
            W_Q, W_O = (self.weights[f"{attn}.W_{letter}"][head].double() for letter in "QO")
            W_K, W_V = (self.weights[f"{attn}.W_{letter}"][shared].double() for letter in "KV")
            b_Q = self.head_bias(f"{attn}.b_Q", head, W_Q)
            b_K, b_V = (self.head_bias(f"{attn}.b_{letter}", shared, W_K) for letter in "KV")
            QK, OV = self.found.get(f"{attn}.QK.{head}"), self.found[f"{attn}.OV.{head}"]
            seen = pattern[:, head] > 0
            if QK is not None:
                expected = einsum(q[:, :, head], k[:, :, head], "n q e, n k e -> n q k")
                scores = einsum(through(x, QK.raw(self.model)), x, "n q d, n k d -> n q k")
                scores = scores + (x @ W_Q @ b_K)[:, :, None] + (x @ W_K @ b_Q)[:, None] + b_Q @ b_K
                scores, expected = scores.where(seen, 0), expected.where(seen, 0)
                yield self.check(QK.name, self.kept(scores), self.kept(expected), self.kept(score_slack[:, head]))
            turned = einsum(scored[0][:, :, head], scored[1][:, :, head], "n q e, n k e -> n q k")
            cap = self.structure.attn_softcap
            turned = turned * scale if cap is None else cap * torch.tanh(turned * scale / cap)
            part = f"the attention scale of block {layer}"
            if self.structure.alibi:
                turned = turned + self.structure.alibi[head] * torch.arange(turned.shape[-1]).to(turned)
                part = f"{part} or the slope of ALiBi of its head {head}"
            attended = torch.softmax(turned.masked_fill(~seen, float("-inf")), -1)
            slack = self.kept(pattern_slack[:, head])
            yield self.check(part, self.kept(attended), self.kept(pattern[:, head]), slack)
            moved = einsum(pattern[:, head], through(x, OV.raw(self.model)), "n q k, n k d -> n q d")
            yield self.check(OV.name, self.kept(moved + b_V @ W_O), self.kept(z[:, :, head] @ W_O))
            if OV.foldable:
                # Folding is exact for any activations, so the matrices just proven give what the folded ones must.
                bare = x if norm is None else self.bare(norm)
                bare = bare if self.structure.rms else bare - bare.mean(-1, keepdim=True)
                plain = bare if norm is None else bare * self.scale(norm)
                behind = 1.0 if OV.right_norm is None else self.scale(OV.right_norm)
                if QK is not None:
                    expected = einsum(plain @ W_Q, plain @ W_K, "n q e, n k e -> n q k")
                    folded = einsum(through(bare, QK.folded(self.model)), bare, "n q d, n k d -> n q k")
                    yield self.check(f"{QK.name} with its LayerNorm folded", self.kept(folded), self.kept(expected))
                folded = through(bare, OV.folded(self.model))
                yield self.check(
                    f"{OV.name} with its LayerNorm folded", self.kept(folded), self.kept(plain @ W_V @ W_O * behind)
                )

    def head_bias(self, name: str, head: int, W: Tensor) -> Tensor:
        return self.weights[name][head].double() if name in self.weights else W.new_zeros(W.shape[1])
