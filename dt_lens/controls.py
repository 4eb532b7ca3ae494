"""Random edits to hold an edit against: as large as it, at the same place, and, given activations, as loud."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from dt_lens.changes import Edit, unedited
from dt_lens.low_rank import carry, spectrum_of
from dt_lens.replacements import whole_number

if TYPE_CHECKING:
    from dt_lens.activations import Activations, Moments
    from dt_lens.edits import SingularEdit

__all__ = ["Control"]

MATCHED = 1e-7  # relative to the edit's output energy
FLAT = 1e-14  # of the largest eigenvalue: below this one direction is as quiet as another
STEEPEST = 300.0  # the natural logarithm of the largest ratio between two coordinates that a tilt makes


class Control(Edit):
    """A random edit of the same energy and rank at the same place as ``edit``; a function of the edit and the seed.

    The change of the raw matrix keeps its singular values; its singular vectors are Haar-random in the space that the
    edited weight can reach: everything, or for a circuit, which is edited through one factor, what the other factor
    leaves open. It tells how much of an effect comes from changing anything at all by that much. Two edits of different
    directions get different draws from one seed.

    With ``activations`` the output energy on real inputs, ``sqrt(E ||x @ delta||^2)``, is the edit's too. Then the left
    vectors are drawn in the eigenbasis of ``E[x x^T]``, a Gaussian tilted towards louder or quieter inputs by a power
    of the eigenvalues, and made orthonormal; the power is found by root finding, so that the sum over all singular
    vectors is matched exactly. The right vectors stay Haar. An energy that no draw reaches is matched as nearly as can
    be, and the ``note`` says so.

    Attributes:
        of: the edit whose control this is.
        seed: which draw.
        activations: the digest of the activations, or an empty string.
    """

    def __init__(self, edit: SingularEdit, seed: int = 0, activations: Activations | None = None) -> None:
        self.of = edit
        self.seed = whole_number(seed, "seed")
        self.activations = "" if activations is None else activations.digest
        bare = unedited(edit.model)
        matrix, where = edit.matrix, edit.matrix.side(edit.side)
        spectrum = spectrum_of(edit.delta)
        spectrum = spectrum[spectrum > spectrum[0] * 1e-12]
        factors = matrix.raw(bare)
        left_space = factors[0] if len(factors) == 2 and where == "right" else None
        right_space = factors[1].T if len(factors) == 2 and where == "left" else None
        place = f"{self.seed} {matrix.name} {edit.side} {edit.sv}"
        drawn = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=7).digest())
        generator = torch.Generator().manual_seed(drawn)
        moments = None if activations is None else activations.of(matrix, bare)
        target = 0.0 if moments is None else moments.energy(edit.delta)
        if moments is None:
            left = _random_frame(len(edit.delta[0]), len(spectrum), left_space, generator).to(spectrum)
        else:
            left = _tilted_frame(moments, spectrum.cpu(), left_space, target, generator).to(spectrum)
        right = _random_frame(len(edit.delta[1].T), len(spectrum), right_space, generator).to(spectrum)
        super().__init__(edit.model, matrix, *carry(bare, matrix, where, (left * spectrum, right.T), folded=False))
        if moments is not None:
            reached = moments.energy(self.delta)
            if abs(reached - target) > MATCHED * target:
                self.note = (
                    f"No change of this norm that this seed draws has the edit's output energy of {target:.4g}: "
                    f"the nearest has {reached:.4g}."
                )

    def control(self, seed: int = 0, activations: Activations | None = None) -> Control:
        """Another control of the same edit."""
        return Control(self.of, seed, activations)

    def to_dict(self) -> dict[str, Any]:
        matched = {"match": "output", "activations": self.activations} if self.activations else {}
        return {"kind": "control", "seed": self.seed, **matched, "of": self.of.to_dict()}

    def __repr__(self) -> str:
        matched = f", activations={self.activations}" if self.activations else ""
        return f"Control(seed={self.seed}{matched}, energy={self.energy:.4g}, of={self.of!r})"


def _random_frame(d: int, r: int, space: Tensor | None, generator: torch.Generator) -> Float[Tensor, "d r"]:
    """``r`` Haar-random orthonormal vectors of ``d`` dimensions, or of the column space of ``space``."""
    basis = torch.eye(d, dtype=torch.float64) if space is None else torch.linalg.qr(space)[0].cpu()
    drawn = torch.randn(basis.shape[1], r, generator=generator, dtype=torch.float64)
    frame: Tensor = basis @ _orthonormal(drawn)
    return frame


def _orthonormal(drawn: Float[Tensor, "d r"]) -> Float[Tensor, "d r"]:
    """The columns one after the other, each freed of those before it."""
    inner, triangle = torch.linalg.qr(drawn)
    # QR's signs are LAPACK's choice; with a positive diagonal the frame is Haar (Mezzadri, 2007).
    frame: Tensor = inner * triangle.diagonal().sign()
    return frame


def _tilted_frame(
    moments: Moments,
    spectrum: Float[Tensor, " r"],
    space: Tensor | None,
    target: float,
    generator: torch.Generator,
) -> Float[Tensor, "d r"]:
    """Random orthonormal ``a_i`` with ``sum_i spectrum_i^2 a_i^T E[x x^T] a_i = target^2``, in the space of ``space``.

    In the eigenbasis of ``E[x x^T]`` the entries are Gaussian, times ``eigenvalue^(t / 2)``. With ``t`` the sum goes
    from its least to its largest value: orthonormalised in the order of the spectrum, the columns tend to the quietest
    and to the loudest eigenvectors in that order, which are the extremes (von Neumann's trace inequality; Horn and
    Johnson, "Matrix Analysis", 2013, section 7.4.1). For one vector it rises all the way.
    """
    basis = None if space is None else torch.linalg.qr(space)[0].cpu()
    seen = moments.second if basis is None else basis.T @ moments.second @ basis
    loudness, axes = torch.linalg.eigh(seen)
    loudness = loudness.clamp_min(0.0)
    axes = axes if basis is None else basis @ axes
    drawn = torch.randn(len(loudness), len(spectrum), generator=generator, dtype=torch.float64)
    top = float(loudness[-1])
    if top <= 0:
        untilted: Tensor = axes @ _orthonormal(drawn)
        return untilted
    logs = loudness.clamp_min(FLAT * top).log()

    def frame(tilt: float) -> Tensor:
        scales = tilt / 2 * logs
        scales = (scales - scales.max()).clamp_min(-STEEPEST).exp()
        # Large rows first: then Householder's QR is accurate row by row (Cox and Higham, 1998).
        order = torch.arange(len(scales)).flip(0) if tilt > 0 else torch.arange(len(scales))
        found = torch.empty_like(drawn)
        found[order] = _orthonormal((scales[:, None] * drawn)[order])
        return found

    weights = spectrum.square()
    weights = weights / weights.sum()
    wanted = target**2 / float(spectrum.square().sum())

    def excess(tilt: float) -> float:
        return float((loudness @ frame(tilt).square()) @ weights) - wanted

    tilt = _root(excess)
    made: Tensor = axes @ frame(tilt)
    return made


def _root(excess: Callable[[float], float]) -> float:
    """Where ``excess`` is zero, or the end where it comes nearest to it."""
    start = excess(0.0)
    if start == 0:
        return 0.0
    reach = -1.0 if start > 0 else 1.0
    while abs(reach) < 2.0**24:
        if excess(reach) * start <= 0:
            return float(brentq(excess, min(0.0, reach), max(0.0, reach), xtol=1e-300, rtol=1e-15, maxiter=1000))
        reach *= 2
    return reach
