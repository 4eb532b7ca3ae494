"""The catalogue of a model's matrices: each one's name, two sides, factors, and the LayerNorm in front of it.

A matrix ``M [d_left, d_right]`` acts as ``y = x @ M``. Some are weights; ``OV.h = W_V[h] W_O[h]`` and
``QK.h = W_Q[h] W_K[h]^T`` are circuits, products of two thin factors (Elhage et al., "A Mathematical Framework for
Transformer Circuits", 2021).

Folding: a matrix that reads the stream sees ``(x - mean) / std * w + b``, so up to the scale it acts on the stream as
``(I - 11^T/d) diag(w) W``. The folded matrix is that product. Where what a matrix gives passes an RMSNorm before it
joins the stream, it writes ``y / rms * w``, so up to the scale the folded matrix is ``W diag(w)``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from dt_lens.arguments import names, require_wrapped
from dt_lens.errors import DtLensError, as_written, nearest

__all__ = [
    "RESIDUAL",
    "Factor",
    "Matrix",
    "MatrixFactors",
    "SideName",
    "Snapshot",
    "Structure",
    "Weighted",
    "catalogue",
    "find_matrix",
    "fold",
    "norm_scale",
    "select_matrices",
    "unfold",
]

SideName = Literal["read", "write", "neuron", "head", "query", "key"]
RESIDUAL: tuple[SideName, ...] = ("read", "write", "query", "key")  # the sides that face the residual stream


class Structure(NamedTuple):
    """The facts about a model that the catalogue needs.

    ``attn_norm[l]`` and ``mlp_norm[l]`` are the prefixes (``"blocks.0.ln1"``) of the LayerNorm that layer ``l``'s
    attention and MLP read through, or ``None`` where they read the stream itself (no LayerNorm, or post-LayerNorm
    blocks).

    Attributes:
        n_kv_heads: heads of ``W_K`` and ``W_V`` where several query heads share one (grouped-query attention); ``None``
            where every head has its own.
        rms: the norms divide by the root mean square and do not centre (RMSNorm); they have no bias.
        parallel: attention and MLP read the same stream, and both are added to it at once (GPT-J).
        rotary: queries and keys are rotated by their position before the score; QK is then the circuit of two tokens at
            the same position.
        qk_norm: queries and keys each pass a norm before the score. It stands between the factors of QK, so that the
            score is no bilinear form of the stream, and the catalogue has no QK circuits.
        alibi: what each head's scores gain for every position that a key is further on (ALiBi); empty without.
        attn_post_norm: the RMSNorm that what layer ``l``'s attention gives passes before it joins the stream; empty
            where there is none.
        mlp_post_norm: the same of the MLP.
        unit_offset: the norms multiply by 1 + their weight.
        attn_softcap: a score ``s`` enters the softmax as ``cap * tanh(s / cap)``.
    """

    n_layers: int
    n_heads: int
    d_model: int
    attn_scale: tuple[float, ...]  # the factor of the attention scores, per layer
    attn_norm: tuple[str | None, ...]
    mlp_norm: tuple[str | None, ...]
    n_kv_heads: int | None = None
    rms: bool = False
    parallel: bool = False
    rotary: bool = False
    qk_norm: bool = False
    alibi: tuple[float, ...] = ()
    attn_post_norm: tuple[str, ...] = ()
    mlp_post_norm: tuple[str, ...] = ()
    unit_offset: bool = False
    attn_softcap: float | None = None

    @property
    def queries_per_key(self) -> int:
        """Query heads that share one head of keys and values."""
        return self.n_heads // (self.n_kv_heads or self.n_heads)


class Weighted(Protocol):
    """Anything with weights by canonical name and a structure: a wrapped model, or a snapshot of one."""

    @property
    def weights(self) -> Mapping[str, Tensor]: ...

    @property
    def structure(self) -> Structure: ...


class Snapshot(NamedTuple):
    """The weights and structure of a model, collected once: a wrapped model collects them again at each access."""

    weights: Mapping[str, Tensor]
    structure: Structure

    @classmethod
    def of(cls, model: Weighted) -> Snapshot:
        return model if isinstance(model, cls) else cls(model.weights, model.structure)


class Factor(NamedTuple):
    """One two-dimensional factor of a matrix: a weight, or one head's slice of it, possibly transposed.

    ``pattern`` is the einops pattern from the weight (or its slice) to the factor.
    """

    weight: str
    pattern: str
    head: int | None = None

    def view(self, weights: Mapping[str, Tensor]) -> Float[Tensor, "left right"]:
        """The factor in the weight's own dtype; a view where the pattern allows."""
        weight = weights[self.weight]
        return rearrange(weight if self.head is None else weight[self.head], self.pattern)

    def scatter(self, change: Float[Tensor, "left right"], weights: Mapping[str, Tensor]) -> Tensor:
        """``change`` of the factor as a change of the whole weight, zero outside this head; in ``change``'s dtype."""
        weight = weights[self.weight]
        heads = {"h": weight.shape[0]} if weight.ndim == 3 and self.head is None else {}
        back = rearrange(change, _inverse(self.pattern), **heads)
        if self.head is None:
            return back
        whole = change.new_zeros(weight.shape)
        whole[self.head] = back
        return whole


