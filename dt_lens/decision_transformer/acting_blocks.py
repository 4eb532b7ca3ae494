"""The parts of ``ActingModel``: its weights as products read them, and what changes of them add to the products.

Weights that follow each other without anything between are multiplied beforehand, where this saves products. With
``h`` what attention reads, a head's score is ``h W_Q W_K^T h'^T``, and what it gives is ``A h W_V W_O``, with rows of
``A`` that sum to 1. So, biases included, which add the same to all scores of a query or the same to all tokens::

    scores = (h W_QK + b_QK) h'^T     W_QK = W_Q W_K^T   b_QK = b_Q W_K^T
    gives  = A (h W_OV + b_OV)        W_OV = W_V W_O     b_OV = b_V W_O + b_O

A model of one head does so in all blocks. The last block of any model does so, and weighs ``h`` before it multiplies by
``W_OV``: its one query needs neither keys nor values. This changes rounding, not the function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dt_lens.decision_transformer.changes import Change, Term, affine, composed, of_weight
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig

__all__ = [
    "NEURONS",
    "ActingBlock",
    "Composed",
    "Linear",
    "MlpPart",
    "Norm",
    "Separate",
    "attention_of",
    "mlp_of",
    "neurons_of",
    "terms_of_block",
]

NEURONS = 128  # of an MLP at a time, on a CPU


@dataclass(frozen=True)
class Norm:
    """A LayerNorm, or the identity if the configuration has none here."""

    w: Tensor | None
    b: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.w is None else F.layer_norm(x, self.w.shape, self.w, self.b, self.eps)


@dataclass(frozen=True)
class Linear:
    """``y = x @ W + b``; ``W`` lies in memory as products read it fastest."""

    weight: Tensor  # [d_in, d_out], contiguous
    bias: Tensor  # [d_out]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)

    def into(self, out: Tensor, x: Tensor) -> Tensor:
        """The same of rows ``x [..., d_in]`` that are contiguous, written into ``out [..., d_out]``."""
        torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight, out=out.view(-1, out.shape[-1]))
        return out


@dataclass(frozen=True)
class Composed:
    """Attention with ``W_QK`` and ``W_OV``, of each head; see above."""

    qk: Linear  # heads side by side in what it gives: [d_model, heads * d_model]
    ov: Linear  # heads side by side in what it reads: [heads * d_model, d_model]; their biases summed
    both: Linear | None  # of one head: the two side by side, [d_model, 2 * d_model]


@dataclass(frozen=True)
class Separate:
    """Attention with queries, keys and values."""

    qkv: Linear  # the three projections side by side, heads in order within each: [d_model, 3 * d_model]
    out: Linear


@dataclass(frozen=True)
class MlpPart:
    """Some neurons of an MLP: what they give is added to what the others give."""

    write_in: Linear  # [d_model, neurons]
    gate: Tensor | None  # [d_model, neurons]
    write_out: Tensor  # [neurons, d_model]


@dataclass(frozen=True)
class ActingBlock:
    ln1: Norm
    ln2: Norm
    attn: Composed | Separate
    mlp: Sequence[MlpPart]
    mlp_bias: Tensor  # [d_model], of W_out
    scale: float


def _factors(parts: Mapping[str, Tensor], head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``[W_Q; b_Q]``, ``W_K``, ``[W_V; b_V]`` and ``W_O`` of a head, float64."""
    own = {name: part.double() if name == "b_O" else part[head].double() for name, part in parts.items()}
    first = (torch.cat((own[f"W_{kind}"], own[f"b_{kind}"][None])) for kind in "QV")
    wq, wv = first
    return wq, own["W_K"], wv, own["W_O"]


def _composed(parts: Mapping[str, Tensor]) -> Composed:
    """From the weights ``[heads, d_model, d_head]`` and so on of a block's attention."""
    heads, like = len(parts["W_Q"]), parts["W_Q"]
    found = [_factors(parts, head) for head in range(heads)]
    qk = torch.cat([wq @ wk.T for wq, wk, _, _ in found], 1)
    each = [wv @ wo for _, _, wv, wo in found]
    ov, bias = torch.cat([w[:-1] for w in each]), sum((w[-1] for w in each), parts["b_O"].double())

    def linear(weight: Tensor, bias: Tensor) -> Linear:
        return Linear(weight.to(like.dtype).contiguous(), bias.to(like.dtype))

    one = heads == 1
    both = linear(torch.cat((qk[:-1], ov), 1), torch.cat((qk[-1], bias))) if one else None
    return Composed(linear(qk[:-1], qk[-1]), linear(ov, bias), both)


