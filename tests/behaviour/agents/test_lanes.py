"""In an arrangement a row's actions have the same bits in every row and width that it allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from dt_lens.behaviour.agents.lanes import LEAST_LANES, MOST_LANES, arrange, plan_lanes
from dt_lens.behaviour.agents.windows import SlidingPolicy
from dt_lens.decision_transformer.policy import ActingModel
from dt_lens.lens.forward_mode import one_thread

SHAPES = [
    {},
    {"d_model": 128, "d_mlp": 512, "n_heads": 1},
    {"d_model": 7, "n_heads": 1},
    {"d_model": 11, "n_heads": 1, "d_mlp": 5},
    {"d_model": 33, "n_heads": 3, "normalization": "post"},
    {"d_model": 40, "n_heads": 4, "position": "learned", "n_position": 12},
    {"d_model": 128, "n_heads": 4, "position": "learned", "n_position": 11, "gated_mlp": True, "action_padding": True},
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def _acts(policy: SlidingPolicy, row: int) -> torch.Tensor:
    """Six steps of one fixed episode in ``row``, other episodes of other ages around it."""
    generator = torch.Generator().manual_seed(1)
    cfg, width = policy.model.cfg, policy.width
    out = []
    for t in range(6):
        mine = [torch.randn(1, n, generator=generator) for n in (cfg.state_dim, 1, cfg.act_dim)]
        batch = [torch.randn(width, n) for n in (cfg.state_dim, 1, cfg.act_dim)]
        for b, m in zip(batch, mine, strict=True):
            b[row] = m
        timesteps = torch.randint(0, 30, (width,))
        timesteps[row] = t
        if t == 2:
            policy.restart((row + 1) % width)
        out.append(policy.act(batch[0], batch[1], timesteps, batch[2])[row].clone())
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cfg", SHAPES, ids=str)
def test_rows_keep_their_bits(make_model: Callable[..., Any], cfg: dict[str, Any], dtype: torch.dtype) -> None:
    model = make_model("Hopper-v5", **cfg).to(dtype)
    acting = ActingModel(model.weights, model.cfg)
    expected = None
    padding: Any = "visible" if cfg.get("action_padding") else "mask"
    for lanes in (8, 9, 13, 16):
        width, least, alone = arrange(acting, 4, lanes)
        widths = {width} if least is None else {width, max(least, LEAST_LANES)}
        for w in sorted(widths):
            for row in (0, w // 2, w - 1):
                got = _acts(SlidingPolicy(acting, 4, w, alone=alone, padding=padding), row)
                expected = got if expected is None else expected
                assert torch.equal(got, expected), (lanes, w, row)


@pytest.mark.parametrize("act_dim", [1, 2, 3])
@pytest.mark.parametrize("d_model", [16, 64, 128])
def test_a_narrow_action_keeps_its_bits(make_model: Callable[..., Any], act_dim: int, d_model: int) -> None:
    """With one number per row, a kernel that rounds differently shows in a few windows only."""
    cfg = replace(make_model("Pendulum-v1").cfg, act_dim=act_dim, d_model=d_model)
    model = ActingModel.random(cfg, torch.float32, torch.Generator().manual_seed(5))
    streams = torch.randn(260, d_model, generator=torch.Generator().manual_seed(6))
    with torch.inference_mode():
        expected = torch.cat([model.action(part.clone()) for part in streams.split(LEAST_LANES)[:32]])
        for lanes in range(LEAST_LANES, MOST_LANES + 1):
            width = arrange(model, 4, lanes).width
            acted = torch.cat([model.action(part.clone()) for part in streams.split(width)])
            assert torch.equal(acted[:256], expected), (lanes, width)


def test_plans_leave_few_rows_empty() -> None:
    for episodes in range(1, 400):
        lanes = plan_lanes(episodes)
        assert LEAST_LANES <= lanes <= MOST_LANES
        waves = -(-episodes // lanes)
        assert waves * lanes - episodes < max(LEAST_LANES, waves)