def _inverse(pattern: str) -> str:
    before, after = pattern.split(" -> ")
    return f"{after} -> {before}"


@dataclass(frozen=True)
class Matrix:
    """One catalogued matrix: its name, its place in the model, its sides, and how to compute it.

    ``left_norm`` and ``right_norm`` are the norms between its sides and the stream: before a side that reads, behind
    one that writes.
    """

    name: str
    kind: str  # W_in, W_out, W_Q, W_K, W_V, W_O, OV, QK
    layer: int
    head: int | None
    left: SideName
    right: SideName
    factors: tuple[Factor, ...]
    left_norm: str | None = None
    right_norm: str | None = None
    rms: bool = False  # the norms scale and do not centre

    @property
    def residual_sides(self) -> tuple[SideName, ...]:
        """The sides that face the residual stream, left first."""
        return tuple(side for side in (self.left, self.right) if side in RESIDUAL)

    @property
    def foldable(self) -> bool:
        """Whether a norm stands between this matrix and the stream."""
        return self.left_norm is not None or self.right_norm is not None

    def side(self, side: str | None) -> Literal["left", "right"]:
        """Which of ``left`` and ``right`` a side's name means; ``None`` is the only side on the residual stream.

        Raises:
            DtLensError: for a side that this matrix does not have, or ``None`` if two sides face the stream.
        """
        if side is None:
            if len(self.residual_sides) != 1:
                raise DtLensError(
                    f"{self.name} has two sides on the residual stream; pass side={self.left!r} or side={self.right!r}."
                )
            side = self.residual_sides[0]
        if isinstance(side, str) and side in (self.left, self.right):
            return "left" if side == self.left else "right"
        raise DtLensError(
            f"{self.name} has no side {as_written(str(side))}; it has {self.left!r} and {self.right!r}."
            + nearest(side, (self.left, self.right))
        )

    def norm(self, side: Literal["left", "right"]) -> str | None:
        """The prefix of the norm (``"blocks.0.ln1"``) that a side reads or writes through, or ``None``."""
        return self.left_norm if side == "left" else self.right_norm

    def centred(self, side: Literal["left", "right"]) -> bool:
        """Whether a side reads through a norm that removes constants."""
        return self.norm(side) is not None and not self.rms

    def raw(self, lens: Weighted) -> list[Tensor]:
        """The factors ``[d_left, r]``, ``[r, d_right]`` (or the one) in float64; their product is the matrix."""
        weights = lens.weights
        return [factor.view(weights).double() for factor in self.factors]

    def folded(self, lens: Weighted) -> list[Tensor]:
        """The factors with the LayerNorm folded in: centred and scaled on every side that reads through one."""
        weights = lens.weights
        stored = [factor.view(weights) for factor in self.factors]
        # What is a copy of the weights is folded where it is, so that a large matrix is in memory once.
        own = all(part.dtype != torch.float64 for part in stored)
        return list(self.fold_change(lens, *(part.double() for part in stored), own=own))

    def fold_change(self, lens: Weighted, *factors: Tensor, own: bool = False) -> tuple[Tensor, ...]:
        """The factors of a raw matrix of this name, with its norms folded into the first and the last.

        With ``own`` they are written into the factors' own memory.
        """
        lens, found = Snapshot.of(lens), list(factors)
        if self.left_norm is not None:
            found[0] = fold(found[0], norm_scale(lens, self.left_norm), not self.rms, own)
        if self.right_norm is not None:
            found[-1] = fold(found[-1].T, norm_scale(lens, self.right_norm), not self.rms, own).T
        return tuple(found)

    def dense(self, lens: Weighted, fold_layernorm: bool = True) -> Float[Tensor, "left right"]:
        """The matrix itself, in float64."""
        factors = self.folded(lens) if fold_layernorm else self.raw(lens)
        return factors[0] if len(factors) == 1 else factors[0] @ factors[1]


