"""Singular directions of every named matrix, and what they match: the tables of ``WeightSVD``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dt_lens.arguments import whole_number
from dt_lens.lens.matrices import SideName
from dt_lens.progress import ProgressCallback, reporting
from dt_lens.svd.decompositions import Decompositions, Names
from dt_lens.svd.pairings import natural_side

if TYPE_CHECKING:
    import pandas as pd

    from dt_lens.svd.label_filters import Filter, Rule
    from dt_lens.svd.null_sources import Pools
    from dt_lens.svd.token_table import TokenTable

__all__ = ["WeightSVD"]


# Tables, nulls and token tables are imported where they are used: pandas and SciPy's statistics take a while to import.
class WeightSVD(Decompositions):
    """Singular value decompositions of a model's matrices, computed when first used.

    Args:
        model: a wrapped model.
        rank: how many directions of each matrix; all of them when ``None``.
        embeddings: a registry of this model's, or names of its own embeddings (shell patterns), which are then compared
            with every side; the model's own registry when ``None``.
        fold_layernorm: decompose what acts on the stream, ``(I - 11^T/d) diag(w) W``, and compare with effective
            embedding directions; ``False`` takes raw weights and raw directions.
        resume: a folder that caches every finished decomposition on disk, so that an interrupted run resumes.
        activations: what ``dt_lens.collect_activations`` gives: weight the decompositions by the covariance of real
            inputs, so that ``sigma`` is the standard deviation of the output along a direction. What a direction reads
            is then ``M v_i`` at unit length, and not orthogonal; see ``dt_lens.svd.weighted``.

    Raises:
        DtLensError: for an object that is not a wrapped model, a registry of another model or of another dimension, or
            a rank below 1.
    """

    def scan(
        self,
        matrices: Names | None = None,
        null: str | Pools = "haar",
        seed: int = 0,
        embeddings: Names | None = None,
        progress: bool | ProgressCallback | None = None,
        *,
        activations: Any = None,
        draws: int | None = None,
    ) -> pd.DataFrame:
        """The best match of every direction of every matrix, and the probability of a match as good under a null.

        A row is one direction, or one block of indistinguishable directions, against one embedding: the label of the
        largest absolute cosine (for a block, of the largest projection on its span, which has no sign), ``z`` and
        ``p_value`` of a best match (the maximum over the labels) under the null, and ``q_value`` by Benjamini-Hochberg
        over the whole table.

        Args:
            matrices: shell patterns such as ``"*.W_in"``; every catalogued matrix when ``None``.
            null: what a direction without meaning is: ``"haar"``, rotated at random; ``"covariance"``, drawn from a
                Gaussian with the covariance of the vectors on its side of the matrix; ``"spectrum"``, as long on every
                principal axis of that covariance, with random signs; ``"bands"``, as long on every band of such axes
                and rotated at random inside it; ``"untrained"`` or ``"shuffled"``, found in a freshly initialised
                model or in weights whose entries are in random order. Or what ``pools`` returned. The classes in
                ``dt_lens.statistics.nulls`` say how each is computed.
            seed: of the null's Monte Carlo part.
            embeddings: names (patterns) to compare with every side; by default input embeddings are compared with
                reading sides and output embeddings with writing sides.
            progress: ``True`` for a bar, ``False`` for none, or a function of (what is being done, share done); by
                default a bar in a notebook and none elsewhere.
            activations: for ``"covariance"``, ``"spectrum"`` and ``"bands"``: what ``dt_lens.collect_activations``
                gives, a file of them, or a covariance ``[d_model, d_model]`` for every side.
            draws: for ``"untrained"`` and ``"shuffled"`` how many models are drawn: with ``B`` pooled matches no
                p-value is below ``1 / (1 + B)`` (``table.attrs["smallest_p"]``), so by default as many as make ``B``
                10,000 in every pool of single directions, at least 3 and at most 100. Otherwise how many directions
                are drawn for each null that is not exact.

        Returns:
            a DataFrame with the columns ``matrix layer head side sv block sigma embedding label cosine z p_value
            q_value``; ``sv`` is the direction, or the first of a block. ``block`` is how many directions cannot be
            distinguished from it, itself included: those whose sigmas are too close, and, where rounding may turn it
            out of the span of the matrix's directions, those that the matrix does not have.
            ``table.attrs`` holds what was folded, which embeddings are untrained heads, the null, what it ``assumes``,
            and the seed.

        Raises:
            DtLensError: for an unknown matrix, embedding or null, values that are not finite, a seed below 0, or fewer
                than one draw.
        """
        from dt_lens.svd.scan import scan_table

        with reporting(progress) as tell:
            return scan_table(self, matrices, null, seed, embeddings, activations, draws, tell)

    def pools(
        self,
        null: str,
        matrices: Names | None = None,
        embeddings: Names | None = None,
        *,
        seed: int = 0,
        draws: int | None = None,
        progress: bool | ProgressCallback | None = None,
    ) -> Pools:
        """The best matches of drawn models, for ``scan(null=pools)`` and ``strongest(null=pools)``.

        Drawing takes most of the time; pools of ``"untrained"`` models fit every model of the same shape.

        Args: as for ``scan``.

        Raises:
            DtLensError: for a null that is not ``"untrained"`` or ``"shuffled"``, and as ``scan`` does.
        """
        from dt_lens.svd.null_sources import draw_pools

        with reporting(progress) as tell:
            return draw_pools(self, null, self.pairings(matrices, embeddings), seed, draws, tell)

    def strongest(
        self,
        matrices: Names | None = None,
        embeddings: Names | None = None,
        samples: int = 1000,
        seed: int = 0,
        null: str | Pools = "haar",
        draws: int | None = None,
    ) -> pd.DataFrame:
        """The best match of each whole matrix with each embedding: the null of "I looked at everything and saw 0.24".

        Under ``"haar"`` all directions are rotated at once: ``p_value`` is the share of ``samples`` random rotations
        with a match as good, or the union bound over the directions where that is below ``100 / (samples + 1)``. Under
        ``"untrained"`` and ``"shuffled"`` it is the share among the matrices of the same kind in ``draws`` models.
        ``"covariance"``, ``"spectrum"`` and ``"bands"`` are refused: they draw single directions, not whole frames.

        Args: as for ``scan``.

        Returns:
            a DataFrame ``matrix side embedding sv label cosine null_median p_value q_value``.
        """
        from dt_lens.svd.strongest import strongest

        return strongest(self, matrices, embeddings, samples, seed, null, draws)

    def subspaces(
        self,
        matrices: Names | None = None,
        embeddings: Names | None = None,
        k: int | Sequence[int] = (1, 2, 4, 8, 16, 32),
        *,
        seed: int = 0,
        progress: bool | ProgressCallback | None = None,
    ) -> pd.DataFrame:
        """Compare spans, not vectors: of the first ``k`` directions of each matrix and of each embedding's labels.

        Args:
            matrices, embeddings, progress: as for ``scan``.
            k: one or several; each is moved to the nearest number that cuts no block of near-equal sigmas.
            seed: of the draws behind ``haar_largest``.

        Returns:
            a DataFrame ``matrix layer head side k embedding labels dimension largest haar_largest overlap haar_overlap
            z p_value q_value``. ``labels`` is the dimension ``m`` of the labels' span in a space of ``dimension``
            (one less where either side of the comparison is behind a LayerNorm's centring);
            ``largest`` the cosine of the smallest principal angle, ``haar_largest`` its median under a random rotation;
            ``overlap`` the mean squared cosine of the ``min(k, m)`` principal angles, ``haar_overlap`` its mean under
            a random rotation, which is exact, like ``p_value`` where ``k`` or ``m`` is 1 (``nulls.SubspaceOverlap``
            says how it is drawn or approximated otherwise). ``q_value`` is over the whole table.

        Raises:
            DtLensError: for a ``k`` that is not a whole number of at least 1, and as ``scan`` does.
        """
        from dt_lens.svd.subspaces import subspaces

        return subspaces(self, matrices, embeddings, k, seed=seed, progress=progress)

    def cosines(self, matrix: str, embedding: str, side: SideName | None = None, k: int | None = None) -> pd.DataFrame:
        """The cosines of one matrix's first ``k`` directions (rows, by ``sv``) with one embedding's labels (columns).

        Args:
            side: by default the one the embedding is compared with in ``scan``: a reading side for input embeddings.
            k: all of them when ``None``.

        Raises:
            DtLensError: for an unknown matrix or embedding, a side that is not on the residual stream, QK without a
                side, or a negative ``k``.
        """
        import pandas as pd

        k = None if k is None else whole_number(k, "k", 0)
        found, labelled = self[matrix], self.registry[embedding]
        side = natural_side(found.matrix, labelled, side)
        values = self.labels_of(labelled, found.matrix, side).cosines(found.side(side)[:k].cpu().numpy())
        return pd.DataFrame(values, columns=list(labelled.labels), index=pd.RangeIndex(len(values), name="sv"))

    def top(
        self,
        matrix: str,
        embedding: str,
        k: int = 8,
        side: SideName | None = None,
        n: int = 3,
        *,
        labels: int | None = None,
    ) -> pd.DataFrame:
        """Both poles of the first ``k`` directions: the labels of largest and of smallest cosine, ``n`` of each.

        ``k`` and ``n`` as in ``tokens`` and on the command line; ``labels`` is the old name of ``n``.

        Returns:
            a DataFrame ``sv block sigma pole rank label cosine trained``. ``block`` is how many directions cannot be
            distinguished from this one, itself included (``Decomposition.indistinct``); ``pole`` is ``"+"`` for labels
            of positive cosine and ``"-"`` for those of negative, so a pole may have fewer labels than asked for; a
            direction's sign is a convention, so neither pole is the right one. ``trained`` is false for an output head
            that had no loss: what it matches is chance.

        Raises:
            DtLensError: as ``cosines`` does, and for a negative number of labels.
        """
        import pandas as pd

        from dt_lens.svd.token_table import poles

        n = whole_number(n, "n", 0) if labels is None else whole_number(labels, "labels", 0)
        table, found = self.cosines(matrix, embedding, side, k), self[matrix]
        labelled = self.registry[embedding]
        side = natural_side(found.matrix, labelled, side)
        names, rows = list(table.columns), []
        for sv, values in enumerate(table.to_numpy()):
            block, sigma = found.indistinct(sv, side), float(found.sigma[sv])
            order = np.argsort(-values, kind="stable")
            plus, minus = poles(torch.from_numpy(values[order]), n)
            for pole, picked in (("+", order[plus]), ("-", order[minus][::-1])):
                for rank, j in enumerate(picked):
                    rows.append((sv, block, sigma, pole, rank, names[j], float(values[j]), labelled.trained))
        return pd.DataFrame(rows, columns=["sv", "block", "sigma", "pole", "rank", "label", "cosine", "trained"])

    def tokens(
        self,
        matrices: Names,
        embeddings: Names | None = None,
        k: int = 8,
        n: int = 10,
        where: Rule | Filter | Sequence[Rule | Filter] | None = None,
        side: SideName | None = None,
    ) -> TokenTable:
        """The ``n`` labels at both poles of the first ``k`` directions, several embeddings side by side.

        A table for Jupyter, pandas and HTML; ``dt_lens.svd.token_table.token_table`` describes the arguments.
        """
        from dt_lens.svd.token_table import token_table

        return token_table(self, matrices, self._named if embeddings is None else embeddings, k, n, where, side)
