"""Singular directions weighted by a matrix's real inputs: sigma is the spread of the output, not of the weights.

For inputs of covariance ``C`` the outputs ``x @ M`` have the covariance ``M^T C M``. Its eigenvectors ``v_i`` are the
principal axes of the output, ``sigma_i^2 = v_i^T M^T C M v_i`` the variance along each, and ``M v_i`` the direction
that is read for it: ``M = sum_i (M v_i) v_i^T``, a term for every direction in which the output varies. (Principal
components of the output, Jolliffe, "Principal Component Analysis", 2002; the same as the singular value decomposition
of ``C^(1/2) M``.)

The covariance is about the mean, since a mean output acts as a bias and does not distinguish inputs. So it is the same
whether a LayerNorm on the input side is folded in or not: folding changes neither the ``v_i`` nor the sigmas, only how
the read direction is expressed, as ``M v_i`` in the normalised inputs or ``(I - 11^T/d) diag(w) M v_i`` in the stream.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dt_lens.errors import DtLensError
from dt_lens.lens.matrices import MatrixFactors
from dt_lens.svd.decomposition import (
    Decomposition,
    blocks_of,
    rounding_noise,
    scaled,
    turned_outside,
    with_canonical_signs,
)
from dt_lens.svd.solvers import EPS, decompose

if TYPE_CHECKING:
    from dt_lens.lens.activations import Activations

__all__ = ["decompose_weighted"]


def decompose_weighted(factors: MatrixFactors, activations: Activations, rank: int | None = None) -> Decomposition:
    """Decompose one catalogued matrix by the spread of its output over real inputs.

    ``sigma`` is the standard deviation of the output along the rows of ``right``, which are orthonormal; the rows of
    ``left`` are ``M right_i`` scaled to unit length, and not orthogonal; ``gain`` is the length of ``M right_i``.
    Directions along which the output varies by no more than the activations' rounding are left out. ``blocks`` show
    which sigmas the rounding of the weights mixes, not what another sample of inputs would change. A ``QK`` circuit is
    weighted by the queries' inputs only.

    Args:
        factors: the matrix of the unedited model; folded, what is read is expressed in the stream before the LayerNorm.
        activations: what the matrix reads.
        rank: how many directions at most; all when ``None``.

    Raises:
        DtLensError: when ``activations`` do not hold this matrix's inputs or are another model's, or weights are not
            finite.
    """
    matrix = factors.matrix
    moments = activations.of(matrix, factors.lens)
    raw = factors.raw()
    seen = factors.effective() if factors.folded else raw
    # The covariance is of the raw matrix's inputs; a norm on the other side is part of the output.
    behind = factors.scale("right") if len(raw) == 1 else None
    first = raw[0] if behind is None else raw[0] * behind.to(raw[0])
    spread, axes = torch.linalg.eigh(moments.covariance.to(first))
    # A variance below the rounding of second moments minus squared means counts as zero.
    exact = len(spread) * EPS * float(moments.second.diagonal().sum())
    spread = torch.where(spread > exact, spread, 0.0).sqrt()
    try:
        found = decompose([spread[:, None] * (axes.T @ first), *seen[1:]], rank, _floor(factors, activations))
    except DtLensError as error:
        raise DtLensError(f"{matrix.name}: {error}") from error
    image = found.right.T
    for factor in reversed(seen):
        image = factor @ image
    gain = image.norm(dim=0)
    left, right = with_canonical_signs(matrix, (image / gain).T, found.right)
    ahead = (spread * found.left) @ axes.T  # what an error of the raw matrix is multiplied by from the left
    noise = rounding_noise(replace(factors, folded=False), ahead, scaled(found.right, factors.scale("right")))
    blocks = blocks_of(found.sigma, noise)
    every = rank is None or len(found.sigma) < rank
    outside = turned_outside(factors, left, found.right, (gain, found.sigma), every, ahead)
    parts = found.sigma, left, right, factors.folded, blocks, found.error, gain, activations.digest, outside
    return Decomposition(matrix, *parts)


def _floor(factors: MatrixFactors, activations: Activations) -> float:
    """The standard deviation that the rounding of the inputs may give an output that never varies."""
    weights = factors.stored()
    size = float(torch.finfo(weights[0].dtype).eps)
    for weight in weights:
        size *= float(torch.linalg.matrix_norm(weight.double(), 2))
    moments = activations.inputs[factors.matrix.name]
    return size * float(moments.second.diagonal().mean().clamp_min(0.0).sqrt())