@dataclass(frozen=True, eq=False)
class MatrixFactors:
    """One catalogued matrix of one model: its factors in float64, raw and with its LayerNorms folded in.

    They are computed whenever they are asked for: a large matrix takes much memory, and folding it takes little time.

    Attributes:
        lens: the model's weights and structure.
        matrix: which matrix.
        folded: whether ``effective`` factors are the folded ones; always ``False`` if no norm stands at either side.
    """

    lens: Snapshot
    matrix: Matrix
    folded: bool

    @classmethod
    def of(cls, lens: Weighted, matrix: Matrix, fold_layernorm: bool = True) -> MatrixFactors:
        return cls(Snapshot.of(lens), matrix, fold_layernorm and matrix.foldable)

    def stored(self) -> list[Tensor]:
        """The factors in the weights' own dtype; views where the patterns allow."""
        return [factor.view(self.lens.weights) for factor in self.matrix.factors]

    def raw(self) -> list[Tensor]:
        """The factors without any LayerNorm."""
        return self.matrix.raw(self.lens)

    def effective(self) -> list[Tensor]:
        """The factors as they act on the residual stream: folded where ``folded`` says so, otherwise raw."""
        return self.matrix.folded(self.lens) if self.folded else self.raw()

    def scale(self, side: Literal["left", "right"]) -> Float[Tensor, " d_model"] | None:
        """The scale of the LayerNorm that is folded in on a side, or ``None``."""
        norm = self.matrix.norm(side) if self.folded else None
        return None if norm is None else norm_scale(self.lens, norm)


def norm_scale(lens: Weighted, norm: str) -> Tensor:
    """What the norm of this prefix multiplies by: its weight, or 1 more than that, which is float64."""
    w = lens.weights[f"{norm}.w"]
    return w.double() + 1 if lens.structure.unit_offset else w


def fold(
    matrix: Float[Tensor, "d_model out"], w: Float[Tensor, " d_model"], centre: bool = True, own: bool = False
) -> Float[Tensor, "d_model out"]:
    """``(I - 11^T/d) diag(w) matrix``: a matrix with the LayerNorm in front of it, of scale ``w``, folded in.

    The mean runs over the stream, which is the matrix's input, not over its outputs. Without ``centre`` it stays, as in
    front of an RMSNorm (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019). With ``own`` the matrix's
    own memory is written.
    """
    scaled = matrix.mul_(w.to(matrix)[:, None]) if own else w.to(matrix)[:, None] * matrix
    # In place, so that memory does not hold a large matrix three times.
    return scaled.sub_(scaled.mean(0, keepdim=True)) if centre else scaled


def unfold(change: Float[Tensor, "d_model out"], w: Float[Tensor, " d_model"], norm: str) -> Tensor:
    """A change of the folded matrix carried back to the raw weight: ``diag(1/w) change``, ``[d_model, out]``.

    ``change`` must have columns of mean zero, as folded matrices do; then folding the result gives ``change`` back.

    Raises:
        DtLensError: if a scale in ``w`` is zero: the raw weight's row then has no effect.
    """
    if bool((w == 0).any()):
        where = int((w == 0).nonzero()[0])
        raise DtLensError(
            f"The LayerNorm {norm} has scale 0 at coordinate {where}, so an edit of the folded matrix cannot be "
            "carried back to the raw weight; use fold_layernorm=False."
        )
    return change / w.to(change)[:, None]


# kind: (left side, right side, einops pattern that puts all heads side by side)
ATTENTION: dict[str, tuple[SideName, SideName, str]] = {
    "W_Q": ("read", "head", "h d e -> d (h e)"),
    "W_K": ("read", "head", "h d e -> d (h e)"),
    "W_V": ("read", "head", "h d e -> d (h e)"),
    "W_O": ("head", "write", "h e d -> (h e) d"),
}


def catalogue(lens: Weighted, per_head: bool = False) -> dict[str, Matrix]:
    """Every matrix of a model by name, in the order of the forward pass.

    ``blocks.{l}.attn.W_Q``, ``W_K``, ``W_V`` and ``W_O`` hold all heads side by side, ``[d_model, n_heads * d_head]``;
    with ``per_head`` each head's own is listed too, as ``blocks.{l}.attn.W_Q.{h}``.
    """
    require_wrapped(lens, "A list of matrices", "structure", "weights")
    return dict(_catalogue(lens.structure, frozenset(lens.weights), per_head))


