"""First and second moments of what a model's matrices read while it runs, and the file that holds them.

``E[x]`` and ``E[x x^T]`` of a matrix's inputs determine the output energy of any change of the matrix,
``E ||x Delta||^2 = tr(Delta^T E[x x^T] Delta)``, and the covariance of any output. ``dt_lens.collect_activations``
collects them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dt_lens.arguments import atomic_write, local_path
from dt_lens.errors import DtLensError, because, nearest
from dt_lens.lens.matrices import Matrix, Weighted
from dt_lens.lens.weights import fingerprint

__all__ = ["LowRank", "Activations", "Moments"]

LowRank = tuple[Float[Tensor, "d_left r"], Float[Tensor, "r d_right"]]

FORMAT = "dt-lens activations 1"


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of vectors ``x [d]``, in float64.

    Attributes:
        count: how many vectors; neighbours in one window, and one token in several windows, are not independent.
        mean: ``E[x]``, ``[d]``.
        second: ``E[x x^T]``, about zero, ``[d, d]``.
    """

    count: int
    mean: Float[Tensor, " d"]
    second: Float[Tensor, "d d"]

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """``E[x x^T] - E[x] E[x]^T``, the population's (divided by ``count``)."""
        return self.second - torch.outer(self.mean, self.mean)

    @property
    def effective_rank(self) -> float:
        """``exp`` of the entropy of the covariance's normalised eigenvalues: how many dimensions the vectors use.

        Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (2007), of the covariance.
        """
        shares = torch.linalg.eigvalsh(self.covariance).clamp_min(0.0)
        if not float(shares.sum()) > 0:
            return 0.0
        shares = shares / shares.sum()
        return float(torch.special.entr(shares).sum().exp())

    def through(self, weight: Float[Tensor, "d e"], bias: Float[Tensor, " e"] | None = None) -> Moments:
        """The moments of ``x @ weight + bias``."""
        weight = weight.to(self.second)
        mean, second = self.mean @ weight, weight.T @ self.second @ weight
        if bias is not None:
            bias = bias.to(self.second)
            cross = torch.outer(mean, bias)
            second = second + cross + cross.T + torch.outer(bias, bias)
            mean = mean + bias
        return Moments(self.count, mean, (second + second.T) / 2)

    def energy(self, change: LowRank) -> float:
        """The output energy ``sqrt(E ||x @ left @ right||^2)`` of a change of the matrix that reads ``x``."""
        left, right = (part.to(self.second) for part in change)
        inner, outer = left.T @ self.second @ left, right @ right.T
        return float((inner * outer).sum().clamp_min(0.0).sqrt())


