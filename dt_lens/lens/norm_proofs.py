"""The part of ``certify`` that proves norms: before a block's matrices, behind them, and of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dt_lens.lens.diagnosis import Check
from dt_lens.lens.matrices import Matrix, Snapshot, norm_scale
from dt_lens.lens.weights import CHUNK

if TYPE_CHECKING:
    from dt_lens.lens.protocol import Lens

__all__ = ["NormProofs", "some_columns", "through"]


class NormProofs:
    """The checks of the norms inside a block; ``check`` and ``kept`` are the walk's."""

    truth: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    found: Mapping[str, Matrix]

    def __init__(self, model: Lens) -> None:
        self.norm_eps = float(getattr(model.cfg, "eps", 0.0))
        self.model = Snapshot.of(model)
        self.weights, self.structure = self.model

    def check(self, part: str, computed: Tensor, expected: Tensor) -> Check:
        raise NotImplementedError

    def kept(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def qk_norms(self, layer: int) -> Iterator[Check]:
        """The norms of queries and of keys, of each head's own or of all heads together."""
        for letter in "qk" if self.structure.qk_norm else "":
            norm = f"blocks.{layer}.attn.{letter}_norm"
            x, w = self.truth[f"blocks.{layer}.attn.hook_{letter}"].double(), self.scale(norm)
            heads = (-1,) if w.ndim == 1 else (-2, -1)
            made = x / (x.square().mean(heads, keepdim=True) + self.norm_eps).sqrt() * w
            yield self.check(norm, self.kept(made), self.kept(self.truth[f"blocks.{layer}.attn.{letter}_normed"]))

    def layernorm(self, entry: str, norm: str | None) -> Iterator[Check]:
        if norm is not None and entry in self.truth:
            yield self.check(norm, self.kept(self.normalized(norm)), self.kept(self.truth[entry]))

    def bare(self, norm: str) -> Tensor:
        """The stream centred and divided by its scale: a folded LayerNorm does nothing else."""
        if f"{norm}.hook_normalized" in self.own:
            return self.own[f"{norm}.hook_normalized"].double()
        block, _, which = norm.rpartition(".")
        last = f"blocks.{self.structure.n_layers - 1}.hook_resid_post"
        middle = f"{block}.hook_resid_{'pre' if self.structure.parallel else 'mid'}"
        names = {"ln1": f"{block}.hook_resid_pre", "ln2": middle, "embed_ln": "hook_embed", "ln_final": last}
        names |= {"ln1_post": f"{block}.attn_out", "ln2_post": f"{block}.mlp_out"}
        x = self.truth[names[which]].double()
        if not self.structure.rms:
            x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + self.norm_eps).sqrt()

    def normalized(self, norm: str) -> Tensor:
        """A norm's output: scaled and, unless it is an RMSNorm, shifted."""
        return self.bare(norm) * self.scale(norm) + self.shift(norm)

    def scale(self, norm: str) -> Tensor:
        """What a norm multiplies by, in float64."""
        return norm_scale(self.model, norm).double()

    def shift(self, norm: str) -> Tensor:
        """The bias of a norm; an RMSNorm has none."""
        bias = self.weights.get(f"{norm}.b")
        return torch.zeros_like(self.weights[f"{norm}.w"], dtype=torch.float64) if bias is None else bias.double()

    def entry(self, entry: str, norm: str | None, stream: str) -> Tensor:
        """What a sublayer's matrices are applied to: the stream, or the output of its LayerNorm."""
        if norm is None:
            return self.truth[stream]
        if entry in self.truth:
            return self.truth[entry]
        return self.normalized(norm)

    def written(self, name: str, x: Tensor, norm: str | None, which: str) -> Iterator[Check]:
        """The norm behind attention or MLP, and the matrix ``name`` that writes through it, with it folded in."""
        if norm is None:
            return
        block = norm.rpartition(".")[0]
        raw, out = self.truth[f"{block}.{which}_out"].double(), self.kept(self.truth[f"{block}.hook_{which}_out"])
        yield self.check(norm, self.kept(self.normalized(norm)), out)
        (factor,) = self.found[name].factors
        W, x = factor.view(self.weights), self.kept(x)
        made = torch.zeros_like(out)
        for rows in some_columns(W.T):
            made += x[..., rows] @ self.found[name].fold_change(self.model, W[rows].double())[-1]
        head, _, leaf = name.rpartition(".")
        bias = self.weights.get(f"{head}.b{leaf[1:]}")
        made = made if bias is None else made + bias.double() * self.scale(norm)
        size = (raw.square().mean(-1, keepdim=True) + self.norm_eps).sqrt()
        yield self.check(f"{name} with its LayerNorm folded", made / self.kept(size), out)


def through(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``x`` times a circuit, factor by factor."""
    for factor in factors:
        x = x @ factor
    return x


def some_columns(W: Tensor) -> Iterator[slice]:
    """The columns of a weight, a few at a time."""
    step = max(1, CHUNK // len(W))
    for start in range(0, W.shape[1], step):
        yield slice(start, min(start + step, W.shape[1]))