@lru_cache(maxsize=16)
def _catalogue(structure: Structure, weights: frozenset[str], per_head: bool) -> dict[str, Matrix]:
    found: dict[str, Matrix] = {}

    def add(matrix: Matrix) -> None:
        if all(factor.weight in weights for factor in matrix.factors):
            found[matrix.name] = replace(matrix, rms=structure.rms)

    for layer in range(structure.n_layers):
        attn, mlp = f"blocks.{layer}.attn", f"blocks.{layer}.mlp"
        norm = structure.attn_norm[layer]
        behind = structure.attn_post_norm[layer] if structure.attn_post_norm else None
        for kind, (left, right, merged) in ATTENTION.items():
            norms = (norm, None) if left == "read" else (None, behind)
            add(Matrix(f"{attn}.{kind}", kind, layer, None, left, right, (Factor(f"{attn}.{kind}", merged),), *norms))
            heads = structure.n_heads // (structure.queries_per_key if kind in ("W_K", "W_V") else 1)
            for head in range(heads) if per_head else ():
                factor = Factor(f"{attn}.{kind}", "a b -> a b", head)
                add(Matrix(f"{attn}.{kind}.{head}", kind, layer, head, left, right, (factor,), *norms))
        for head in range(structure.n_heads):
            shared = head // structure.queries_per_key
            q, o = (Factor(f"{attn}.W_{letter}", "a b -> a b", head) for letter in "QO")
            k, v = (Factor(f"{attn}.W_{letter}", "a b -> a b", shared) for letter in "KV")
            k = k._replace(pattern="d e -> e d")
            add(Matrix(f"{attn}.OV.{head}", "OV", layer, head, "read", "write", (v, o), norm, behind))
            if not structure.qk_norm:
                add(Matrix(f"{attn}.QK.{head}", "QK", layer, head, "query", "key", (q, k), norm, norm))
        norm = structure.mlp_norm[layer]
        for kind in ("W_in", "W_gate"):
            whole = (Factor(f"{mlp}.{kind}", "a b -> a b"),)
            add(Matrix(f"{mlp}.{kind}", kind, layer, None, "read", "neuron", whole, norm))
        behind = structure.mlp_post_norm[layer] if structure.mlp_post_norm else None
        whole = (Factor(f"{mlp}.W_out", "a b -> a b"),)
        add(Matrix(f"{mlp}.W_out", "W_out", layer, None, "neuron", "write", whole, None, behind))
    return found


def find_matrix(lens: Weighted, name: str, head: int | None = None) -> Matrix:
    """The catalogued matrix called ``name``, or that head's own when ``head`` is given.

    Raises:
        DtLensError: for an unknown name, with the nearest known one.
    """
    if not isinstance(name, str):
        raise DtLensError(f"A matrix is named by text, such as 'blocks.0.mlp.W_in', not {name!r}.")
    require_wrapped(lens, "find_matrix", "structure", "weights")
    lens = Snapshot.of(lens)
    known = catalogue(lens, per_head=True)
    wanted = name if head is None else f"{name}.{head}"
    if wanted in known:
        return known[wanted]
    if head is not None and (name in known or f"{name}.0" in known):
        if f"{name}.0" not in known:
            raise DtLensError(f"{name} has no heads; leave head out.")
        raise DtLensError(f"{name} has no head {head}; the model's heads are 0 to {lens.structure.n_heads - 1}.")
    _require_circuit(lens.structure, wanted)
    raise DtLensError(
        f"The model has no matrix {wanted!r}."
        + (nearest(wanted, known) or f" It has {', '.join(list(known)[:3])}, ...")
    )


def _require_circuit(structure: Structure, name: str) -> None:
    """Raise for the name or pattern of a QK circuit of a model that has none."""
    if structure.qk_norm and "QK" in name.split("."):
        raise DtLensError(
            f"The model has no circuit {name!r}: its queries and keys pass a norm of their own before the score, so "
            "that W_Q W_K^T does not give it; use W_Q and W_K."
        )


def select_matrices(lens: Weighted, patterns: Sequence[str] | str | None = None) -> list[Matrix]:
    """The catalogued matrices that match any of the shell-style ``patterns`` (all when ``None``), in forward order.

    Raises:
        DtLensError: for something that is not a pattern, or one that matches nothing, with the nearest name.
    """
    require_wrapped(lens, "A list of matrices", "structure", "weights")
    lens = Snapshot.of(lens)
    listed = catalogue(lens)
    if patterns is None:
        return list(listed.values())
    everything = catalogue(lens, per_head=True)
    chosen: set[str] = set()
    for pattern in names(patterns, "matrices"):
        # A star matches the listed ones only; a single head of W_Q, W_K, W_V or W_O must be named in full.
        matched = [name for name in listed if fnmatch.fnmatchcase(name, pattern)]
        matched = matched or [name for name in everything if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            _require_circuit(lens.structure, pattern)
            near = nearest(pattern, everything)
            kinds = ", ".join(dict.fromkeys(f"'*.{m.kind}{'' if m.head is None else '.*'}'" for m in listed.values()))
            known = f"; give names, such as {next(iter(listed), 'none')}, or patterns, such as {kinds}."
            raise DtLensError(f"No matrix of the model matches {pattern!r}" + (f".{near}" if near else known))
        chosen.update(matched)
    return [matrix for name, matrix in everything.items() if name in chosen]