def _separate(parts: Mapping[str, Tensor]) -> Separate:
    columns = [rearrange(parts[f"W_{kind}"], "head d e -> d (head e)") for kind in "QKV"]
    biases = [rearrange(parts[f"b_{kind}"], "head e -> (head e)") for kind in "QKV"]
    out = rearrange(parts["W_O"], "head e d -> (head e) d").contiguous()
    return Separate(Linear(torch.cat(columns, 1), torch.cat(biases)), Linear(out, parts["b_O"].clone()))


def composes(cfg: HookedDecisionTransformerConfig, l: int) -> bool:
    """Whether block ``l`` multiplies its queries' and keys' weights, and its values' and outputs', beforehand."""
    return cfg.n_heads == 1 or l == cfg.n_layers - 1


def attention_of(cfg: HookedDecisionTransformerConfig, l: int, parts: Mapping[str, Tensor]) -> Composed | Separate:
    """The attention of block ``l`` from its weights: ``W_Q [heads, d_model, d_head]``, ``b_Q``, ..., ``b_O``."""
    return _composed(parts) if composes(cfg, l) else _separate(parts)


def neurons_of(cfg: HookedDecisionTransformerConfig, l: int, device: torch.device) -> list[slice]:
    """The neurons of the parts in which block ``l`` computes its MLP.

    On a CPU a few at a time, so that what they give stays in its cache; the last block has one token, and does all.
    """
    step = NEURONS if device.type == "cpu" and l < cfg.n_layers - 1 else cfg.d_mlp
    return [slice(start, min(start + step, cfg.d_mlp)) for start in range(0, cfg.d_mlp, step)]


def mlp_of(neurons: Sequence[slice], W_in: Tensor, b_in: Tensor, W_gate: Tensor | None, W_out: Tensor) -> list[MlpPart]:
    """The parts of an MLP."""

    def part(own: slice) -> MlpPart:
        gate = None if W_gate is None else W_gate[:, own].clone(memory_format=torch.contiguous_format)
        write_in = Linear(W_in[:, own].clone(memory_format=torch.contiguous_format), b_in[own].clone())
        return MlpPart(write_in, gate, W_out[own].clone(memory_format=torch.contiguous_format))

    return [part(own) for own in neurons]


def terms_of_block(
    cfg: HookedDecisionTransformerConfig,
    l: int,
    parts: Mapping[str, Tensor],
    changes: Sequence[Change],
    neurons: Sequence[slice],
) -> Iterable[tuple[str, Term]]:
    """What changes of weights add to the products of block ``l``, whose attention has the weights ``parts``.

    A product of some of the MLP's ``neurons`` has their number after its name, such as ``W_in.0``.
    """
    heads, d, e = cfg.n_heads, cfg.d_model, cfg.d_head
    for kind in ("W_in", "W_gate", "W_out"):
        change = of_weight(changes, f"blocks.{l}.mlp.{kind}")
        if change is None:
            continue
        left, right = change
        for number, own in enumerate(neurons):
            yield f"{kind}.{number}", affine((left[own], right) if kind == "W_out" else (left, right[:, own]))
    for h in range(heads):
        found = {kind: of_weight(changes, f"blocks.{l}.attn.W_{kind}", heads, h) for kind in "QKVO"}
        if all(change is None for change in found.values()):
            continue
        if composes(cfg, l):
            own, (wq, wk, wv, wo), k = slice(h * d, h * d + d), _factors(parts, h), found["K"]
            qk = composed(wq, wk.T, found["Q"], None if k is None else (k[1].T, k[0].T), target=own)
            ov = composed(wv, wo, found["V"], found["O"], source=own)
            yield from ((name, term) for name, term in (("qk", qk), ("ov", ov)) if term is not None)
            continue
        for number, kind in enumerate("QKV"):
            if (change := found[kind]) is not None:
                start = (number * heads + h) * e
                yield "qkv", affine(change, target=slice(start, start + e))
        if (change := found["O"]) is not None:
            yield "out", affine(change, source=slice(h * e, h * e + e))
