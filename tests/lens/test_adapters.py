"""Adapters are found by what they recognise, and a third party adds one without touching this repository."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dt_lens
from dt_lens.errors import DtLensError
from dt_lens.lens import adapters as plugins
from dt_lens.lens.adapters import GROUP, Adapter, adapter_names, named_adapter
from dt_lens_adapters.hf_decision_transformer import HFDecisionTransformer

MINE = '''
"""A third party's adapter, whole."""

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.model import HookedDecisionTransformer


class Mine:
    name = "mine"

    def recognises(self, source):
        return "mine.weight" in getattr(source, "tensors", {})

    def load(self, checkpoint, **given):
        return HookedDecisionTransformer(HookedDecisionTransformerConfig(2, 1, d_model=4, n_layers=1, n_ctx=3))

    def wrap(self, model, **given):
        raise NotImplementedError


class Demanding(Mine):
    def __init__(self, something):
        pass


NotOne = 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "someones_adapter.py").write_text(MINE)
    (tmp_path / "broken_adapter.py").write_text("this is no python")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "someones_adapter", raising=False)
    return "someones_adapter"


def install(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Pretend that these entry points are installed, besides our own."""
    own = list(plugins.entry_points(group=GROUP))
    extra = [EntryPoint(name.split("__")[0], value, GROUP) for name, value in values.items()]
    monkeypatch.setattr(plugins, "entry_points", lambda group: [*own, *extra])


def test_ours_are_installed() -> None:
    assert {"hf_decision_transformer", "kzl"} <= set(adapter_names())
    for name in adapter_names():
        adapter = named_adapter(name)
        assert isinstance(adapter, Adapter) and adapter.name == name
    assert isinstance(named_adapter(HFDecisionTransformer), HFDecisionTransformer)
    one = HFDecisionTransformer()
    assert named_adapter(one) is one


def test_a_third_partys_adapter_is_found(monkeypatch: pytest.MonkeyPatch, module: str, tmp_path: Path) -> None:
    torch.save({"mine.weight": torch.zeros(2)}, tmp_path / "agent.pt")
    with pytest.raises(
        DtLensError, match=r"No adapter recognises this model, which holds mine\.weight, \.\.\.; dt-lens knows"
    ):
        dt_lens.load(tmp_path / "agent.pt")
    assert dt_lens.load(tmp_path / "agent.pt", adapter=f"{module}:Mine").cfg.d_model == 4
    install(monkeypatch, mine=f"{module}:Mine")
    assert dt_lens.load(tmp_path / "agent.pt").cfg.d_model == 4
    assert dt_lens.load(tmp_path / "agent.pt", adapter="mine").cfg.d_model == 4


def test_duplicates_are_refused(monkeypatch: pytest.MonkeyPatch, module: str, tmp_path: Path) -> None:
    install(monkeypatch, kzl__again="dt_lens_adapters.kzl:KZLDecisionTransformer")  # the same, installed twice
    adapter_names()
    install(monkeypatch, kzl__other=f"{module}:Mine")
    with pytest.raises(DtLensError, match=r"Two installed packages both have an adapter 'kzl' .*; uninstall one\.$"):
        adapter_names()


def test_two_that_recognise_the_same(monkeypatch: pytest.MonkeyPatch, module: str, tmp_path: Path) -> None:
    torch.save({"mine.weight": torch.zeros(2)}, tmp_path / "agent.pt")
    install(monkeypatch, mine=f"{module}:Mine", other=f"{module}:Mine")
    with pytest.raises(DtLensError, match=r"Several adapters recognise this model \(mine, mine\); pass adapter="):
        dt_lens.load(tmp_path / "agent.pt")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("kzk", r"No adapter is called 'kzk'; installed are .* mean 'kzl'\?$"),
        ("no_such_module_at_all:Adapter", r"'no_such_module_at_all:Adapter' cannot be imported: No module named .*\.$"),
        ("someones_adapter:Mime", "'someones_adapter:Mime' cannot be imported"),
        ("broken_adapter:Mine", "'broken_adapter:Mine' cannot be imported"),
        (":Mine", "cannot be imported"),
        ("someones_adapter:", "cannot be imported"),
        ("someones_adapter:NotOne", "is not an adapter: it needs a name and the methods recognises, load and wrap"),
        ("someones_adapter:Demanding", "cannot be made without arguments"),
        (dict, "is not an adapter: it needs"),
        (3, "3 is not an adapter: it needs"),
    ],
)
def test_objects_that_are_not_adapters_are_refused(module: str, adapter: Any, message: str) -> None:
    with pytest.raises(DtLensError, match=message):
        named_adapter(adapter)


def test_a_broken_installed_adapter_is_named(monkeypatch: pytest.MonkeyPatch, module: str, make_hf: Any) -> None:
    install(monkeypatch, broken="broken_adapter:Mine")
    with pytest.raises(DtLensError, match="The adapter 'broken' cannot be imported"):
        dt_lens.wrap(make_hf())
    dt_lens.wrap(make_hf(), adapter="hf_decision_transformer")  # naming one leaves the others alone


def test_an_unknown_architecture_says_what_it_saw() -> None:
    with pytest.raises(DtLensError) as caught:
        dt_lens.wrap(nn.Sequential(nn.Linear(2, 3)))
    message = str(caught.value)
    assert "Sequential, 0.weight, 0.bias" in message and "kzl" in message and message.endswith(".")


@pytest.mark.parametrize("thing", [None, 3, "hopper", {"a": torch.zeros(2)}, torch.zeros(3), nn.Linear])
def test_wrap_refuses_what_is_not_a_torch_module(thing: Any) -> None:
    with pytest.raises(DtLensError, match=r"wrap takes a torch model, not an? \w+; use dt_lens\.load"):
        dt_lens.wrap(thing)
