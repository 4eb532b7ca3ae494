"""What a checkpoint must carry to be run, and usually does not: the facts of its training run."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dt_lens.errors import DtLensError, nearest

__all__ = ["FACTS_FILE", "RunFacts"]

FACTS_FILE = "dt_lens.json"


@dataclass(frozen=True)
class RunFacts:
    """The facts of a training run, stored as ``dt_lens.json`` beside the weights.

    States are fed as ``(observation - state_mean) / state_std`` and returns-to-go as ``return / return_scale``;
    ``target_returns`` are in the environment's own units, the first is the default. Labels name the coordinates of the
    state and action vectors. ``trained_heads`` names the output heads that had a loss: the usual recipe trains only
    ``action``, and comparing with the others compares with noise.
    """

    context: int  # steps the agent looks back
    environment: str | None = None  # a Gymnasium id
    environment_kwargs: dict[str, Any] = field(default_factory=dict)
    state_mean: tuple[float, ...] | None = None
    state_std: tuple[float, ...] | None = None
    return_scale: float = 1.0
    target_returns: tuple[float, ...] = ()
    state_labels: tuple[str, ...] | None = None
    action_labels: tuple[str, ...] | None = None
    trained_heads: tuple[str, ...] = ("action",)
    about: dict[str, Any] = field(default_factory=dict)  # free: dataset, recipe, scores

    def __post_init__(self) -> None:
        if isinstance(self.context, bool) or not isinstance(self.context, int) or self.context < 1:
            raise DtLensError(f"The run facts' context is {self.context!r}; it must be a positive number of steps.")
        if not (math.isfinite(self.return_scale) and self.return_scale > 0):
            raise DtLensError(f"The run facts' return_scale is {self.return_scale!r}; it must be a positive number.")
        if (self.state_mean is None) != (self.state_std is None):
            raise DtLensError("The run facts give only one of state_mean and state_std; give both or neither.")
        if self.state_mean is not None and self.state_std is not None:
            if len(self.state_mean) != len(self.state_std):
                raise DtLensError(
                    f"The run facts' state_mean has {len(self.state_mean)} entries and state_std {len(self.state_std)}."
                )
            if not all(math.isfinite(m) for m in self.state_mean) or not all(
                math.isfinite(s) and s > 0 for s in self.state_std
            ):
                raise DtLensError("The run facts' state_mean must be finite and state_std positive in every entry.")

    def save(self, folder: Path) -> None:
        """Write ``dt_lens.json`` into ``folder``."""
        (folder / FACTS_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> RunFacts | None:
        """Read ``dt_lens.json`` from ``folder``; ``None`` where there is none.

        Raises:
            DtLensError: for a file that is not JSON, or a field that is unknown or of the wrong kind.
        """
        file = folder / FACTS_FILE
        if not file.exists():
            return None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DtLensError(f"{file} cannot be read as JSON: {error}.") from error
        return cls.from_dict(values, str(file))

    @classmethod
    def from_dict(cls, values: Any, source: str = "the run facts") -> RunFacts:
        """Facts from plain JSON values; lists become tuples."""
        if not isinstance(values, dict):
            raise DtLensError(f"{source} must be a JSON object.")
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise DtLensError(f"{source} has an unknown field {name!r}." + nearest(name, known))
        frozen: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        try:
            return cls(**frozen)
        except TypeError as error:
            raise DtLensError(f"{source} does not hold what is expected: {error}.") from error