class _Inputs(Mapping[str, Moments]):
    """Moments by the name of the matrix that reads them; several matrices read the same vectors."""

    def __init__(self, points: Mapping[str, Moments], reads: Mapping[str, str]) -> None:
        self._points, self._reads = points, reads

    def __getitem__(self, name: str) -> Moments:
        if name not in self._reads:
            raise DtLensError(f"These activations do not cover what {name} reads." + nearest(name, self._reads))
        return self._points[self._reads[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._reads

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)


@dataclass(frozen=True, eq=False)
class Activations:
    """Moments of what the matrices of one model read, and of its residual stream, over real inputs.

    Attributes:
        points: moments by place in the forward pass.
        reads: the place of what each matrix reads, by the matrix's name.
        stream: moments at ``"blocks.{l}.hook_resid_pre"``, ``mid`` and ``post``.
        record: what was collected: ``model_id``, ``environment``, ``target_return``, ``seed``, ``episodes``, ``steps``,
            ... in plain JSON values.
        made_of: a hash of each matrix of the model, by name, so that activations of another model are refused.
    """

    points: Mapping[str, Moments]
    reads: Mapping[str, str]
    stream: Mapping[str, Moments]
    record: Mapping[str, Any] = field(default_factory=dict)
    made_of: Mapping[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> Mapping[str, Moments]:
        """Moments of what each raw matrix ``M`` reads (``y = x @ M``), by its name.

        After a LayerNorm that is the norm's output, scale and bias included. ``W_out`` reads the MLP's activations,
        ``W_O`` the values that all heads gathered, side by side, and one head's ``W_O.h`` its own. The circuit ``OV.h``
        reads what its head attends to: the attention-weighted sum of what ``W_V`` reads. For ``QK.h`` these
        are the queries' inputs; ``keys`` has the keys'. Asking for a matrix that was not watched is a ``DtLensError``.
        """
        return _Inputs(self.points, self.reads)

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with any bit of the moments; records of edits name it."""
        digest = hashlib.blake2b(json.dumps(sorted(self.reads.items())).encode(), digest_size=8)
        for kind in (self.points, self.stream):
            for name, moments in sorted(kind.items()):
                digest.update(f"{name} {moments.count} {len(moments.mean)}".encode())
                for part in (moments.mean, moments.second):
                    digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def of(self, matrix: Matrix, lens: Weighted) -> Moments:
        """What ``matrix`` of the unedited model ``lens`` reads.

        Raises:
            DtLensError: if it was not watched, or these are another model's activations.
        """
        moments = self.inputs[matrix.name]
        known = self.made_of.get(matrix.name)
        if known is not None and known != fingerprint(lens, matrix).hex():
            raise DtLensError(
                f"These activations are of another model, whose {matrix.name} differs; collect this model's own with "
                "dt_lens.collect_activations."
            )
        width = matrix.factors[0].view(lens.weights).shape[0]
        if len(moments.mean) != width:
            raise DtLensError(
                f"The activations that {matrix.name} reads have {len(moments.mean)} entries and the matrix reads "
                f"{width}; collect this model's own with dt_lens.collect_activations."
            )
        return moments

    def keys(self, matrix: Matrix, lens: Weighted) -> Moments:
        """What the key side of a ``QK`` circuit reads: every token that a query may attend to.

        Raises:
            DtLensError: as ``of`` does.
        """
        self.of(matrix, lens)
        # In an agent's last block only the last state's token is a query.
        place = self.reads[matrix.name].removesuffix(".query")
        if place not in self.points:
            raise DtLensError(f"These activations do not cover the keys of {matrix.name}; collect them again.")
        return self.points[place]

    def between(self, matrix: Matrix, lens: Weighted) -> Moments:
        """Moments of what a circuit's second factor is applied to: the input times the first factor, plus the bias.

        For ``OV`` that is what the head gathers, for ``QK`` the head's queries, before any rotation by position.

        Raises:
            DtLensError: as ``of`` does.
        """
        first, weights = matrix.factors[0], lens.weights
        bias = weights.get(first.weight.replace(".attn.W_", ".attn.b_"))
        if bias is not None and first.head is not None:
            bias = bias[first.head]
        return self.of(matrix, lens).through(first.view(weights), bias)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file.

        Raises:
            DtLensError: when it cannot be written.
        """
        path, tensors, counts = local_path(path, "path"), dict[str, Tensor](), dict[str, int]()
        for kind, moments in (("point", self.points), ("stream", self.stream)):
            for name, found in moments.items():
                key = f"{kind} {name}"
                tensors[f"{key} mean"], tensors[f"{key} second"] = found.mean.contiguous(), found.second.contiguous()
                counts[key] = found.count
        facts = {
            "counts": counts,
            "reads": dict(self.reads),
            "record": dict(self.record),
            "made_of": dict(self.made_of),
        }
        metadata = {"format": FORMAT, **{name: json.dumps(value) for name, value in facts.items()}}
        metadata["checksum"] = _checksum(metadata, self.digest)
        with atomic_write(path, SafetensorError) as part:
            save_file(tensors, part, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Activations:
        """Read a file that ``save`` wrote.

        Raises:
            DtLensError: for a file that does not exist, is damaged, or holds something else.
        """
        path = local_path(path, "path")
        wrong = f"{path} is not a file of activations"
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                if facts.get("format") != FORMAT:
                    raise DtLensError(f"{wrong}; Activations.save and dt-lens activations write such files.")
                counts, reads, record, made_of = (
                    json.loads(facts[name]) for name in ("counts", "reads", "record", "made_of")
                )
                kinds: dict[str, dict[str, Moments]] = {"point": {}, "stream": {}}
                for key, count in counts.items():
                    kind, _, name = key.partition(" ")
                    mean, second = file.get_tensor(f"{key} mean"), file.get_tensor(f"{key} second")
                    if second.shape != (*mean.shape, *mean.shape) or second.dtype != torch.float64:
                        raise DtLensError(f"{wrong}: {key!r} has moments of shape {list(second.shape)}.")
                    kinds[kind][name] = Moments(count, mean, second)
        except FileNotFoundError as error:
            raise DtLensError(
                f"There is no file of activations {str(path)!r}; Activations.save and dt-lens activations write such "
                "files."
            ) from error
        except (OSError, SafetensorError, KeyError, ValueError, AttributeError) as error:
            raise DtLensError(f"{wrong} that can be read: {because(error)}.") from error
        missing = set(reads.values()) - kinds["point"].keys()
        if missing:
            raise DtLensError(f"{wrong}: it lacks {min(missing)!r}.")
        found = cls(kinds["point"], reads, kinds["stream"], record, made_of)
        said, digest = facts.pop("checksum", None), found.digest
        vars(found).pop("digest")  # the caller's may change
        if said is not None and said != _checksum(facts, digest):  # older files hold none
            raise DtLensError(f"{path} is damaged: its checksum does not match what it holds; collect them again.")
        return found

    def __repr__(self) -> str:
        most = max((moments.count for moments in self.points.values()), default=0)
        return f"Activations({len(self.reads)} matrices, {most} tokens, digest {self.digest})"


def _checksum(facts: Mapping[str, str], digest: str) -> str:
    """A hash of a file's metadata and of the digest of its moments."""
    return hashlib.blake2b(json.dumps([sorted(facts.items()), digest]).encode(), digest_size=16).hexdigest()
