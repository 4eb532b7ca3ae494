"""Sum up, over many forward passes, what each matrix reads and what is in the residual stream, in float64.

Only sums are kept, so the memory does not grow with the number of passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from dt_lens.errors import DtLensError
from dt_lens.lens.activations import Moments
from dt_lens.lens.matrices import Matrix, Snapshot, catalogue, norm_scale, select_matrices
from dt_lens.lens.weights import fingerprint

if TYPE_CHECKING:
    from dt_lens.lens.protocol import Lens

__all__ = ["Watch"]

STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")


class _Sums:
    """Running first and second sums over the vectors at one place."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def add(self, x: Float[Tensor, "n d"]) -> None:
        x = x.double()
        if self.first is None or self.second is None:
            self.first, self.second = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        self.count += len(x)
        self.first += x.sum(0)
        self.second.addmm_(x.T, x)

    def moments(self) -> Moments:
        assert self.first is not None and self.second is not None
        second = self.second / self.count
        return Moments(self.count, (self.first / self.count).cpu(), ((second + second.T) / 2).cpu())


class Watch:
    """Sums over the activations that some matrices of a model read.

    Args:
        model: a wrapped model, as it is now.
        matrices: shell patterns; every catalogued matrix when ``None``. The parts of single heads come with the whole.
        last_narrows: in the last block, count queries, what heads gather and the MLP only for tokens that are ``used``.

    Attributes:
        hooks: the activations that ``add`` wants, under TransformerLens's names, where the model has them.
        reads: the place of what each matrix reads.
        made_of: a hash of each matrix.
    """

    def __init__(self, model: Lens, matrices: Sequence[str] | str | None = None, *, last_narrows: bool = False) -> None:
        lens = Snapshot.of(model)
        self._lens = lens
        self._eps = float(getattr(model.cfg, "eps", 0.0))
        self._narrow = lens.structure.n_layers - 1 if last_narrows else -1
        chosen = {matrix.name for matrix in select_matrices(lens, matrices)}
        # A head's own matrix comes with the whole one.
        every = catalogue(lens, per_head=True)
        wanted = [m for m in every.values() if m.name in chosen or m.name.rpartition(".")[0] in chosen]
        self.reads = {matrix.name: self._place(matrix) for matrix in wanted}
        # A QK circuit also reads keys, which are more tokens than the queries.
        self._places = {*self.reads.values(), *(f"blocks.{m.layer}.attn_in" for m in wanted if m.kind == "QK")}
        self.made_of = {matrix.name: fingerprint(lens, matrix).hex() for matrix in wanted}
        self.hooks = self._hooks()
        self._sums: dict[str, _Sums] = {}
        self._stream: dict[str, _Sums] = {}

    def _place(self, matrix: Matrix) -> str:
        """The place in the forward pass of what a matrix reads."""
        block = f"blocks.{matrix.layer}"
        match matrix.kind:
            case "W_K" | "W_V":
                return f"{block}.attn_in"
            case "W_Q" | "QK":
                return f"{block}.attn_in{'.query' if matrix.layer == self._narrow else ''}"
            case "W_O":
                return f"{block}.attn.hook_z{'' if matrix.head is None else f'.{matrix.head}'}"
            case "OV":
                return f"{block}.attn.gathered.{matrix.head}"
            case "W_in" | "W_gate":
                return f"{block}.mlp_in"
            case "W_out":
                return f"{block}.mlp.hook_post"
        raise DtLensError(f"It is not known what {matrix.name} reads.")

    def _hooks(self) -> frozenset[str]:
        structure, hooks = self._lens.structure, set[str]()
        places = self._places
        for layer in range(structure.n_layers):
            block = f"blocks.{layer}"
            hooks |= {f"{block}.{name}" for name in STREAM}
            for norm in (structure.attn_norm[layer], structure.mlp_norm[layer]):
                hooks |= set() if norm is None else {f"{norm}.hook_normalized"}
            mine = {place for place in places if place.startswith(f"{block}.")}
            hooks |= {f"{block}.attn.hook_z"} if any(".hook_z" in place for place in mine) else set()
            hooks |= {f"{block}.attn.hook_pattern"} if any(".gathered." in place for place in mine) else set()
            hooks |= {f"{block}.mlp.hook_post"} & mine
        return frozenset(hooks)

    def add(
        self,
        cache: Mapping[str, Tensor],
        real: Bool[Tensor, "batch token"],
        used: Bool[Tensor, "batch token"] | None = None,
    ) -> None:
        """Count one batch.

        Args:
            cache: its activations, ``[batch, token, ...]``, those of ``hooks`` that the model has.
            real: the tokens to count, without padding.
            used: those among them whose output in the last block is read; with ``last_narrows``.
        """
        for layer in range(self._lens.structure.n_layers):
            narrow = layer == self._narrow and used is not None
            self._add_block(cache, layer, real, used if narrow and used is not None else real)

    def _add_block(self, cache: Mapping[str, Tensor], layer: int, real: Tensor, used: Tensor) -> None:
        block, structure = f"blocks.{layer}", self._lens.structure
        for name, rows in zip((f"{block}.{name}" for name in STREAM), (real, used, used), strict=True):
            if name in cache:
                self._stream.setdefault(name, _Sums()).add(cache[name][rows])
        if layer == self._narrow and f"{block}.{STREAM[0]}" in cache:
            # What attention adds to, at the tokens that are used.
            self._stream.setdefault(f"{block}.{STREAM[0]}.query", _Sums()).add(cache[f"{block}.{STREAM[0]}"][used])
        places = {place for place in self._places if place.startswith(f"{block}.")}
        attn_in, query, mlp_in = (f"{block}.{name}" for name in ("attn_in", "attn_in.query", "mlp_in"))
        gathered = sorted(place for place in places if ".gathered." in place)
        if gathered or places & {attn_in, query}:
            x = self._entry(cache, structure.attn_norm[layer], f"{block}.hook_resid_pre")
            self._count(places, attn_in, x, real)
            self._count(places, query, x, used)
            # Padding is never attended to, and some models compute NaN there.
            attended = x.where(real[..., None], 0.0)
            for place in gathered:
                pattern = cache[f"{block}.attn.hook_pattern"][:, int(place.rpartition(".")[2])]
                self._count(places, place, einsum(pattern.double(), attended, "n q k, n k d -> n q d"), used)
        if mlp_in in places:
            stream = f"{block}.hook_resid_{'pre' if structure.parallel else 'mid'}"
            self._count(places, mlp_in, self._entry(cache, structure.mlp_norm[layer], stream), used)
        hook_z, post = f"{block}.attn.hook_z", f"{block}.mlp.hook_post"
        if hook_z in cache:
            z = cache[hook_z]
            if any(place.startswith(hook_z) for place in places):
                self._sums.setdefault(hook_z, _Sums()).add(rearrange(z, "n t h e -> n t (h e)")[used])
        if post in places:
            self._count(places, post, cache[post], used)

    def _count(self, places: set[str], place: str, x: Tensor, rows: Tensor) -> None:
        if place in places:
            self._sums.setdefault(place, _Sums()).add(x[rows])

    def _entry(self, cache: Mapping[str, Tensor], norm: str | None, stream: str) -> Float[Tensor, "n t d_model"]:
        """What a sublayer's matrices are applied to, in float64: the stream, or what its norm makes of it."""
        if norm is None:
            return cache[stream].double()
        weights, name = self._lens.weights, f"{norm}.hook_normalized"
        if name in cache:
            bare = cache[name].double()
        else:
            bare = cache[stream].double()
            if not self._lens.structure.rms:
                bare = bare - bare.mean(-1, keepdim=True)
            bare = bare / (bare.square().mean(-1, keepdim=True) + self._eps).sqrt()
        shift = weights[f"{norm}.b"].double() if f"{norm}.b" in weights else 0.0
        return bare * norm_scale(self._lens, norm).double() + shift

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return max((sums.count for sums in self._stream.values()), default=0)

    def moments(self) -> tuple[dict[str, Moments], dict[str, Moments]]:
        """The moments by place, and those of the stream.

        Raises:
            DtLensError: if no token was counted, or an activation is not finite.
        """
        if not self.tokens:
            raise DtLensError("No token was seen, so there are no activations; use more episodes or texts.")
        points, stream = ({name: sums.moments() for name, sums in kind.items()} for kind in (self._sums, self._stream))
        for found in (points, stream):
            for name, moments in found.items():
                if not bool(torch.isfinite(moments.second).all()):
                    raise DtLensError(f"The activations at {name} are not finite; the model cannot run on this.")
        return {
            place: self._part(place, points) for place in dict.fromkeys((*self.reads.values(), *sorted(self._places)))
        }, stream

    def _part(self, place: str, points: Mapping[str, Moments]) -> Moments:
        """The moments of a place; for one head's input of ``W_O``, a block of those of all heads."""
        if place in points:
            return points[place]
        whole, _, head = place.rpartition(".")
        d_head = self._lens.weights[f"{whole.removesuffix('.hook_z')}.W_O"].shape[1]
        mine = slice(int(head) * d_head, (int(head) + 1) * d_head)
        return Moments(points[whole].count, points[whole].mean[mine].clone(), points[whole].second[mine, mine].clone())
