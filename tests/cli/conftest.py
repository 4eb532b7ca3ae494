"""A runner of the command line in this process, and models that its tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dt_lens.cli import main
from dt_lens.decision_transformer.checkpoint import save_pretrained
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.decision_transformer.model import HookedDecisionTransformer


class Result(NamedTuple):
    """What a process would have left: its exit status and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def dt_lens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run ``dt-lens`` with these words through its entry point: a new process would import everything again."""

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["dt-lens", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        code = left.value.code
        return Result(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def cartpole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random agent for CartPole in Hugging Face's format."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_mlp": 24, "n_ctx": 4, "max_ep_len": 500}
    cfg = HookedDecisionTransformerConfig(4, 2, **sizes, discrete_actions=True, action_tanh=False)
    model = HookedDecisionTransformer(cfg).eval()
    model.facts = RunFacts(context=4, environment="CartPole-v1", target_returns=(100.0,), return_scale=100.0)
    return save_pretrained(model, tmp_path_factory.mktemp("models") / "cartpole")


@pytest.fixture(scope="session")
def saved(make_dt: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random agent without an environment, of one block."""
    return save_pretrained(make_dt(1, n_layers=1), tmp_path_factory.mktemp("saved") / "model")
