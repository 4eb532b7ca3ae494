"""Random edits to compare an edit with: same place, same energy, and, given activations, same output energy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from dt_lens.arguments import LAST_SEED, require_activations, whole_number
from dt_lens.edits.edit import Edit
from dt_lens.edits.low_rank import carry, remarks_on, spectrum_of
from dt_lens.edits.state import state_of, unedited
from dt_lens.lens.activations import Activations
from dt_lens.lens.matrices import MatrixFactors

__all__ = ["Control"]

MATCHED = 1e-7  # relative to the edit's output energy
ROUNDED = 1e-6  # relative to the edit's energy: what rounding may cost
FLAT = 1e-14  # relative to the largest eigenvalue: smaller ones count as equal
STEEPEST = 300.0  # the natural logarithm of the largest ratio that a tilt makes between two coordinates


class Control(Edit):
    """A random edit of the same energy and rank at the same place as ``edit``; a function of the edit and the seed.

    It shows how much of an effect comes from changing anything at all by that much. The change of the raw matrix has
    the singular values of the edit's change and random singular vectors, which are Haar-distributed with one
    exception: in a circuit, the vectors on the side of the unedited factor are that factor's images of Gaussian
    vectors, made orthonormal, because the circuit's own vectors are such images too. Haar-random vectors there would
    be ones that the factor hardly passes on, and the edited weight would have to change many times as much as in the
    edit. Edits of different directions get different draws from one seed.

    With ``activations`` the output energy on real inputs (see ``Edit.output_energy``) also equals the edit's. The left
    vectors are then drawn in the eigenbasis of the inputs' second moments, tilted towards large or small eigenvalues by
    a power of them, and made orthonormal; root finding gives the power at which the sum over all singular vectors
    matches. The right vectors are drawn as before. Where a norm stands behind what the matrix writes (Gemma, OLMo 2),
    the energies are equal before that norm, and what joins the stream may differ; the ``note`` says so. Where no draw
    reaches the edit's output energy, the nearest is taken and the ``note`` says so.

    Attributes:
        of: the edit that this is a control of.
        seed: which draw.
        activations: the digest of the activations, or an empty string.
    """

    def __init__(self, edit: Edit, seed: int = 0, activations: Activations | None = None) -> None:
        if activations is not None:
            require_activations(activations)
        while isinstance(edit, Control):
            edit = edit.of
        self.of: Edit = edit
        self.seed = whole_number(seed, "seed", -(2**63), LAST_SEED)
        self.activations = "" if activations is None else activations.digest
        with state_of(edit.model).lock:  # another thread may be writing these weights
            self._make(edit, activations)

    def _make(self, edit: Edit, activations: Activations | None) -> None:
        bare = unedited(edit.model)
        matrix, where = edit.matrix, edit.matrix.side(edit.side)
        spectrum = spectrum_of(edit.delta).cpu()
        spectrum = spectrum[spectrum > spectrum[0] * 1e-12]
        rank = len(spectrum)
        place = f"{self.seed} {matrix.name} {edit.side} {edit.sv}"
        drawn = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=7).digest())
        generator = torch.Generator().manual_seed(drawn)
        left_image = right_image = None
        if len(matrix.factors) == 2:
            unedited_factor = matrix.raw(bare)[where == "left"]
            precision = torch.finfo(bare.weights[matrix.factors[0].weight].dtype).eps
            if where == "right":
                left_image = _Image.of(unedited_factor, rank, precision)
            else:
                right_image = _Image.of(unedited_factor.T, rank, precision)

        def draw(d: int, image: _Image | None) -> Tensor:
            scales = torch.ones(d, dtype=torch.float64) if image is None else image.scales
            return scales[:, None] * torch.randn(len(scales), rank, generator=generator, dtype=torch.float64)

        left = draw(len(edit.delta[0]), left_image)
        target = 0.0
        if activations is None:
            left = _orthonormal(left)
        else:
            target = edit.output_energy(activations)
            if left_image is None:
                second = activations.of(matrix, bare).second
            else:
                second = left_image.back.T @ activations.between(matrix, bare).second @ left_image.back
            left = _tilted_frame(second, left, spectrum, target)
        right = _orthonormal(draw(edit.delta[1].shape[1], right_image))
        left = left if left_image is None else left_image.basis @ left
        right = right if right_image is None else right_image.basis @ right
        change = ((left * spectrum).to(edit.delta[0]), right.T.to(edit.delta[1]))
        factors = MatrixFactors.of(bare, matrix, fold_layernorm=False)
        super().__init__(edit.model, matrix, edit.side, edit.sv, *carry(factors, where, change))
        remarks = remarks_on(bare, matrix, self._placed)
        if abs(self.energy - edit.energy) > ROUNDED * edit.energy:
            remarks.append(
                f"{matrix.name} has too small a rank for an energy of {edit.energy:.4g} here: {self.energy:.4g}."
            )
        if activations is not None and matrix.right == "write" and matrix.right_norm is not None:
            remarks.append(
                f"The output energy is equal before {matrix.right_norm}, which divides it by its size in each token: "
                "what joins the stream may differ."
            )
        if activations is not None:
            reached = self.output_energy(activations)
            if abs(reached - target) > MATCHED * target:
                remarks.append(
                    f"No change of this norm that this seed draws has the edit's output energy of {target:.4g}; "
                    f"the nearest has {reached:.4g}."
                )
        self.note = " ".join(remarks)

    def control(self, seed: int = 0, activations: Activations | None = None) -> Control:
        """Another control of the same edit."""
        return Control(self.of, seed, activations)

    def to_dict(self) -> dict[str, Any]:
        matched = {"match": "output", "activations": self.activations} if self.activations else {}
        return {"kind": "control", "seed": self.seed, **matched, "of": self.of.to_dict()}

    def __repr__(self) -> str:
        matched = f", activations={self.activations}" if self.activations else ""
        return f"Control(seed={self.seed}{matched}, energy={self.energy:.4g}, of={self.of!r})"


@dataclass(frozen=True)
class _Image:
    """The subspace that one factor of a circuit maps onto.

    Attributes:
        basis: an orthonormal basis of it, ``[d, n]``.
        scales: the factor's singular values, by which it stretches unit vectors onto ``basis``, ``[n]``.
        back: the factor's inverse on ``basis``, ``[e, n]``.
    """

    basis: Float[Tensor, "d n"]
    scales: Float[Tensor, " n"]
    back: Float[Tensor, "e n"]

    @classmethod
    def of(cls, factor: Float[Tensor, "d e"], least: int, precision: float) -> _Image:
        """The image of ``factor``, of at least ``least`` dimensions.

        Singular values below ``precision``, relative to the largest, are taken for rounding.
        """
        U, s, Vt = torch.linalg.svd(factor.cpu(), full_matrices=False)
        n = max(least, int((s > precision * s[0]).sum()))
        return cls(U[:, :n], s[:n], Vt[:n].T / s[:n])


def _orthonormal(drawn: Float[Tensor, "d r"]) -> Float[Tensor, "d r"]:
    """The columns of ``drawn`` made orthonormal, one after the other."""
    inner, triangle = torch.linalg.qr(drawn)
    # QR's signs are LAPACK's choice; with a positive diagonal the frame is Haar (Mezzadri, 2007).
    frame: Tensor = inner * triangle.diagonal().sign()
    return frame


def _tilted_frame(
    second: Float[Tensor, "d d"], drawn: Float[Tensor, "d r"], spectrum: Float[Tensor, " r"], target: float
) -> Float[Tensor, "d r"]:
    """Random orthonormal ``a_i`` with ``sum_i spectrum_i^2 a_i^T second a_i = target^2``.

    In the eigenbasis of ``second``, the inputs' second moments, the rows of ``drawn`` are multiplied by
    ``eigenvalue^(t / 2)``. As ``t`` goes from minus to plus infinity, the sum goes from its least to its largest value:
    orthonormalised in the order of the spectrum, the columns tend to the eigenvectors of the smallest or of the largest
    eigenvalues in that order, which are the extremes (von Neumann's trace inequality; Horn and Johnson, "Matrix
    Analysis", 2013, section 7.4.1). For one vector the sum rises all the way.
    """
    eigenvalues, axes = torch.linalg.eigh(second)
    eigenvalues = eigenvalues.clamp_min(0.0)
    drawn = axes.T @ drawn
    top = float(eigenvalues[-1])
    if top <= 0:
        untilted: Tensor = axes @ _orthonormal(drawn)
        return untilted
    logs = eigenvalues.clamp_min(FLAT * top).log()

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
        return float((eigenvalues @ frame(tilt).square()) @ weights) - wanted

    found: Tensor = axes @ frame(_root(excess))
    return found


def _root(excess: Callable[[float], float]) -> float:
    """Where ``excess`` is zero, or the end of the range where it comes nearest to zero."""
    start = excess(0.0)
    if start == 0:
        return 0.0
    reach = -1.0 if start > 0 else 1.0
    while abs(reach) < 2.0**24:
        if excess(reach) * start <= 0:
            return float(brentq(excess, min(0.0, reach), max(0.0, reach), xtol=1e-300, rtol=1e-15, maxiter=1000))
        reach *= 2
    return reach
