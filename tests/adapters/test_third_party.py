"""The example of docs/example_adapter: an adapter that dt-lens does not know, passed by ``module:Class``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dt_lens
from dt_lens import DtLensError, SingularEdit, WeightSVD
from dt_lens.lens import Adapter, Checkpoint, Lens, Reference, named_adapter

EXAMPLE = Path(__file__).parents[2] / "docs" / "example_adapter"
ADAPTER = "dt_lens_toy:ToyDecisionTransformer"


@pytest.fixture
def toy_dt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The made-up code base; its folder is on the path, and nothing is installed."""
    import importlib

    monkeypatch.syspath_prepend(EXAMPLE)
    for name in ("toy_dt", "dt_lens_toy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("toy_dt")


@pytest.fixture
def agent(toy_dt: Any) -> Any:
    torch.manual_seed(0)
    model = toy_dt.ToyDT(obs=4, acts=2, width=12, depth=2, heads=3, window=5, horizon=30).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def saved(toy_dt: Any, agent: Any, tmp_path: Path) -> Path:
    toy_dt.save(agent, tmp_path / "toy.pt")
    return tmp_path / "toy.pt"


def test_a_file_tells_all(saved: Path) -> None:
    model = dt_lens.load(saved, adapter=ADAPTER, check=False)
    assert (model.cfg.n_heads, model.cfg.n_layers, model.cfg.d_mlp, model.facts.context) == (3, 2, 36, 5)
    assert (model.facts.environment, model.facts.return_scale, model.facts.target_returns) == (
        "CartPole-v1",
        500.0,
        (500.0,),
    )
    assert dt_lens.certify(model).worst < 2e-5
    assert set(WeightSVD(model).scan(["*.W_in", "*.OV.*"])["matrix"].str.split(".").str[1]) == {"0", "1"}
    table = WeightSVD(model).top("blocks.1.mlp.W_out", "action_out", k=2)
    assert set(table["label"]) == set(model.embeddings["action_out"].labels)


def test_the_protocols_of_the_face_are_satisfied(saved: Path) -> None:
    model = dt_lens.load(saved, adapter=ADAPTER, check=False)
    assert isinstance(named_adapter(ADAPTER), Adapter) and isinstance(model, Lens)
    assert isinstance(model.reference, Reference)
    assert sys.modules["dt_lens_toy"].Checkpoint is Checkpoint


def test_the_lens_computes_what_the_agent_does(agent: Any) -> None:
    agent.double()
    model = dt_lens.wrap(agent, adapter=ADAPTER)
    generator = torch.Generator().manual_seed(1)
    obs, rtg = (torch.randn(3, 5, n, generator=generator, dtype=torch.float64) for n in (4, 1))
    acts, when = (torch.randint(n, (3, 5), generator=generator) for n in (2, 30))

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        out = model(states=obs, actions=acts, returns_to_go=rtg, timesteps=when)
        return out.action_preds, agent(rtg, obs, acts, when)

    with torch.no_grad():
        ours, before = both()
        torch.testing.assert_close(ours, before, rtol=0, atol=1e-12)
        with SingularEdit(model, "blocks.0.attn.OV.2", sv=0, side="write", value="flip"):
            ours, edited = both()
            torch.testing.assert_close(ours, edited, rtol=0, atol=1e-12)
            assert (edited - before).abs().max() > 1e-3
        assert torch.equal(both()[1], before)


@pytest.mark.parametrize(
    ("right", "wrong", "part"),
    [
        ('"(head which e) d', '"(which head e) d', "W_K"),
        ('"d (head e) -> head e d"', '"d (e head) -> head e d"', "W_O"),
        ('act_fn="silu"', 'act_fn="relu"', "activation function"),
        ("discrete_actions=True,", "discrete_actions=True, attn_scale_by_head=False,", "attention scale"),
    ],
)
def test_a_wrong_declaration_is_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str, part: str
) -> None:
    text = (EXAMPLE / "dt_lens_toy.py").read_text()
    assert right in text
    (tmp_path / "dt_lens_wrong.py").write_text(text.replace(right, wrong))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "dt_lens_wrong", raising=False)
    with pytest.raises(DtLensError, match=f"certify: [^;]*{part}"):
        dt_lens.load(saved, adapter="dt_lens_wrong:ToyDecisionTransformer")


def test_what_is_missing_is_asked_for_and_what_is_too_much_is_named(saved: Path) -> None:
    held = torch.load(saved, weights_only=True)
    torch.save(held["model"], saved)
    with pytest.raises(DtLensError, match=r"A toy_dt agent's file does not say how many .* pass n_heads= "):
        dt_lens.load(saved, adapter=ADAPTER)
    assert dt_lens.load(saved, adapter=ADAPTER, n_heads=3, context=5, check=False).cfg.n_ctx == 5
    with pytest.raises(DtLensError, match=r"Unknown option 'heads' .* mean 'n_heads'"):
        dt_lens.load(saved, adapter=ADAPTER, heads=3)
    torch.save(held["model"] | {"ladder.0.gate.weight": torch.zeros(3)}, saved)
    with pytest.raises(DtLensError, match=r"tensor 'ladder\.0\.gate\.weight' that a toy_dt agent .* has no place for"):
        dt_lens.load(saved, adapter=ADAPTER, n_heads=3)
    del held["model"]["ladder.1.mix.weight"]
    torch.save(held, saved)
    with pytest.raises(DtLensError, match=r"no tensor 'ladder\.1\.mix\.weight'"):
        dt_lens.load(saved, adapter=ADAPTER)


def test_settings_that_are_not_a_dict(saved: Path) -> None:
    held = torch.load(saved, weights_only=True)
    torch.save(held | {"settings": "none"}, saved)
    with pytest.raises(DtLensError, match=r"The settings in .* are not a dict"):
        dt_lens.load(saved, adapter=ADAPTER)
