"""What ``certify`` has proven of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dt_lens.lens.assumed import assumed_text
from dt_lens.lens.table_rows import counted

__all__ = ["Certificate"]


@dataclass(frozen=True)
class Certificate:
    """The result of ``certify``: the largest relative error of each part, and whose activations it was compared with.

    ``errors`` is keyed by the names of matrices, raw and with the LayerNorm folded, and of the parts between them.
    ``unproven`` lists, for each table of positions, timesteps or tokens, the rows that change no output of the batch.
    ``assumed`` are options that nobody said: the pass that a file is compared with assumes them too.
    """

    errors: Mapping[str, float]
    against: str  # "the original model" or "the lens's own forward pass"
    unproven: Mapping[str, tuple[range, ...]] = field(default_factory=dict)
    assumed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest relative error of all."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        rows = counted(self.unproven)
        rest = f" (not proven: {rows}, which change no output of this batch)" if rows else ""
        proven = f"{len(self.errors)} matrices and parts reproduce their activations{rest} in {self.against}"
        open_ = f"; not proven, because assumed: {assumed_text(self.assumed)}" if self.assumed else ""
        return f"{proven}; largest relative error {self.worst:.1e}{open_}"
