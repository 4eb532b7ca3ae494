"""Where the nulls of a scan come from: a covariance of activations, or pools of matches in drawn models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dt_lens.arguments import LAST_SEED, whole_number
from dt_lens.errors import DtLensError, a_type, nearest
from dt_lens.lens.activations import Activations
from dt_lens.lens.matrices import MatrixFactors, SideName, Snapshot
from dt_lens.progress import ProgressCallback
from dt_lens.statistics.nulls.covariance import CovarianceMaximum
from dt_lens.statistics.nulls.kinds import NULLS, Null
from dt_lens.statistics.nulls.pooled import PooledMaximum, ShuffledMaximum, UntrainedMaximum
from dt_lens.statistics.nulls.spectrum import BandMaximum, SpectrumMaximum
from dt_lens.svd.cache import ResultCache
from dt_lens.svd.decompositions import Decompositions
from dt_lens.svd.drawn_models import shuffled, untrained
from dt_lens.svd.pairings import Pairing
from dt_lens.svd.side_labels import SideLabels

__all__ = [
    "OF_THE_STREAM",
    "CovarianceSource",
    "NullSource",
    "Pools",
    "SpectrumSource",
    "draw_pools",
    "require_null",
    "side_covariance",
]

Array = NDArray[np.float64]
OF_THE_STREAM = ("covariance", "spectrum", "bands")  # nulls that need activations
POOL = 10_000  # matches that every pool should hold at least,
DRAWS = (3, 100)  # from no fewer and no more drawn models than this


class NullSource(Protocol):
    """What a scan asks for the null of each of its pairings."""

    def null(self, pairing: Pairing, span: int) -> Null:
        """The null of the best match of one direction (or one span of ``span`` directions) of a pairing."""
        ...

    def attrs(self) -> dict[str, Any]:
        """What the table's ``attrs`` say about the null."""
        ...


def require_null(name: object) -> None:
    """Raise ``DtLensError`` if ``name`` is not a known null."""
    if not isinstance(name, str) or name not in NULLS:
        raise DtLensError(f"Unknown null {name!r}; known are {', '.join(NULLS)}." + nearest(name, NULLS))


