"""A model that is neither an agent nor a language model, and a task of it, as a third party would write them.

The model sorts points of the plane into classes: a residual stream, blocks of an MLP without norms, and no attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dt_lens.behaviour.task import Columns, Task
from dt_lens.behaviour.terms import Terms
from dt_lens.lens.embeddings import Embedding, EmbeddingRegistry
from dt_lens.lens.hooks import HookedModule, HookPoint
from dt_lens.lens.matrices import Structure
from dt_lens.progress import Count

__all__ = ["Points", "Sorter", "sorter"]

CLASSES = ("north", "east", "south", "west")


@dataclass
class Sizes:
    d_model: int = 8
    d_mlp: int = 16
    n_layers: int = 2
    n_heads: int = 1


class Block(nn.Module):
    def __init__(self, cfg: Sizes) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.randn(cfg.d_model, cfg.d_mlp) / cfg.d_model**0.5)
        self.W_out = nn.Parameter(torch.randn(cfg.d_mlp, cfg.d_model) / cfg.d_mlp**0.5)
        self.hook_resid_pre, self.hook_resid_mid, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
        self.mlp = nn.ModuleDict({"hook_pre": HookPoint(), "hook_post": HookPoint()})
        self.hook_mlp_out = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        x = self.hook_resid_mid(self.hook_resid_pre(x))
        hidden = self.mlp["hook_post"](torch.relu(self.mlp["hook_pre"](x @ self.W_in)))
        return self.hook_resid_post(x + self.hook_mlp_out(hidden @ self.W_out))


class Sorter(HookedModule):
    """Logits of each class for points ``[batch, place, 2]``."""

    kind = "point sorter"
    can_run = True
    can_act = False
    original: nn.Module | None = None
    reference: Any = None

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.cfg = Sizes()
        torch.manual_seed(seed)
        self.W_point = nn.Parameter(torch.randn(2, self.cfg.d_model))
        self.blocks = nn.ModuleList(Block(self.cfg) for _ in range(self.cfg.n_layers))
        self.W_class = nn.Parameter(torch.randn(self.cfg.d_model, len(CLASSES)) / 2)
        self.setup()
        self._embeddings: EmbeddingRegistry | None = None

    def forward(self, points: Tensor) -> Tensor:
        x = points.to(self.W_point) @ self.W_point
        for block in self.blocks:
            x = block(x)
        return x @ self.W_class

    @property
    def weights(self) -> Mapping[str, Tensor]:
        blocks = {
            f"blocks.{layer}.mlp.{name}": getattr(block, name).data
            for layer, block in enumerate(self.blocks)
            for name in ("W_in", "W_out")
        }
        return {"point.W": self.W_point.data, **blocks, "class.W": self.W_class.data}

    @property
    def structure(self) -> Structure:
        nowhere = (None,) * self.cfg.n_layers
        return Structure(self.cfg.n_layers, 1, self.cfg.d_model, (1.0,) * self.cfg.n_layers, nowhere, nowhere)

    @property
    def embeddings(self) -> EmbeddingRegistry:
        if self._embeddings is None:
            self._embeddings = EmbeddingRegistry(self.cfg.d_model, "a sorter")
            self._embeddings["point_in"] = Embedding(self.W_point.data, ["x", "y"], kind="point", side="in")
            self._embeddings["class_out"] = Embedding(self.W_class.data.T, list(CLASSES), kind="class", side="out")
        return self._embeddings

    def probe(self, seed: int = 0) -> dict[str, Any]:
        return {"points": torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(seed))}


def sorter(seed: int = 0, steps: int = 150) -> Sorter:
    """A trained one."""
    model = Sorter(seed)
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    with torch.enable_grad():
        for step in range(steps):
            points = torch.randn(64, 1, 2, generator=torch.Generator().manual_seed(step))
            loss = nn.functional.cross_entropy(model(points)[:, 0], _classes(points)[:, 0])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return model


def _classes(points: Tensor) -> Tensor:
    """North and south where the second coordinate is the larger one, east and west where the first is."""
    x, y = points[..., 0], points[..., 1]
    upright = torch.where(y > 0, 0, 2)
    return torch.where(x.abs() > y.abs(), torch.where(x > 0, 1, 3), upright)


class Points(Task):
    """A unit is a cloud of points, by seed; its score is the mean log probability of the right classes."""

    cloud = 16

    @property
    def terms(self) -> Terms:
        return Terms(
            task="points",
            measures={"score": "real", "wrong": "boolean"},
            outcome="score",
            unit="cloud",
            index="seed",
            setting={"points": self.cloud},
            place="points of the plane",
            actor="sorter",
            failures={"wrong": "more than a quarter of the points sorted wrongly"},
            failure="wrong",
        )

    def run(
        self, model: Any, units: Sequence[int], *, workers: int | None = None, progress: Count | None = None
    ) -> Columns:
        scores, wrong = [], []
        for cloud in self.batches(model, units):
            points, right = cloud["points"], _classes(cloud["points"])
            log_p = model(**cloud).double().log_softmax(-1)
            scores.append(float(log_p.gather(-1, right[..., None]).mean()))
            wrong.append(bool((log_p.argmax(-1) != right).double().mean() > 0.25))
            if progress is not None:
                progress(len(scores), len(units))
            assert points.shape[1] == self.cloud
        return {"score": scores, "wrong": wrong}

    def batches(self, model: Any, units: Sequence[int]) -> Iterable[Any]:
        return self._clouds(units)

    def _clouds(self, units: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        for unit in units:
            rng = np.random.default_rng(unit)
            yield {"points": torch.from_numpy(rng.standard_normal((1, self.cloud, 2))).float()}
