"""How one matrix differs between two models: the change itself, the spectra, and the leading subspaces.

A matrix whose weights are equal bit for bit is not decomposed.

A circuit's change is never multiplied out: ``B1 B2 - A1 A2 = [B1 - A1, A1] [B2; B2 - A2]`` is a product of thin factors
again, and of small numbers where the change is small, so that no digits cancel.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import subspace_angles
from torch import Tensor

from dt_lens.errors import DtLensError
from dt_lens.lens.matrices import MatrixFactors
from dt_lens.lens.weights import all_finite
from dt_lens.svd.decomposition import Decomposition, common_boundary, decompose_matrix
from dt_lens.svd.leading import symmetric_product
from dt_lens.svd.side_by_side import in_order
from dt_lens.svd.solvers import EPS, triangle

__all__ = ["VERSION", "Measured", "change_factors", "haar_angle", "leading", "measure", "sizes", "unchanged"]

VERSION = 2  # raised whenever a row may differ in a bit: it is part of the keys of stored rows

Array = NDArray[np.float64]
LARGE = 1024  # from this short side on only the leading directions are computed, and the spectrum without directions
GRAM = 256  # an oblong matrix beyond this gives its sigmas through its Gram matrix
SPARE = 8  # directions beyond the leading ones, to see where a block of near-equal sigmas ends


class Measured(NamedTuple):
    """One row of a comparison, and the spectra behind it, largest sigma first: of A, of B, of the change."""

    row: dict[str, Any]
    sigma_a: Array
    sigma_b: Array
    sigma_change: Array

    def tensors(self) -> dict[str, Tensor]:
        """All of it, as tensors that a file can hold."""
        text = torch.tensor(list(json.dumps(self.row).encode()), dtype=torch.uint8)
        spectra = {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in self._fields[1:]}
        return {"row": text, **spectra}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor]) -> Self:
        """The inverse of ``tensors``."""
        row = json.loads(bytes(stored["row"].tolist()))
        return cls(row, *(stored[name].numpy() for name in cls._fields[1:]))


def sizes(sigma: Array) -> dict[str, float]:
    """How many directions a matrix of singular values ``[n]`` has, and the first one's share; zeros for a zero matrix.

    ``stable_rank``: ``||M||_F^2 / ||M||_2^2`` (Rudelson and Vershynin, "Sampling from large matrices", 2007).
    ``effective_rank``: the exponential of the entropy of ``sigma / sum(sigma)`` (Roy and Vetterli, "The effective
    rank", 2007). ``leading_share``: ``sigma_0^2 / sum(sigma^2)``.

    >>> sizes(np.array([2.0, 2.0])), sizes(np.array([]))["effective_rank"]
    ({'stable_rank': 2.0, 'effective_rank': 2.0, 'leading_share': 0.5}, 0.0)
    """
    sigma = sigma[sigma > 0]
    if not len(sigma):
        return {"stable_rank": 0.0, "effective_rank": 0.0, "leading_share": 0.0}
    relative = sigma / sigma[0]
    energy, share = float((relative**2).sum()), relative / relative.sum()
    effective = float(np.exp(-(share * np.log(share)).sum()))
    return {"stable_rank": energy, "effective_rank": effective, "leading_share": 1 / energy}


def measure(a: MatrixFactors, b: MatrixFactors, k: int) -> Measured:
    """One row of the comparison's table; ``comparison.compare`` describes the columns.

    Raises:
        DtLensError: when its weights hold NaN or infinite values.
    """
    A, B = _effective(a), _effective(b)
    same = all(torch.equal(x, y) for x, y in zip(A, B, strict=True))
    whole = not _large(A)
    pending = [] if same else [_pending(*_change(A, B))[1]]
    both = [(a, A)] if same else [(a, A), (b, B)]
    del A, B
    found, sigmas = [], []
    while both:
        factors, seen = both.pop(0)  # a large matrix is let go before the next one is decomposed
        if whole:
            found.append(leading(factors, k, seen))
            sigmas.append(found[-1].sigma.cpu().numpy())
        else:
            gram, sigma = _pending(seen)
            found.append(leading(factors, k, seen, gram))
            pending.append(sigma)
    # LAPACK's eigenvalues take as long with two threads as with one.
    sigmas = [*in_order(lambda sigma: sigma(), pending, lambda _: 0), *sigmas]
    sigma_change = np.empty(0) if same else sigmas.pop(0)
    sigma_a, sigma_b = _padded(sigmas[0], sigmas[-1])
    size, top = float(np.linalg.norm(sigma_a)), float(sigma_a[0]) if len(sigma_a) else 0.0
    shift = sigma_b - sigma_a
    row = {
        **_where(a),
        "relative_change": _over(float(np.linalg.norm(sigma_change)), size),
        **{f"change_{name}": value for name, value in sizes(sigma_change).items()},
        "spectrum_change": _over(float(np.linalg.norm(shift)), size),
        "spectrum_change_max": _over(float(np.abs(shift).max(initial=0.0)), top),
        "spectral_norm_change": _over(float(shift[0]) if len(shift) else 0.0, top),
        **_angles(found[0], found[-1], k, same, whole),
    }
    return Measured(row, sigma_a, sigma_b, sigma_change)


def unchanged(a: MatrixFactors, k: int) -> dict[str, Any]:
    """The row of a matrix that is the same in both models: no change, and no angle between any subspaces."""
    matrix, stored = a.matrix, a.stored()
    shape = (stored[0].shape[0], stored[-1].shape[1])
    together = min(k, *shape, stored[0].shape[1])
    row = {
        **_where(a),
        "relative_change": 0.0,
        **{f"change_{name}": value for name, value in sizes(np.empty(0)).items()},
        **dict.fromkeys(("spectrum_change", "spectrum_change_max", "spectral_norm_change"), 0.0),
        "k": together,
    }
    for side, name, width in (("left", matrix.left, shape[0]), ("right", matrix.right, shape[1])):
        dimension = width - int(a.folded and matrix.centred(side))  # type: ignore[arg-type]
        row |= _side(side, name, np.zeros(together), dimension)
    return row


def _where(factors: MatrixFactors) -> dict[str, Any]:
    matrix = factors.matrix
    return {"matrix": matrix.name, "kind": matrix.kind, "layer": matrix.layer, "head": matrix.head}


def change_factors(a: MatrixFactors, b: MatrixFactors) -> tuple[list[Tensor], float]:
    """``B - A`` as one or two float64 factors, and the sigma that rounding may leave where nothing changed."""
    return _change(_effective(a), _effective(b))


def leading(
    factors: MatrixFactors, k: int | None, seen: list[Tensor] | None = None, gram: Tensor | None = None
) -> Decomposition:
    """The decomposition; of a large matrix only the first ``k`` directions and a few more."""
    stored = factors.stored()
    cut = k is not None and len(stored) == 1 and min(stored[0].shape) >= LARGE
    return decompose_matrix(factors, k + SPARE if cut and k is not None else None, seen=seen, gram=gram)


@lru_cache(maxsize=256)
def haar_angle(k: int, dimension: int, samples: int = 32) -> float:
    """The mean principal angle, in degrees, between two random ``k``-dimensional subspaces; by Monte Carlo."""
    if k >= dimension:
        return 0.0
    rng = np.random.default_rng([k, dimension])
    drawn = []
    for _ in range(samples):
        # By invariance one of the two may be spanned by the first k coordinates.
        frame = np.linalg.qr(rng.standard_normal((dimension, k)))[0]
        drawn.append(np.arccos(np.clip(np.linalg.svd(frame[:k], compute_uv=False), 0, 1)).mean())
    return float(np.degrees(np.mean(drawn)))


def _effective(factors: MatrixFactors) -> list[Tensor]:
    found = [factor.detach() for factor in factors.effective()]
    if not all(map(all_finite, found)):
        raise DtLensError(f"{factors.matrix.name} holds NaN or infinite values, so it cannot be compared.")
    return found


def _change(A: list[Tensor], B: list[Tensor]) -> tuple[list[Tensor], float]:
    B = [y.to(x.device) for x, y in zip(A, B, strict=True)]
    if len(A) == 1:
        return [B[0] - A[0]], 0.0
    first, second = B[0] - A[0], B[1] - A[1]
    size = max(*A[0].shape, A[1].shape[1])
    floor = 8 * size * EPS * (float(first.norm() * B[1].norm()) + float(A[0].norm() * second.norm()))
    if not bool(second.any()):  # half as wide
        return [first, B[1]], floor
    if not bool(first.any()):
        return [A[0], second], floor
    return [torch.cat([first, A[0]], 1), torch.cat([B[1], second], 0)], floor


def _pending(factors: list[Tensor], floor: float = 0.0) -> tuple[Tensor | None, Callable[[], Array]]:
    """The Gram matrix of a large or oblong matrix, and what computes its singular values without the matrix itself.

    They are those of one factor, or of a product of two, that are above rounding, largest first.
    """
    M = factors[0] if len(factors) == 1 else triangle(factors[0]) @ triangle(factors[1].T).T
    short, long = sorted(M.shape)
    # Along its rows in memory, whichever way round it lies; abs would make a copy.
    ends = (M.T if M.stride(0) == 1 else M).aminmax() if M.numel() else ()
    scale = max((abs(float(end)) for end in ends), default=0.0)
    if scale == 0.0:
        return None, lambda: np.empty(0)
    if 1e-60 < scale < 1e60:  # a large matrix is not copied
        scale = 1.0
    else:
        M = M / scale  # squares of tiny entries stay representable
    zero = 8 * long * EPS
    if short > LARGE or (short > GRAM and long >= 2 * short):
        gram = symmetric_product(M if M.shape[0] == short else M.T)
        made = partial(_kept, lambda: torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0).sqrt(), zero**0.5)
        return gram if scale == 1.0 else None, partial(made, floor, scale)
    return None, partial(_kept, lambda: torch.linalg.svdvals(M), zero, floor, scale)


def _kept(sigmas: Callable[[], Tensor], zero: float, floor: float, scale: float) -> Array:
    sigma = sigmas()
    kept = sigma[sigma > max(zero * float(sigma[0]), floor / scale)] * scale
    return np.asarray(kept.cpu().numpy(), dtype=np.float64)


def _large(factors: list[Tensor]) -> bool:
    return len(factors) == 1 and min(factors[0].shape) >= LARGE


def _padded(a: Array, b: Array) -> tuple[Array, Array]:
    length = max(len(a), len(b))
    return np.pad(a, (0, length - len(a))), np.pad(b, (0, length - len(b)))


def _over(part: float, whole: float) -> float:
    return part / whole if whole else (0.0 if part == 0 else float("inf"))


def _angles(a: Decomposition, b: Decomposition, k: int, same: bool, whole: bool) -> dict[str, Any]:
    matrix = a.matrix
    together = common_boundary(a, b, k, whole)
    row: dict[str, Any] = {"k": together}
    for side, name, one, two in (("left", matrix.left, a.left, b.left), ("right", matrix.right, a.right, b.right)):
        # Behind a centring LayerNorm directions live in a space of one dimension less.
        dimension = one.shape[1] - int(a.folded and matrix.centred(side))  # type: ignore[arg-type]
        angles = np.zeros(together)
        if together and not same:
            angles = np.degrees(subspace_angles(one[:together].T.cpu().numpy(), two[:together].T.cpu().numpy()))
        row |= _side(side, name, angles, dimension)
    return row


def _side(side: str, name: str, angles: Array, dimension: int) -> dict[str, Any]:
    """The columns of one side of a matrix, from the principal angles in degrees."""
    together = len(angles)
    known = together > 0
    return {
        f"{side}_side": name,
        f"{side}_angle": float(angles.mean()) if known else float("nan"),
        f"{side}_angle_max": float(angles.max()) if known else float("nan"),
        f"{side}_overlap": float((np.cos(np.radians(angles)) ** 2).mean()) if known else float("nan"),
        f"{side}_haar_overlap": together / dimension,
        f"{side}_haar_angle": haar_angle(together, dimension) if known else float("nan"),
    }
