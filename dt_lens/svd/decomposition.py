"""The singular directions of one named matrix, and which of them the weights' precision can distinguish.

``M = sum_i sigma_i left_i right_i^T``; for ``y = x M`` the left vectors live on the input side, the right ones on the
output side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dt_lens.errors import DtLensError
from dt_lens.lens.embeddings import Embedding
from dt_lens.lens.matrices import RESIDUAL, Matrix, MatrixFactors, SideName
from dt_lens.lens.printing import Printed, Rows, listed
from dt_lens.svd.solvers import EPS, decompose

__all__ = [
    "common_boundary",
    "MAX_ANGLE",
    "Decomposition",
    "blocks_of",
    "decompose_matrix",
    "rounding_noise",
    "scaled",
    "turned_outside",
    "with_canonical_signs",
]

# Two singular vectors count as distinguished when rounding the weights mixes them by less than this many radians ...
MAX_ANGLE = 0.1
# ... at so many standard deviations of what rounding does.
DEVIATIONS = 3.0
# The rounding of a weight with more than CHUNK entries is estimated from SAMPLE of its rows and columns.
CHUNK, SAMPLE = 2**18, 256
# The exponent's bits in each type of weights, and the integers of that size.
EXPONENT = {
    torch.float64: (torch.int64, 0x7FF << 52),
    torch.float32: (torch.int32, 0xFF << 23),
    torch.bfloat16: (torch.int16, 0xFF << 7),
    torch.float16: (torch.int16, 0x1F << 10),
}


@dataclass(frozen=True, eq=False, repr=False)
class Decomposition(Printed):
    """The singular directions of one matrix, largest sigma first, cut at its numerical rank.

    Attributes:
        sigma: ``[k]``.
        left, right: ``[k, d_left]``, ``[k, d_right]``, unit rows. Signs are canonical: the entry of largest magnitude
            on the first side that faces the residual stream is positive.
        folded: whether the LayerNorm before the matrix is folded in.
        blocks: the directions in groups, ``[start, stop)``; the sigmas of a group of more than one are too close to
            distinguish under rounding of the weights, and only its span means anything.
        error: the largest relative residual, measured; see ``dt_lens.svd.solvers.SVD``.
        gain: of directions weighted by activations (``dt_lens.svd.weighted``): the length of ``M right_i``; sigma
            is then the standard deviation of the output along ``right_i``, and the left rows are not orthogonal.
        activations: the digest of those activations, or an empty string.
        outside: for each direction and side (left, right) 0, or the number of directions that the matrix does not have
            there, if rounding the weights may turn this one out into those: then not even the span of its block is
            known. ``None``: not examined.
    """

    matrix: Matrix
    sigma: Float[Tensor, " k"]
    left: Float[Tensor, "k d_left"]
    right: Float[Tensor, "k d_right"]
    folded: bool
    blocks: tuple[tuple[int, int], ...]
    error: float
    gain: Float[Tensor, " k"] | None = None
    activations: str = ""
    outside: Int[Tensor, "k 2"] | None = None

    @property
    def strength(self) -> Float[Tensor, " k"]:
        """``M right_i = strength_i left_i``: sigma, unless the directions are weighted by activations."""
        return self.sigma if self.gain is None else self.gain

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the matrix, as tensors that a file can hold."""
        weighted = {} if self.gain is None else {"gain": self.gain, "activations": _text_tensor(self.activations)}
        marks = {} if self.outside is None else {"outside": self.outside}
        return (
            weighted
            | marks
            | {
                "sigma": self.sigma,
                "left": self.left,
                "right": self.right,
                "blocks": torch.tensor(self.blocks, dtype=torch.long).reshape(-1, 2),
                "error": torch.tensor([self.error, float(self.folded)], dtype=torch.float64),
            }
        )

    @classmethod
    def from_tensors(cls, matrix: Matrix, stored: Mapping[str, Tensor]) -> Decomposition:
        """The inverse of ``tensors``."""
        blocks = tuple((start, stop) for start, stop in stored["blocks"].tolist())
        error, folded = stored["error"].tolist()
        digest = bytes(stored["activations"].tolist()).decode() if "gain" in stored else ""
        parts = stored["sigma"], stored["left"], stored["right"]
        return cls(matrix, *parts, bool(folded), blocks, error, stored.get("gain"), digest, stored.get("outside"))

    def side(self, side: SideName | None = None) -> Float[Tensor, "k d"]:
        """The directions on a side by its name (``None``: the only side on the residual stream).

        Raises:
            DtLensError: for a side that does not exist, or ``None`` where the matrix has two.
        """
        return self.left if self.matrix.side(side) == "left" else self.right

    def spanning(self, side: SideName | None = None) -> Float[Tensor, "k d"]:
        """``side``, with the rows of a block orthonormal, so that lengths of projections on its span are right.

        Only the rows of ``left`` differ, and only where directions are weighted by activations.
        """
        rows = self.side(side)
        if self.gain is None or self.matrix.side(side) == "right":
            return rows
        rows = rows.clone()
        for start, stop in self.blocks:
            if stop - start > 1:
                rows[start:stop] = torch.linalg.qr(rows[start:stop].T)[0].T
        return rows

    def _maybe(self, side: SideName) -> Tensor | None:
        return self.side(side) if side in (self.matrix.left, self.matrix.right) else None

    @property
    def read(self) -> Float[Tensor, "k d_model"] | None:
        """Directions read from the stream, or ``None`` (QK has ``query`` and ``key``)."""
        return self._maybe("read")

    @property
    def write(self) -> Float[Tensor, "k d_model"] | None:
        """Directions written to the stream, or ``None``."""
        return self._maybe("write")

    @property
    def neuron(self) -> Float[Tensor, "k d_mlp"] | None:
        """Directions over the MLP's neurons, or ``None``."""
        return self._maybe("neuron")

    @property
    def head(self) -> Float[Tensor, "k d_head"] | None:
        """Directions inside the attention heads (all heads side by side, or one head's own), or ``None``."""
        return self._maybe("head")

    @property
    def query(self) -> Float[Tensor, "k d_model"] | None:
        """QK's directions on the query's stream, or ``None``."""
        return self._maybe("query")

    @property
    def key(self) -> Float[Tensor, "k d_model"] | None:
        """QK's directions on the key's stream, or ``None``."""
        return self._maybe("key")

    def block_of(self, sv: int) -> tuple[int, int]:
        """The group ``[start, stop)`` that direction ``sv`` belongs to.

        Raises:
            DtLensError: for a direction that does not exist.
        """
        for block in self.blocks:
            if block[0] <= sv < block[1]:
                return block
        raise DtLensError(f"sv={sv} is out of range: {self.matrix.name} has {len(self.sigma)} directions.")

    def indistinct(self, sv: int, side: SideName | None = None) -> int:
        """How many directions cannot be distinguished from direction ``sv`` on a side, itself included.

        Those of its block; and, where rounding the weights may turn it by more than ``MAX_ANGLE`` out of the span of
        all the matrix's directions, also those that the matrix does not have.

        Raises:
            DtLensError: as ``block_of`` and ``side`` do.
        """
        start, stop = self.block_of(sv)
        beyond = 0
        if self.outside is not None:
            beyond = int(self.outside[start:stop, 0 if self.matrix.side(side) == "left" else 1].max())
        return stop - start + beyond

    def as_embedding(self, side: SideName | None = None, k: int | None = None) -> Embedding:
        """The first ``k`` directions as an embedding, so that later layers can be compared with what this one writes.

        Raises:
            DtLensError: for a side that does not face the residual stream.
        """
        directions = self.side(side)[:k]
        if side is not None and side not in RESIDUAL:
            raise DtLensError(f"The {side} side of {self.matrix.name} is not in the residual stream.")
        labels = [f"{self.matrix.name}[{i}]" for i in range(len(directions))]
        return Embedding(directions, labels, kind="direction", side="in")

    def _shown(self) -> tuple[str, Rows]:
        sides = f"{self.matrix.left} [{self.left.shape[1]}] -> {self.matrix.right} [{self.right.shape[1]}]"
        how = "folded" if self.folded else "raw"
        how += f", weighted by the activations {self.activations}" if self.activations else ""
        title = (
            f"Decomposition({self.matrix.name}, {len(self.sigma)} directions, {sides}, {how}, error {self.error:.0e})"
        )
        sigma = [f"{value:.4g}" for value in self.sigma.tolist()]
        short = sigma if len(sigma) <= 7 else [*sigma[:5], "...", sigma[-1]]
        shared = [f"{start}-{stop - 1}" for start, stop in self.blocks if stop - start > 1]
        rows = [("sigma", ", ".join(short))]
        return title, [*rows, ("too close to distinguish", f"sv {listed(shared, 5)}")] if shared else rows