class CovarianceSource:
    """The null source of ``"covariance"``: Gaussians with the covariance of the vectors on each matrix side.

    Args:
        lens: the model's weights and structure.
        activations: of its real inputs, or the file that holds them; or one covariance ``[d_model, d_model]`` for all
            sides, used unchanged.
        fold: whether LayerNorms are folded into the matrices.
        seed: of the draws.
        draws: directions drawn for each null; see ``CovarianceMaximum``.
        cache: stores the nulls of large vocabularies.

    Raises:
        DtLensError: if ``activations`` is ``None``, or neither activations, nor their file, nor an array.
    """

    name = "covariance"

    def __init__(
        self, lens: Snapshot, activations: Any, fold: bool, seed: int, draws: int | None, cache: ResultCache
    ) -> None:
        if activations is None:
            raise DtLensError(
                f"null={self.name!r} needs activations=: what dt_lens.collect_activations gives, a file of them, or a "
                "covariance [d_model, d_model]."
            )
        if isinstance(activations, (str, Path)):
            activations = Activations.load(activations)
        if not hasattr(activations, "inputs"):
            if isinstance(activations, Tensor):
                activations = activations.detach().cpu()
            try:
                activations = np.asarray(activations, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise DtLensError(
                    f"activations= is {a_type(activations)}; expected activations, a file of them, or a "
                    "covariance [d_model, d_model]."
                ) from error
        self.lens, self.activations, self.fold, self.seed, self.draws = lens, activations, fold, seed, draws
        self._cache = cache
        self._covariances: dict[tuple[str, SideName], tuple[bytes, Array]] = {}
        self._nulls: dict[tuple[Any, ...], CovarianceMaximum] = {}

    def null(self, pairing: Pairing, span: int) -> Null:
        labels = pairing.labels
        digest, S = self.covariance(pairing)
        key = (digest, labels.digest, labels.centred, span, self.seed, self.draws)
        if key not in self._nulls:
            cache = self._cache if not labels.whole else ResultCache(None)
            made = cache.get(f"covariance null {key}", lambda: self._made(labels, S, span).tensors())
            self._nulls[key] = CovarianceMaximum.from_tensors(made)
        return self._nulls[key]

    def covariance(self, pairing: Pairing) -> tuple[bytes, Array]:
        """The covariance of the vectors on a pairing's side, and its hash."""
        where = (pairing.matrix.name, pairing.side)
        if where not in self._covariances:
            S = side_covariance(MatrixFactors.of(self.lens, pairing.matrix, self.fold), pairing.side, self.activations)
            self._covariances[where] = (hashlib.blake2b(S.tobytes(), digest_size=16).digest(), S)
        return self._covariances[where]

    def _made(self, labels: SideLabels, S: Array, span: int) -> CovarianceMaximum:
        return CovarianceMaximum.of(labels.for_null, S, labels.centred, self.seed, span, self.draws)

    def attrs(self) -> dict[str, Any]:
        given = self.activations
        digest = (
            given.digest if hasattr(given, "digest") else hashlib.blake2b(given.tobytes(), digest_size=8).hexdigest()
        )
        return {"null": self.name, "assumes": NULLS[self.name].assumes, "activations": digest}


class SpectrumSource(CovarianceSource):
    """The null source of ``"spectrum"`` and ``"bands"``: every direction has a null of its own.

    Args: as for ``CovarianceSource``, and the null's name first.
    """

    def __init__(self, name: str, *args: Any) -> None:
        self.name = name
        super().__init__(*args)

    def null(self, pairing: Pairing, span: int) -> Null:
        """The nulls of all directions (or spans of ``span``) of a pairing, in order; one best match goes to each."""
        starts = pairing.starts[pairing.sizes == span]
        directions = pairing.directions[starts[:, None] + np.arange(span)]
        kind = SpectrumMaximum if self.name == "spectrum" else BandMaximum
        labels = pairing.labels
        return kind(directions, labels.for_null, self.covariance(pairing)[1], labels.centred, self.seed, self.draws)


def side_covariance(factors: MatrixFactors, side: SideName, activations: Any) -> Array:
    """The covariance ``[d_model, d_model]`` of the vectors that the null draws for one side of a matrix.

    On a reading side these are the matrix's inputs; with folding, the stream as its LayerNorm leaves it before scale
    and bias. On the key side of a ``QK`` circuit they are the inputs of the keys. On a writing side they are the stream
    before the matrix's output is added, at the tokens whose output is used. ``trace / (d (n + 1))`` is added to each
    variance, as if one more input of the same size had no preferred direction: what ``n`` inputs have not shown is not
    impossible. An array is returned unchanged.

    Raises:
        DtLensError: when the activations lack these vectors, or are another model's.
    """
    if isinstance(activations, np.ndarray):
        return activations
    lens, matrix = factors.lens, factors.matrix
    if side == "write":
        # Attention and MLP add to the same stream where they stand side by side.
        early = ".attn." in matrix.name or lens.structure.parallel
        place = f"blocks.{matrix.layer}.hook_resid_{'pre' if early else 'mid'}"
        if early and f"blocks.{matrix.layer}.attn_in.query" in activations.points:
            place += ".query"
        if place not in activations.stream:
            raise DtLensError(f"These activations lack the stream at {place}; collect them again.")
        moments = activations.stream[place]
    elif side == "key":
        moments = activations.keys(matrix, lens)
    else:
        moments = activations.of(matrix, lens)
    S = moments.covariance.double().cpu().numpy()
    # What a side reads comes out of its norm; what one writes has passed the norm behind it.
    scale = None if side == "write" else factors.scale(matrix.side(side))
    if scale is not None:
        w = scale.detach().double().cpu().numpy()
        back = np.divide(1.0, w, out=np.zeros_like(w), where=w != 0)
        S = back[:, None] * S * back
    return np.asarray(S + np.eye(len(S)) * np.trace(S) / (len(S) * (moments.count + 1)))


@dataclass(frozen=True)
class Pools:
    """The best matches of drawn models, pooled by kind of matrix, side, embedding and size of block.

    A null source for ``WeightSVD.scan(null=pools)``, made once by ``WeightSVD.pools`` and used for many scans of models
    of the same shape.

    Attributes:
        name: ``"untrained"`` or ``"shuffled"``.
        draws: how many models were drawn.
        seed: of the draws.
        single: best matches of directions, or of spans of several.
        whole: best matches of whole matrices with whole embeddings.
    """

    name: str
    draws: int
    seed: int
    single: dict[tuple[str, str, str, int], PooledMaximum]
    whole: dict[tuple[str, str, str], PooledMaximum]

    def null(self, pairing: Pairing, span: int) -> PooledMaximum:
        """The pool of a pairing's kind.

        Raises:
            DtLensError: when these pools were drawn for other matrices or embeddings.
        """
        where = pairing.kind
        if (*where, span) not in self.single:
            raise DtLensError(
                f"These pools lack the {where[1]} side of {where[0]} with {where[2]} in blocks of {span}; draw them "
                "with the same matrices and embeddings."
            )
        return self.single[*where, span]

    def frame(self, pairing: Pairing) -> PooledMaximum:
        """The pool of whole matrices of this kind; raises as ``null`` does."""
        where = pairing.kind
        if where not in self.whole:
            raise DtLensError(
                f"These pools lack the {where[1]} side of {where[0]} with {where[2]}; draw them with the same matrices "
                "and embeddings."
            )
        return self.whole[where]

    def attrs(self) -> dict[str, Any]:
        smallest = min((pool.smallest for pool in self.single.values()), default=1.0)
        assumes = NULLS[self.name].assumes
        return {"null": self.name, "assumes": assumes, "draws": self.draws, "smallest_p": smallest}


def draw_pools(
    svd: Decompositions, name: str, pairings: Sequence[Pairing], seed: int, draws: int | None, tell: ProgressCallback
) -> Pools:
    """Draw ``draws`` models and pool the best matches of their directions, in blocks of the sizes in ``pairings``.

    Each drawn model is decomposed with the same settings as the model itself; its blocks are consecutive directions.

    Raises:
        DtLensError: for a null other than ``"untrained"`` and ``"shuffled"``, fewer than one draw, or a seed below 0.
    """
    if name not in ("untrained", "shuffled"):
        raise DtLensError(f"Only 'untrained' and 'shuffled' draw models, not {name!r}.")
    seed = whole_number(seed, "seed", 0, LAST_SEED)
    draws = _enough(pairings) if draws is None else whole_number(draws, "draws", 1)
    make, of = (untrained, UntrainedMaximum.of) if name == "untrained" else (shuffled, ShuffledMaximum.of)
    matrices = list(dict.fromkeys(pairing.matrix.name for pairing in pairings))
    embeddings = list(dict.fromkeys(pairing.labels.embedding.name for pairing in pairings))
    wanted = {(pairing.matrix.name, pairing.side, pairing.labels.embedding.name): pairing for pairing in pairings}
    single: dict[tuple[str, str, str, int], list[Array]] = {}
    whole: dict[tuple[str, str, str], list[float]] = {}
    for draw in range(draws if wanted else 0):
        tell(f"drawing the {name} model {draw + 1} of {draws}", draw / draws)
        state = int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])
        twin = svd.like(make(svd.model, svd.registry, state))
        for pairing, own in _pairs(twin.pairings(matrices, embeddings), wanted):
            where = pairing.kind
            for span in {1, *own.sizes.tolist()}:
                found = _lengths(pairing, span)
                single.setdefault((*where, span), []).append(found)
                if span == 1 and len(found):
                    whole.setdefault(where, []).append(float(found.max()))
    pools = {where: np.concatenate(found) for where, found in single.items()}
    return Pools(
        name,
        draws,
        seed,
        {where: of(found) for where, found in pools.items() if len(found)},
        {where: of(found) for where, found in whole.items()},
    )


def _enough(pairings: Sequence[Pairing]) -> int:
    """How many models fill every pool: with fewer, no p-value is small enough for a discovery."""
    sizes: dict[tuple[str, str, str], int] = {}
    for pairing in pairings:
        where = pairing.kind
        sizes[where] = sizes.get(where, 0) + len(pairing.decomposition.sigma)
    least = max(1, min(sizes.values(), default=1))
    return int(np.clip(-(-POOL // least), *DRAWS))


def _pairs(
    pairings: Sequence[Pairing], wanted: dict[tuple[str, SideName, str], Pairing]
) -> Iterator[tuple[Pairing, Pairing]]:
    for pairing in pairings:
        where = (pairing.matrix.name, pairing.side, pairing.labels.embedding.name)
        if where in wanted:
            yield pairing, wanted[where]


def _lengths(pairing: Pairing, span: int) -> Array:
    """The best matches of a drawn matrix's directions, in blocks of ``span``."""
    directions = pairing.directions
    directions = directions[: len(directions) // span * span]
    if not len(directions):
        return np.empty(0)
    return pairing.labels.best(directions, np.arange(0, len(directions), span)).length
