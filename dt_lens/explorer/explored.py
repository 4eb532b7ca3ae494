"""What the explorer shows: a model, its decompositions and one scan of them. Nothing here edits the model."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dt_lens.errors import DtLensError
from dt_lens.lens.embeddings import Embedding, EmbeddingRegistry
from dt_lens.lens.matrices import Matrix, SideName, Snapshot, select_matrices
from dt_lens.lens.token_text import spelled, texts
from dt_lens.svd.pairings import is_natural
from dt_lens.svd.weight_svd import WeightSVD

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from dt_lens.behaviour.sweep.results import SweepResults
    from dt_lens.progress import ProgressCallback

__all__ = ["ALPHA", "Explored"]

ALPHA = 0.05  # the false discovery rate at which a match counts


@dataclass
class Explored:
    """A model with its scan, read by every view and changed by none.

    Attributes:
        source: the name or path that it was loaded from; live runs load it again, in processes of their own.
        model: the wrapped model.
        table: the scan's rows.
        svd: the decompositions.
        given: keyword arguments of ``dt_lens.load``.
        sweep: results to show, or ``None``.
    """

    source: str
    model: Any
    table: pd.DataFrame
    svd: WeightSVD
    given: Mapping[str, Any] = field(default_factory=dict)
    sweep: SweepResults | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _named: dict[tuple[str, str, str], pd.DataFrame] = field(default_factory=dict, repr=False)
    _frames: dict[tuple[str, str, str], Mapping[str, Any]] = field(default_factory=dict, repr=False)
    _atlas: list[Any] = field(default_factory=list, repr=False)  # of the sweep, once it is made

    @classmethod
    def of(
        cls,
        source: str,
        model: Any,
        *,
        matrices: Sequence[str] | None = None,
        fold_layernorm: bool = True,
        given: Mapping[str, Any] | None = None,
        sweep: SweepResults | None = None,
        tell: ProgressCallback | None = None,
    ) -> Explored:
        """Scan a model.

        Args:
            source: where it was loaded from.
            model: the wrapped model.
            matrices: patterns of those to show; all by default.
            fold_layernorm: as for ``WeightSVD``.
            given: keyword arguments that it was loaded with.
            sweep: results to show.
            tell: receives the progress.

        Raises:
            DtLensError: as ``WeightSVD.scan`` does.
        """
        svd = WeightSVD(model, fold_layernorm=fold_layernorm)
        table = svd.scan(matrices, progress=tell if tell is not None else False)
        if table.empty:
            raise DtLensError(f"{source} has no matrix that faces the residual stream among {matrices}; name others.")
        return cls(source, model, table, svd, dict(given or {}), sweep)

    def atlas(self) -> Any:
        """The ``Atlas`` of the sweep, made when it is first asked for.

        Raises:
            DtLensError: if there is no sweep, or no atlas of it.
        """
        from dt_lens.study.atlas.atlas import make_atlas

        if self.sweep is None:
            raise DtLensError("There is no sweep here; start the explorer with --sweep DIR.")
        with self._lock:
            if not self._atlas:
                self._atlas.append(make_atlas(self.model, self.sweep))
            return self._atlas[0]

    @property
    def is_agent(self) -> bool:
        """Whether the model acts in an environment; otherwise it reads text."""
        return bool(self.model.can_act)

    @cached_property
    def matrices(self) -> list[Matrix]:
        """The matrices that were scanned, in the model's order."""
        scanned = set(self.table["matrix"])
        return [one for one in select_matrices(Snapshot.of(self.model), None) if one.name in scanned]

    def matrix(self, name: str) -> Matrix:
        """A scanned matrix by its name.

        Raises:
            DtLensError: if it was not scanned.
        """
        for one in self.matrices:
            if one.name == name:
                return one
        raise DtLensError(f"There is no matrix {name[:80]!r} here; choose one from the list.")

    def sides(self, name: str) -> list[SideName]:
        """The sides of a matrix that face the residual stream."""
        return list(self.matrix(name).residual_sides)

    def place(self, name: str | None, side: str | None, embedding: str | None) -> tuple[str, SideName, str]:
        """A matrix, a side and an embedding that fit one another, as near as can be to what is asked for.

        Raises:
            DtLensError: for a name that does not exist.
        """
        name = self.matrices[0].name if not name else self.matrix(name).name
        sides = self.sides(name)
        known = list(self.model.embeddings)
        if embedding and embedding not in known:
            raise DtLensError(f"There is no embedding {embedding[:80]!r} here; choose one from the list.")
        if side and side not in sides:
            raise DtLensError(f"{name} has no {side[:20]!r} side on the residual stream; choose {' or '.join(sides)}.")
        if not side:
            suits = [one for one in sides if embedding and is_natural(self.model.embeddings[embedding], one)]
            side = (suits or sides)[0]
        chosen = next(one for one in sides if one == side)
        if not embedding:
            rows = self.table[(self.table["matrix"] == name) & (self.table["side"] == chosen)]
            best = rows.loc[~rows["embedding"].isin(self.untrained)]
            best = rows if best.empty else best
            embedding = str(best["embedding"].iloc[best["cosine"].abs().argmax()]) if len(best) else known[0]
        return name, chosen, embedding

    @property
    def untrained(self) -> list[str]:
        """The embeddings that are heads without a loss: what they match is chance."""
        return list(self.table.attrs.get("untrained", []))

    def rows(self, name: str, side: str, embedding: str) -> pd.DataFrame:
        """The scan's rows of one matrix side and embedding; of a pairing that it left out, a scan of that alone."""
        t = self.table
        found = t[(t["matrix"] == name) & (t["side"] == side) & (t["embedding"] == embedding)]
        if len(found):
            return found
        with self._lock:
            key = (name, side, embedding)
            if key not in self._named:
                own = self.svd.scan(name, embeddings=[embedding], progress=False)
                self._named[key] = own[own["side"] == side]
            return self._named[key]

    def is_scanned(self, name: str, side: str, embedding: str) -> bool:
        """Whether a pairing is among the scan's own: its q values are then over the whole table."""
        t = self.table
        return bool(((t["matrix"] == name) & (t["side"] == side) & (t["embedding"] == embedding)).any())

    def frame(self, name: str, side: str, embedding: str) -> Mapping[str, Any]:
        """The best match of the whole matrix side under its own null: a row of ``WeightSVD.strongest``."""
        with self._lock:
            key = (name, side, embedding)
            if key not in self._frames:
                found = self.svd.strongest(name, [embedding])
                self._frames[key] = {str(k): v for k, v in found[found["side"] == side].iloc[0].items()}
            return self._frames[key]

    def threshold(self, name: str, side: SideName, embedding: str, p: float = ALPHA) -> float:
        """The |cosine| above which one direction's best match has a p-value below ``p`` under a random rotation."""
        labels = self.svd.labels_of(self.model.embeddings[embedding], self.svd[name].matrix, side)
        null = self.svd.rotations(labels, 1, 0)
        grid = np.linspace(0.0, 1.0, 2001)
        return float(grid[np.argmax(null.p_value(grid) < p)])

    def others(self, name: str, side: SideName, sv: int, n: int = 12) -> pd.DataFrame:
        """The directions of other matrices nearest to one direction, ``n`` matrix sides at most.

        Every side that faces the residual stream is compared, each by its nearest direction: ``matrix side sv cosine
        p_value q_value``. A read direction is compared with what writes it first, a write direction with what reads it.
        """
        found = self.svd[name]
        own = EmbeddingRegistry(self.model.cfg.d_model, self.model.embeddings.owner)
        label = f"{name}[{sv}]"
        own["this direction"] = Embedding(found.side(side)[sv : sv + 1], [label], kind="direction", side="in")
        with self._lock:
            rows = self.svd.among(own).scan(
                [one.name for one in self.matrices], embeddings="this direction", progress=False
            )
        rows = rows[~((rows["matrix"] == name) & (rows["side"] == side))]
        best = rows.assign(size=rows["cosine"].abs()).sort_values("size", ascending=False, kind="stable")
        best = best.drop_duplicates(["matrix", "side"]).head(n)
        return best[["matrix", "side", "sv", "cosine", "p_value", "q_value"]].reset_index(drop=True)

    def poles(self, name: str, side: SideName, sv: int, embedding: str, n: int = 6) -> list[tuple[str, str, float]]:
        """Both poles of one direction: ``("+" or "-", label, cosine)``, the largest first on each."""
        rows = self.svd.top(name, embedding, k=sv + 1, side=side, n=n)
        rows = rows[rows["sv"] == sv]
        return [
            (str(pole), label, float(cosine))
            for pole, label, cosine in zip(rows["pole"], readable(list(rows["label"])), rows["cosine"], strict=True)
        ]


def readable(labels: list[str]) -> list[str]:
    """Labels as people read them: of a token its text."""
    return [spelled(text) for text in texts(labels)] if texts(labels) != labels else labels
