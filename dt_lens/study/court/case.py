"""A model's directions and labels, as they should be computed and as the note's code computed them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dt_lens.lens.embeddings import Embedding
from dt_lens.lens.matrices import Matrix, Snapshot, select_matrices
from dt_lens.study.court.claims import NotApplicable, Way
from dt_lens.study.labels import inputs_of, outputs_of
from dt_lens.svd.decomposition import Decomposition
from dt_lens.svd.side_labels import unit_rows
from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["FIRST", "Case", "Labels"]

Array = NDArray[np.float64]
FIRST = 40  # directions of a matrix that are compared, as many as in the note


class Labels(NamedTuple):
    """Labels as unit rows ``[n, d_model]``, and the dimension of the space that they and the directions lie in."""

    rows: Array
    dimension: int

    def turned(self, rng: np.random.Generator) -> Labels:
        """The same labels under one random rotation of their space, as a control."""
        d = self.rows.shape[1]
        basis = np.eye(d)
        if self.dimension < d:  # orthogonal to the constant vector
            basis = np.linalg.qr(np.column_stack([np.ones(d), np.eye(d)[:, 1:]]))[0][:, 1:]
        turn = np.linalg.qr(rng.standard_normal((basis.shape[1], basis.shape[1])))[0]
        return Labels(self.rows @ basis @ turn @ basis.T, self.dimension)


class Case:
    """One model, with its directions and labels computed both ways.

    Args:
        model: a wrapped model.
        seed: of all random draws.
        draws: how many draws a null takes.
    """

    def __init__(self, model: Any, seed: int = 0, draws: int = 4000) -> None:
        self.model, self.seed, self.draws = model, seed, draws
        self._svd = WeightSVD(model)
        self._note: dict[str, Array] = {}

    def matrices(self, kind: str, layer: int | None = None) -> list[Matrix]:
        """The matrices of a kind (``"W_in"``, ``"W_out"``, ``"OV"``), of all blocks or of one.

        Raises:
            NotApplicable: if the model has none.
        """
        found = [m for m in select_matrices(self.model) if m.kind == kind and layer in (None, m.layer)]
        if not found:
            raise NotApplicable(f"the model has no {kind}")
        return found

    def decomposition(self, name: str) -> Decomposition:
        """The decomposition of a matrix, LayerNorm folded."""
        return self._svd[name]

    def vectors(self, matrix: Matrix, way: Way, side: str | None = None) -> Array:
        """Unit vectors ``[k, d_model]``, largest sigma first.

        The note's way: of raw matrices; for ``W_out`` the rows of V although the directions are the rows of V^T, so
        coordinate ``i`` of all directions; for OV the rows of V^T, which is the write side, whatever ``side`` is.

        Raises:
            NotApplicable: if the note's rows are not vectors of the stream.
        """
        if way == "proper":
            chosen = matrix.left if matrix.side(side) == "left" else matrix.right
            return np.asarray(self._svd[matrix.name].side(chosen).cpu().numpy())
        if matrix.name not in self._note:
            raw = matrix.dense(Snapshot.of(self.model), fold_layernorm=False).cpu().numpy()
            if matrix.kind in ("W_in", "W_gate"):
                # With the stream on the right, as torch.nn.Linear stores it.
                found = np.linalg.svd(raw.T, full_matrices=False)[2]
            elif matrix.kind == "W_out":
                found = np.linalg.svd(raw, full_matrices=False)[2].T
            else:
                found = np.linalg.svd(raw, full_matrices=False)[2]
            self._note[matrix.name] = found
        found = self._note[matrix.name]
        if found.shape[1] != self.model.cfg.d_model:
            raise NotApplicable(
                f"what the note's code reads of {matrix.name} has {found.shape[1]} entries and the stream "
                f"{self.model.cfg.d_model}"
            )
        return found

    def labels(self, embedding: Embedding, way: Way, matrix: Matrix, side: str | None = None) -> Labels:
        """An embedding's labels as a side of a matrix sees them; the note's way, as raw unit rows."""
        folded = way == "proper"
        centred = folded and matrix.centred(matrix.side(side))
        rows = np.asarray(unit_rows(embedding, slice(None), folded, centred).numpy())
        return Labels(rows, rows.shape[1] - int(centred))

    def embedding(self, kind: str) -> Embedding:
        """``"output"`` and ``"input"`` (actions and states where it has those, else tokens, else what it has),
        ``"reward"`` or ``"time"``, by the embeddings' kinds and sides.

        Raises:
            NotApplicable: if the model has none.
        """
        known: Mapping[str, Embedding] = self.model.embeddings
        words = {"output": "action output", "input": "state input", "reward": "reward embedding"}
        of_kind = {"reward": "reward", "time": "timestep"}.get(kind)
        if of_kind is None:
            names = outputs_of(known) if kind == "output" else inputs_of(known)
        else:
            names = [name for name, e in known.items() if (e.kind, e.side) == (of_kind, "in")]
        if not names:
            raise NotApplicable(f"the model has no {words.get(kind, 'timestep embedding')}")
        return known[names[0]]

    def untrained(self, kind: str) -> Embedding | None:
        """The largest head of a kind (or of ``"any"``) that was never trained; ``None`` if there is none."""
        found = [e for e in self.model.embeddings.values() if not e.trained and kind in ("any", e.kind)]
        return max(found, key=len, default=None)

    def control(
        self, kind: str, instead: Embedding, way: Way, matrix: Matrix, side: str | None = None
    ) -> tuple[Labels, str]:
        """Labels without meaning, and their name: an untrained head's, or else ``instead``'s turned at random."""
        head = self.untrained(kind)
        if head is not None:
            return self.labels(head, way, matrix, side), f"the untrained {head.name}"
        turn = np.random.default_rng([self.seed, 99])
        return self.labels(instead, way, matrix, side).turned(turn), "the labels turned at random"

    @property
    def gated(self) -> str:
        """What a sentence about ``W_in`` adds if the MLP is gated."""
        gated = any(m.kind == "W_gate" for m in select_matrices(self.model))
        return " The MLP is gated, and its W_gate was not tried." if gated else ""
