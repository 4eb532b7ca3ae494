"""A test of semantic clusters: does a singular direction sort the labels of an embedding by a known factor?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dt_lens.arguments import LAST_SEED, truth_value, whole_number
from dt_lens.errors import DtLensError, as_written, nearest
from dt_lens.lens.matrices import Snapshot
from dt_lens.progress import ProgressCallback, reporting
from dt_lens.statistics.arrays import share
from dt_lens.statistics.multiplicity import q_values
from dt_lens.statistics.nulls.covariance import covariance_axes
from dt_lens.statistics.nulls.haar import HaarMaximum
from dt_lens.statistics.nulls.spectrum import SpectrumMaximum
from dt_lens.statistics.rank_effects import RankEffects
from dt_lens.svd.cluster_draws import FIRST, Cleared, effects_of, haar_draws, sign_draws, until_clear
from dt_lens.svd.decompositions import Decompositions
from dt_lens.svd.drawn_models import untrained
from dt_lens.svd.factors import Factors, factors_of
from dt_lens.svd.indices import SV, resolve_sv
from dt_lens.svd.null_sources import CovarianceSource
from dt_lens.svd.pairings import DECOMPOSING, Pairing
from dt_lens.svd.side_labels import SideLabels

if TYPE_CHECKING:
    from dt_lens.lens.protocol import Lens

__all__ = ["COLUMNS", "MEASURES", "clusters"]

COLUMNS = ["matrix", "layer", "head", "side", "sv", "block", "sigma", "embedding", "factor", "effect"]
COLUMNS += ["p_value", "q_value"]
MEASURES = {
    "epsilon_squared": "the share of the variance of the labels' ranks along the direction that lies between levels "
    "(0: none, 1: all)",
    "auc": "the chance that a label of one level lies further along the direction than one of the other (0.5: as for a "
    "coin, 1: always)",
}
NULLS = {"haar": HaarMaximum.assumes, "spectrum": SpectrumMaximum.assumes}
# Draws for each row and factor. A row that lies above all draws by one of F factors has a p of at most F / (1 + B),
# since the largest draw of each other factor is as extreme; with more than 20 a lone such row then has q < 0.05.
MARGIN = 21
RANKS = 500_000_000  # of labels in all draws; where more would be needed, draws are made for each row, not each factor
Array = NDArray[np.float64]
Names = Sequence[str] | str


def clusters(
    model: Lens,
    factors: Any = None,
    *,
    matrices: Names | None = None,
    sv: SV | slice | None = None,
    embeddings: Names | None = None,
    only: Names | None = None,
    strata: Names | None = None,
    null: str = "haar",
    activations: Any = None,
    draws: int | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    fold_layernorm: bool = True,
    beside: bool = True,
    progress: bool | ProgressCallback | None = None,
) -> pd.DataFrame:
    """Test whether singular directions sort labels by known factors: a taxi's row, a token's leading space.

    All labels of an embedding are compared with a direction, as in ``WeightSVD.scan``, and their cosines are ranked.
    The effect of a factor is Kruskal and Wallis's epsilon squared, or for two levels the two-sided area under the ROC
    curve (``dt_lens.statistics.rank_effects``). Each factor's effect has a p-value among random directions with the
    same labels, and the smallest of them is compared with the smallest of each random direction. Labels are never
    permuted: like labels lie close to each other, so that any direction gathers them to some degree.

    Args:
        model: a wrapped model.
        factors: a DataFrame (or a .csv file of one) with a row per label, named by the index or a column ``label``, and
            a column per factor, empty where it does not apply. By default the factors that the checkpoint carries
            (``model.facts.factors``), and for embeddings of tokens ``dt_lens.svd.token_factors``.
        matrices: names or shell patterns; every matrix by default.
        sv: directions of each matrix, as an index, text such as ``"0-9"``, several, or a slice; all by default.
        embeddings: names or patterns of embeddings to compare every side with; by default those that have factors,
            input embeddings with reading sides and output embeddings with writing sides.
        only: test these factors only. ``"passenger=R"`` asks about one level against all others.
        strata: factors that are held fixed: ranks are taken within each combination of their levels. An embedding
            that lacks one of them is left out.
        null: what a direction without meaning is: ``"haar"``, pointing anywhere; or ``"spectrum"``, as long on every
            principal axis of the stream on its side, with random signs.
        activations: for ``"spectrum"``: what ``dt_lens.collect_activations`` gives, a file of them, or a covariance
            ``[d_model, d_model]`` for every side.
        draws: random directions at most; by default 21 for each row and factor of the table, so that a row that alone
            lies above all of them, by one factor, is a discovery at 0.05. Where more than 500 million labels would be
            ranked for that, 21 for each row; with F factors such a row may then have a q of F / 21. Under
            ``"spectrum"``, and for blocks, a row's draws end once 50 of them are as extreme.
        alpha: of what ``attrs`` count as found.
        seed: of the draws.
        fold_layernorm: as for ``WeightSVD``.
        beside: also test an untrained model of the same shape, under ``"haar"``.
        progress: as for ``WeightSVD.scan``.

    Returns:
        a DataFrame with a row per direction, or block of indistinguishable ones: ``matrix layer head side sv block
        sigma embedding factor effect p_value q_value``, and for each factor ``effect_NAME`` and ``p_NAME``. ``factor``
        and ``effect`` are those of the smallest ``p_NAME``; ``p_value`` takes into account that it is the smallest of
        several, and ``q_value`` is by Benjamini and Hochberg over the table. A block's effects are the best of 200
        directions in its span, compared with random spans. ``attrs`` says what was asked: ``null``, ``assumes``,
        ``draws``, ``smallest_p``, ``lone_p`` (at most the p of a row above all draws by one factor alone), ``seed``,
        ``alpha``, ``factors``, ``measures``, ``strata``, ``left_out``, ``found``, and ``untrained_model`` with its
        ``rows`` and those ``found``.

    Raises:
        DtLensError: for a table that does not fit the labels, an unknown factor, matrix, embedding or null, a factor of
            one level, a level that is a list or an array, and where there is no factor or nothing to compare.
    """
    if not isinstance(null, str) or null not in NULLS:
        raise DtLensError(
            f"null is {as_written(null)}; a test of clusters knows {' and '.join(NULLS)}." + nearest(null, NULLS)
        )
    if (null == "spectrum") != (activations is not None):
        raise DtLensError(
            "null='spectrum' needs activations=: what dt_lens.collect_activations gives, or a file of them."
            if activations is None
            else f"Only null='spectrum' uses activations=, and null is {null!r}; leave them out."
        )
    seed, alpha = whole_number(seed, "seed", 0, LAST_SEED), share(alpha, "alpha")
    draws = None if draws is None else whole_number(draws, "draws", 1)
    svd = Decompositions(model, fold_layernorm=fold_layernorm)
    known = factors_of(model, svd.registry, factors, embeddings, only, strata)
    asked = _Asked(known, matrices, sv, embeddings is not None, draws, alpha, seed)
    beside = truth_value(beside, "beside")
    with reporting(progress) as tell:
        table = _table(svd, asked, null, activations, lambda what, done: tell(what, done * (0.6 if beside else 1.0)))
        if beside:
            twin = svd.like(untrained(model, svd.registry, seed))
            other = _table(twin, asked, "haar", None, lambda what, done: tell(f"untrained: {what}", 0.6 + done * 0.4))
            table.attrs["untrained_model"] = {"null": "haar", "rows": len(other), "found": other.attrs["found"]}
    return table


@dataclass(frozen=True)
class _Asked:
    """What a table is made of."""

    factors: dict[str, Factors]
    matrices: Names | None
    sv: SV | slice | None
    every_side: bool
    draws: int | None
    alpha: float
    seed: int


class _Group:
    """The rows with the same labels and the same number of directions in a block."""

    def __init__(self, labels: SideLabels, span: int, factors: Factors) -> None:
        self.labels, self.span, self.E = labels, span, labels.directions
        kept = np.square(self.E).sum(1) > 0
        within = {
            name: [level if there else None for level, there in zip(levels, kept, strict=True)]
            for name, levels in factors.tested.items()
        }
        self.effects = RankEffects(within, list(factors.strata.values()))
        self.frames: list[Array] = []
        self.places: list[tuple[int, int]] = []  # of each row: the number of its pairing, and of its block there

    def axes(self, source: CovarianceSource, pairing: Pairing, kept: dict[bytes, Array]) -> Array:
        digest, S = source.covariance(pairing)
        if digest not in kept:
            kept[digest] = covariance_axes(S, self.labels.width, self.labels.centred)[1]
        return kept[digest]


def _table(svd: Decompositions, asked: _Asked, null: str, activations: Any, tell: ProgressCallback) -> pd.DataFrame:
    pairings = _pairings(svd, asked, tell)
    chosen = [_blocks(pairing, asked.sv) for pairing in pairings]
    rows = sum(map(len, chosen))
    if not rows:
        raise DtLensError(
            f"sv is {as_written(asked.sv)}, which is none of the directions; leave it out for all of them."
        )
    groups: dict[tuple[int, int], _Group] = {}
    for number, (pairing, blocks) in enumerate(zip(pairings, chosen, strict=True)):
        directions, starts, sizes = pairing.directions, pairing.starts, pairing.sizes
        for block in blocks:
            key = id(pairing.labels), int(sizes[block])
            if key not in groups:
                groups[key] = _Group(pairing.labels, key[1], asked.factors[pairing.labels.embedding.name])
            groups[key].frames.append(directions[starts[block] : starts[block] + sizes[block]])
            groups[key].places.append((number, int(block)))
    names = list(dict.fromkeys(name for factors in asked.factors.values() for name in factors.tested))
    found = [_columns(pairing, blocks, names) for pairing, blocks in zip(pairings, chosen, strict=True)]
    measures: dict[str, str] = {}
    most, lone = 0, 0.0
    lens = Snapshot.of(svd.model)
    source = (
        CovarianceSource(lens, activations, svd.fold_layernorm, asked.seed, None, svd.cache)
        if activations is not None
        else None
    )
    for number, group in enumerate(groups.values()):
        tell(
            f"drawing the null of {group.labels.embedding.name}", DECOMPOSING + (1 - DECOMPOSING) * number / len(groups)
        )
        frames = np.stack(group.frames)
        observed = effects_of(frames, group.E, group.effects)
        measures |= dict(zip(group.effects.names, group.effects.measures, strict=True))
        B = asked.draws or _enough(rows, group)
        most, lone = max(most, B), max(lone, len(group.effects.names) / (1 + B))
        if source is None:
            draw = haar_draws(group.E, group.span, group.labels.centred, group.effects, asked.seed)
            parts = [until_clear(draw, observed, B, B if group.span == 1 else FIRST)]
        else:
            parts, axes = [], dict[bytes, Array]()
            for row, (frame, (place, _)) in enumerate(zip(frames, group.places, strict=True)):
                along = group.axes(source, pairings[place], axes)
                signs = sign_draws(frame, group.E, along, group.effects, asked.seed, row)
                parts.append(until_clear(signs, observed[row : row + 1], B))
        _enter(found, chosen, group, observed, parts)
    about = {
        "null": null,
        "assumes": NULLS[null],
        "draws": most,
        "smallest_p": 1 / (1 + most),
        "lone_p": min(1.0, lone),
    }
    return _framed(found, names, asked, svd, about, measures)


def _pairings(svd: Decompositions, asked: _Asked, tell: ProgressCallback) -> list[Pairing]:
    """The matrix sides and the embeddings with factors that they are compared with."""
    tested = [name for name, factors in asked.factors.items() if factors.tested]
    if asked.every_side:
        return svd.pairings(asked.matrices, tested, tell)
    natural = svd.pairings(asked.matrices, None, tell)
    found = [pairing for pairing in natural if pairing.labels.embedding.name in tested]
    if not found:
        raise DtLensError(
            f"No side of these matrices is compared with {' or '.join(tested)} by default; give embeddings= (on the "
            "command line --embeddings) for every side, or other matrices."
        )
    return found


def _blocks(pairing: Pairing, sv: SV | slice | None) -> NDArray[np.int64]:
    """The numbers of the blocks that hold a chosen direction."""
    starts = pairing.starts
    if sv is None:
        return np.arange(len(starts))
    k = len(pairing.decomposition.sigma)
    wanted = list(range(k))[sv] if isinstance(sv, slice) else resolve_sv(sv, k, pairing.matrix.name)
    return np.unique(np.searchsorted(starts, wanted, side="right") - 1)


def _enough(rows: int, group: _Group) -> int:
    """How many random directions make a lone discovery possible among ``rows``, if they can be afforded."""
    factors = len(group.effects.names)
    affordable = MARGIN * rows * factors * group.effects.n <= RANKS
    return MARGIN * rows * (factors if affordable else 1) - 1


def _columns(pairing: Pairing, blocks: NDArray[np.int64], names: list[str]) -> dict[str, Any]:
    """The columns of a pairing that need no test."""
    empty = np.zeros(len(pairing.starts))
    columns = pairing.columns(empty, np.zeros(len(empty), np.int64), empty, empty)
    kept = {name: columns[name][blocks] for name in COLUMNS[:8]}
    for name in names:
        kept |= {f"effect_{name}": np.full(len(blocks), np.nan), f"p_{name}": np.full(len(blocks), np.nan)}
    return kept | {"factor": np.full(len(blocks), "", object), "effect": empty[blocks], "p_value": empty[blocks]}


def _enter(
    found: list[dict[str, Any]],
    chosen: list[NDArray[np.int64]],
    group: _Group,
    observed: Array,
    parts: list[Cleared],
) -> None:
    """Put a group's results into the columns of its rows."""
    names = group.effects.names
    p, each, z = (np.concatenate([part[i] for part in parts]) for i in range(3))
    # Several p-values may be as small as the draws allow; then the effect that lies furthest above its draws is named.
    best = np.where(each == each.min(1, keepdims=True), z, -np.inf).argmax(1)
    for row, (number, block) in enumerate(group.places):
        columns, at = found[number], int(np.searchsorted(chosen[number], block))
        for factor, name in enumerate(names):
            columns[f"effect_{name}"][at], columns[f"p_{name}"][at] = observed[row, factor], each[row, factor]
        columns["factor"][at], columns["effect"][at] = names[best[row]], observed[row, best[row]]
        columns["p_value"][at] = p[row]