def decompose_matrix(
    factors: MatrixFactors, rank: int | None = None, *, seen: list[Tensor] | None = None, gram: Tensor | None = None
) -> Decomposition:
    """Decompose one catalogued matrix, with canonical signs and blocks.

    Args:
        factors: the matrix of a model, folded or raw.
        rank: how many directions at most; all when ``None``.
        seen: its effective factors, if they are at hand.
        gram: as for ``solvers.decompose``.

    Raises:
        DtLensError: when its weights hold NaN or infinite values, naming the matrix.
    """
    matrix = factors.matrix
    try:
        seen = factors.effective() if seen is None else seen
        found = decompose(seen, rank, _floor(factors), gram)
    except DtLensError as error:
        raise DtLensError(f"{matrix.name}: {error}") from error
    left, right = with_canonical_signs(matrix, found.left, found.right)
    met = _met(factors, left, right, seen)
    del seen
    blocks = blocks_of(found.sigma, rounding_noise(factors, left, right, met))
    every = rank is None or len(found.sigma) < rank
    outside = turned_outside(factors, left, right, (found.sigma, found.sigma), every, met=met)
    return Decomposition(matrix, found.sigma, left, right, factors.folded, blocks, found.error, outside=outside)


def _text_tensor(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def with_canonical_signs(
    matrix: Matrix, left: Float[Tensor, "k d_left"], right: Float[Tensor, "k d_right"]
) -> tuple[Tensor, Tensor]:
    """Flip pairs of rows so that the largest entry on the first side on the residual stream is positive."""
    sign_side = left if matrix.left in RESIDUAL else right
    largest = sign_side.gather(1, sign_side.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(left)
    return left * signs, right * signs


def _floor(factors: MatrixFactors) -> float:
    """The sigma that float64's rounding may leave of a matrix that centring removes."""
    if not factors.folded:
        return 0.0
    size = 8 * EPS
    for factor in factors.stored():
        # float64's norm of narrower numbers takes as long as a tenth of the decomposition; float32's is near enough.
        half = factor.element_size() == 2
        norm = float(torch.linalg.vector_norm(factor.float() if half else factor))
        if not 1e-15 < norm < 1e15:  # squares leave float32's range
            norm = float(torch.linalg.vector_norm(factor, dtype=torch.float64))
        size *= norm
    for scale in (factors.scale("left"), factors.scale("right")):
        size *= 1.0 if scale is None else float(scale.double().abs().max())
    return size


def rounding_noise(
    factors: MatrixFactors,
    left: Float[Tensor, "k d_left"],
    right: Float[Tensor, "k d_right"],
    met: list[Met] | None = None,
) -> Float[Tensor, " k"]:
    """The standard deviation of ``left_i^T E right_i``, ``E`` being what rounding the weights does to the matrix.

    Rounding errors are taken as independent and uniform over half a unit in the last place either way, which has the
    variance ``ulp^2 / 12`` (Higham, "Accuracy and Stability of Numerical Algorithms", section 2.8); a weight's table
    of variances is approximated by the product of its row and column means. A factor's error reaches the matrix
    through the LayerNorm and the other factor.
    """
    total = left.new_zeros(len(left))
    for rows, columns, x, y in met or _met(factors, left, right):
        total += (x.square() @ rows) * (y.square() @ columns) / rows.mean().clamp_min(1e-300)
    return total.sqrt()


class Met(NamedTuple):
    """One of a matrix's weights: the variances of its rounding, and the directions that meet it from either side."""

    rows: Float[Tensor, " m"]
    columns: Float[Tensor, " n"]
    left: Float[Tensor, "k m"]
    right: Float[Tensor, "k n"]


def _met(factors: MatrixFactors, left: Tensor, right: Tensor, seen: list[Tensor] | None = None) -> list[Met]:
    """The directions at each of the weights; ``seen`` are the effective factors, if they are at hand."""
    ahead, behind = scaled(left, factors.scale("left")), scaled(right, factors.scale("right"))
    arriving = [(ahead, behind)]
    if len(factors.matrix.factors) == 2:
        first, second = seen or factors.effective()
        arriving = [(ahead, right @ second.T), (left @ first, behind)]
    return [Met(*_variances(weight), *pair) for weight, pair in zip(factors.stored(), arriving, strict=True)]


def turned_outside(
    factors: MatrixFactors,
    left: Float[Tensor, "k d_left"],
    right: Float[Tensor, "k d_right"],
    sizes: tuple[Float[Tensor, " k"], Float[Tensor, " k"]],
    every: bool,
    ahead: Float[Tensor, "k d_left"] | None = None,
    met: list[Met] | None = None,
) -> Int[Tensor, "k 2"]:
    """Which directions rounding may turn out of the span of all of them, on the left and on the right.

    Where the matrix has ``k`` directions on a side of dimension ``d``, its error ``E`` moves ``left_i`` by
    ``E right_i / sigma_i``, of which a part of length about ``noise sqrt(d - k) / sigma_i`` lies outside their span
    (Stewart and Sun, "Matrix Perturbation Theory", 1990, chapter V), ``noise`` being the standard deviation of one
    entry of ``E right_i``. No gap between sigmas protects from that. In a circuit only the outer factor's error leaves
    the span.

    Args:
        sizes: what ``E right_i`` and ``left_i^T E`` are divided by: the sigmas.
        every: whether these are all the directions that the matrix has; otherwise it is taken to have full rank.
        ahead: what a row of the raw matrix's error is multiplied by from the left, if not ``left``.

    Returns:
        ``d - k`` where ``DEVIATIONS noise sqrt(d - k) / sigma`` is ``MAX_ANGLE`` or more, else 0.
    """
    weights = factors.stored()
    met = list(met or _met(factors, left, right))
    if ahead is not None:
        met[-1] = met[-1]._replace(left=ahead if len(met) == 1 else ahead @ factors.raw()[0])
    sides: tuple[Literal["left", "right"], Literal["left", "right"]] = ("left", "right")
    centred = [factors.folded and factors.matrix.centred(side) for side in sides]
    dimensions = [len(left.T) - centred[0], len(right.T) - centred[1]]
    k = len(left) if every else min(*dimensions, *(size for weight in weights for size in weight.shape))
    marks = []
    for side, d, size in zip(sides, dimensions, sizes, strict=True):
        rows, columns, x, y = met[0] if side == "left" else met[-1]
        along, across, coming = (rows, columns, y) if side == "left" else (columns, rows, x)
        scale = factors.scale(side)
        entry = (along if scale is None else along * scale.to(along).square()).mean()
        noise = (entry * (coming.square() @ across) / across.mean().clamp_min(1e-300)).sqrt()
        turned = DEVIATIONS * noise * math.sqrt(max(d - k, 0)) >= MAX_ANGLE * size
        marks.append((turned & (d > k)) * (d - k))
    return torch.stack(marks, 1)


def scaled(directions: Float[Tensor, "k d"], scale: Float[Tensor, " d"] | None) -> Float[Tensor, "k d"]:
    """Directions times the scale of a LayerNorm, if there is one."""
    return directions if scale is None else directions * scale.to(directions)


def _variances(weight: Float[Tensor, "m n"]) -> tuple[Float[Tensor, " m"], Float[Tensor, " n"]]:
    """The row means and the column means of the variances of rounding; of a large weight, over a sample of entries."""
    m, n = weight.shape
    every = [1, 1] if m * n <= CHUNK else [max(1, side // SAMPLE) for side in (m, n)]
    rows = _ulp(weight[:, :: every[1]]).square_()
    columns = rows if every == [1, 1] else _ulp(weight[:: every[0]]).square_()
    return rows.mean(1) / 12, columns.mean(0) / 12


def _ulp(weight: Tensor) -> Tensor:
    """The distance between neighbouring numbers at each entry, in float64; 0 at zero, which is exact."""
    kind = torch.finfo(weight.dtype)
    bits, exponent = EXPONENT[weight.dtype]
    # A number's exponent bits alone are the power of two below it; of subnormal numbers they are 0.
    power = (weight.view(bits) & exponent).view(weight.dtype).double()
    return power.mul_(kind.eps).clamp_min_(kind.tiny * kind.eps).masked_fill_(weight == 0, 0.0)


def blocks_of(sigma: Float[Tensor, " k"], noise: Float[Tensor, " k"]) -> tuple[tuple[int, int], ...]:
    """Neighbours share a block when rounding may mix them by more than ``MAX_ANGLE``.

    To first order two directions mix by ``(sigma_i a + sigma_j b) / (sigma_i^2 - sigma_j^2)``, where ``a`` and ``b``
    are the matrix's errors between them (Stewart and Sun, "Matrix Perturbation Theory", 1990, chapter V): at most the
    noise over the gap.
    """
    if not len(sigma):
        return ()
    between = torch.maximum(noise[:-1], noise[1:])
    apart = sigma[:-1] - sigma[1:] > DEVIATIONS * between / MAX_ANGLE
    starts = [0, *(int(i) + 1 for i in apart.nonzero())]
    return tuple(zip(starts, [*starts[1:], len(sigma)], strict=True))


def common_boundary(a: Decomposition, b: Decomposition, k: int, whole: bool = True) -> int:
    """The number of leading directions nearest to ``k`` that cuts no block of near-equal sigmas in either; 0 if none.

    Without ``whole``, only leading directions were decomposed, and the last block may be cut.
    """
    ends = {stop for _, stop in a.blocks} & {stop for _, stop in b.blocks}
    if not whole:
        ends -= {len(a.sigma), len(b.sigma)}
    return min(sorted(ends), key=lambda end: abs(end - k), default=0)