def _framed(
    found: list[dict[str, Any]],
    names: list[str],
    asked: _Asked,
    svd: Decompositions,
    attrs: dict[str, Any],
    measures: dict[str, str],
) -> pd.DataFrame:
    """The table with its q-values and what was asked."""
    order = [*COLUMNS[:-1], *(f"{part}_{name}" for name in names for part in ("effect", "p"))]
    table = pd.DataFrame({name: np.concatenate([part[name] for part in found]) if found else [] for name in order})
    table["head"] = pd.array([None if head < 0 else head for head in table["head"]], dtype="Int64")
    table.insert(len(COLUMNS) - 1, "q_value", q_values(table["p_value"].to_numpy(dtype=np.float64)))
    factors = asked.factors
    about: dict[Any, Any] = {
        **attrs,
        "seed": asked.seed,
        "alpha": asked.alpha,
        "fold_layernorm": svd.fold_layernorm,
        "factors": {name: list(of.tested) for name, of in factors.items() if of.tested},
        "measures": measures,
        "strata": sorted({name for of in factors.values() for name in of.strata}),
        "left_out": {f"{name}: {factor}": why for name, of in factors.items() for factor, why in of.left_out.items()},
        "found": int((table["q_value"] <= asked.alpha).sum()),
    }
    table.attrs = about
    return table
